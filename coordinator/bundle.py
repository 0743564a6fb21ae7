"""What of a job travels: the code, data, test and weights files of a spec, as manifests of content.

Owns: finding and hashing these files. Refuses: missing files (named), code over MAX_CODE_BYTES, code outside the job
file's folder. Paths are relative to that folder. Invariant: equal content gives equal manifests, wherever it lies.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.source_files import imported_files, names_defined
from protos import limits
from protos.artifact import FileEntry, Manifest, check_manifest, digest_file
from protos.errors import ErrorCode, SpecError
from protos.ids import Digest
from protos.jobspec import DataSpec, JobSpec, ModelSpec, entry_point
from strategies import hugging_face
from strategies.data import source

HashProgress = Callable[[int, int], None]  # bytes hashed, bytes to hash


@dataclass(frozen=True, slots=True)
class Bundle:
    """A job ready to submit. `files`: where each digest lies on this machine."""

    spec: JobSpec
    code: Manifest | None
    data: Manifest | None
    test: Manifest | None
    weights: Manifest | None
    files: Mapping[Digest, Path] = field(default_factory=dict)

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        every = (self.code, self.data, self.test, self.weights)
        return tuple(manifest for manifest in every if manifest is not None)


_SHARED = ("data", "test")  # used where they lie when all nodes see them; the coordinator itself reads the weights


def bundle(spec: JobSpec, folder: Path, progress: HashProgress = lambda done, total: None) -> Bundle:
    """Find and hash every file that the job needs. `folder` is the job file's."""
    folder = folder.resolve()
    source.check(spec.data)
    listings = {
        "code": _code_files(spec, folder),
        "data": _listed(source.data_file(spec.data, folder), "data.source"),
        "test": _listed(source.test_file(spec.data, folder), "data.test"),
        "weights": _weights_files(spec, folder),
    }
    return _hashed(spec, listings, progress)


def bundle_model(model: ModelSpec, folder: Path, progress: HashProgress = lambda done, total: None) -> Bundle:
    """A model alone, to be identified by a node: what it is, not what its weights are worth."""
    spec = JobSpec(name="identify", model=model, data=DataSpec(source=source.MODEL_ALONE))
    folder = folder.resolve()
    return _hashed(spec, {"code": _code_files(spec, folder), "weights": _weights_files(spec, folder)}, progress)


def _hashed(spec: JobSpec, listings: Mapping[str, dict[str, Path] | None], progress: HashProgress) -> Bundle:
    total = sum(path.stat().st_size for listing in listings.values() if listing for path in listing.values())
    done = 0
    manifests: dict[str, Manifest | None] = dict.fromkeys(("code", "data", "test", "weights"))
    files: dict[Digest, Path] = {}
    for name, listing in listings.items():
        if listing is None:
            continue
        entries = []
        for relative, path in listing.items():
            size = path.stat().st_size
            digest = digest_file(path)
            entries.append(FileEntry(relative, digest, size, str(path) if name in _SHARED else ""))
            files[digest] = path
            done += size
            progress(done, total)
        manifests[name] = check_manifest(Manifest(tuple(entries)))
    return Bundle(spec, **manifests, files=files)


def _weights_files(spec: JobSpec, folder: Path) -> dict[str, Path] | None:
    """The weights to start from, or the model itself when it is a file or a Hugging Face directory."""
    weights = spec.model.weights
    if entry_point(spec.model.source):
        return _listed(folder / Path(weights).expanduser(), "model.weights") if weights else None
    model = folder / Path(spec.model.source).expanduser()
    if model.is_dir() and (model / hugging_face.CONFIG_FILE).is_file():
        return hugging_face.travelling_files(model, weights)
    if weights:
        raise SpecError(
            "model.weights: only for a model that is Python source", "a model file brings its own weights: remove it"
        )
    if model.is_dir():
        raise SpecError(
            f"model.source: {model} has no {hugging_face.CONFIG_FILE}",
            "name a Hugging Face directory, a model file, or FILE.py:FUNCTION",
            code=ErrorCode.MODEL_UNUSABLE,
        )
    return _listed(model, "model.source")


def _listed(path: Path | None, field_name: str) -> dict[str, Path] | None:
    """Relative path -> file, of a file or of everything below a folder that is not hidden."""
    if path is None:
        return None
    if path.is_file():
        return {path.name: path.resolve()}
    if not path.is_dir():
        raise SpecError(f"{field_name}: there is no file or folder {path}", "paths are relative to the job file")
    found: dict[str, Path] = {}
    for parent, folders, names in os.walk(path, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(parent) / name
            if not name.startswith(".") and file.is_file():
                found[file.relative_to(path).as_posix()] = file.resolve()
        if len(found) > limits.MAX_MANIFEST_FILES:
            raise SpecError(
                f"{field_name}: {path} has over {limits.MAX_MANIFEST_FILES} files",
                "pack them into npz, parquet or jsonl files",
            )
    if not found:
        raise SpecError(f"{field_name}: the folder {path} is empty", "is it the right one?")
    return found


def _code_files(spec: JobSpec, folder: Path) -> dict[str, Path] | None:
    """The Python files of every entry point in the job, and what they import from beside them."""
    sources = {"model.source": spec.model.source, "data.source": spec.data.source, "train.loss": spec.train.loss}
    found: dict[str, Path] = {}
    for field_name, named in sources.items():
        point = entry_point(named)
        if point is None:
            continue
        file = folder / point[0]
        if not file.is_file():
            raise SpecError(f"{field_name}: there is no file {file}", f"paths are relative to {folder}")
        file = file.resolve()
        if not file.is_relative_to(folder):
            raise SpecError(f"{field_name}: {file} lies outside {folder}", "put the code beside the job file or below")
        if not names_defined(file) & {point[1], "*"}:  # `from x import *` may bring it
            raise SpecError(
                f"{field_name}: {point[0]} defines no {point[1]!r}",
                "name a function of that file: FILE.py:FUNCTION",
                code=ErrorCode.MODEL_UNUSABLE if field_name == "model.source" else None,
            )
        for path in imported_files(file, folder):
            found[path.relative_to(folder).as_posix()] = path
    size = sum(path.stat().st_size for path in found.values())
    if size > limits.MAX_CODE_BYTES:
        raise SpecError(
            f"the code is {size} bytes, over the limit of {limits.MAX_CODE_BYTES}", "move data out of .py files"
        )
    return dict(sorted(found.items())) or None

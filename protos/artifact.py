"""Content-addressed artifacts and manifests. A manifest lists files by relative path and digest; there are no archives.

Invariants: a digest is blake3 of the content, hex; a path is relative, POSIX, without `..`, links or device names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import blake3

from protos import limits
from protos.errors import SpecError
from protos.ids import Digest


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a manifest. `origin` is the absolute path on the submitting machine, used only when it is shared."""

    path: str
    digest: Digest
    bytes: int
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    files: tuple[FileEntry, ...]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files)

    @property
    def digest(self) -> Digest:
        """Of paths and contents, not of where they came from."""
        hasher = blake3.blake3()
        for entry in sorted(self.files, key=lambda entry: entry.path):
            hasher.update(f"{entry.path}\0{entry.digest}\0{entry.bytes}\n".encode())
        return Digest(hasher.hexdigest())


@dataclass(frozen=True, slots=True)
class Artifact:
    """A named result of a job."""

    name: str
    digest: Digest
    bytes: int


def check_digest(digest: str) -> Digest:
    """Raises SpecError unless it is 64 lower-case hex digits: a digest is used as a file name."""
    if len(digest) != 64 or any(c not in "0123456789abcdef" for c in digest):
        raise SpecError(f"not a digest: {digest[:80]!r}", "a digest is 64 lower-case hex digits (blake3)")
    return Digest(digest)


def check_path(path: str) -> str:
    """Raises SpecError unless the path stays below the folder it will be written in."""
    pure = PurePosixPath(path)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path or str(pure) != path:
        raise SpecError(f"unsafe path in a manifest: {path[:200]!r}", "use relative paths without '..'")
    return path


def check_manifest(manifest: Manifest) -> Manifest:
    """Every path safe and unique, every digest well formed, within limits."""
    if len(manifest.files) > limits.MAX_MANIFEST_FILES:
        raise SpecError(
            f"{len(manifest.files)} files are over the limit of {limits.MAX_MANIFEST_FILES}", "pack the data"
        )
    seen: set[str] = set()
    for entry in manifest.files:
        check_path(entry.path)
        check_digest(entry.digest)
        if entry.bytes < 0:
            raise SpecError(f"{entry.path}: negative size")
        if entry.path in seen:
            raise SpecError(f"{entry.path} is listed twice")
        seen.add(entry.path)
    return manifest


def digest_bytes(content: bytes) -> Digest:
    return Digest(blake3.blake3(content).hexdigest())


def digest_file(path: Path) -> Digest:
    """blake3 of a file of any size, in constant memory."""
    hasher = blake3.blake3()
    with path.open("rb") as file:
        while block := file.read(limits.CHUNK_BYTES):
            hasher.update(block)
    return Digest(hasher.hexdigest())

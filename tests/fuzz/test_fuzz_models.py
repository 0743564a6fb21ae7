"""Every reader of a model's bytes, by name, fed with damaged valid models: a profile that can be shown, or the typed
error, nothing else.

A failure prints how to make the input again; it then belongs into the reader's own tests as a case.
"""

from __future__ import annotations

import inspect
import io
import random
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import model_seeds
import pytest
from fuzz_bytes import damaged
from model_seeds import Entries

from coordinator.cli import model_view
from coordinator.identify import (
    archive_readers,
    folder_readers,
    gguf_file,
    hdf5_bytes,
    hdf5_file,
    hdf5_heaps,
    hdf5_messages,
    joblib_stream,
    lz4_frame,
    numpy_file,
    parse,
    pickle_source,
    safetensors_header,
    tensor_bundle,
)
from coordinator.identify.archive import open_archive
from coordinator.identify.folder import Folder, worth_opening
from protos import documents
from protos.errors import ErrorCode, SpecError
from protos.model import ModelProfile

SHARE = 0.3  # of --fuzz-seconds in the usual, short run: there are many readers
SHORT_S = 5.0
DECODERS = (  # of bytes: a damaged seed tests the functions that the seed needs, so the seeds need every one of them
    gguf_file, hdf5_bytes, hdf5_file, hdf5_heaps, hdf5_messages, joblib_stream, lz4_frame, numpy_file, pickle_source,
    safetensors_header, tensor_bundle,
)  # fmt: skip
NEEDED_BY_NONE = frozenset({"damaged", "_damaged", "refused_link", "_table"})  # refusals, and what an import computes
FILES, ARCHIVES, FOLDERS = model_seeds.files(), model_seeds.archives(), model_seeds.folders()


def changed(rng: random.Random, seeds: Sequence[Entries]) -> Entries:
    """A seed of which some entries are damaged, gone, or under another's name."""
    found = dict(rng.choice(seeds))
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice(sorted(found))
        match rng.randrange(8):
            case 0:
                del found[name]
            case 1:
                found[rng.choice(sorted(rng.choice(seeds)))] = found[name]
            case 2:
                found[name] = b""
            case _:
                found[name] = damaged(rng, [found[name]])
        if not found:
            break
    return found


def as_archive(read: Callable[..., ModelProfile], entries: Entries) -> ModelProfile:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return read(open_archive(buffer, len(buffer.getvalue())))


def as_folder(read: Callable[..., ModelProfile], entries: Entries) -> ModelProfile:
    files = {name: io.BytesIO(content) for name, content in entries.items() if worth_opening(name)}
    return read(Folder(files, {name: len(content) for name, content in entries.items()}))


def feed(request: pytest.FixtureRequest, attempt: Callable[[random.Random], object]) -> None:
    seed, seconds = request.config.getoption("--fuzz-seed"), float(request.config.getoption("--fuzz-seconds"))
    end = time.monotonic() + (seconds if seconds >= SHORT_S else SHARE * seconds)
    number = 0
    while time.monotonic() < end or number < 20:
        number += 1
        try:
            found = attempt(random.Random(f"{seed} {number}"))
            assert isinstance(found, ModelProfile)
            model_view.model({**documents.plain(found), "source": "x", "seen_by": "bytes"}, layers=20)
        except SpecError as error:
            assert error.code is ErrorCode.MODEL_UNUSABLE and error.message, f"seed {seed}, input {number}: {error!r}"
        except Exception as error:
            raise AssertionError(f"seed {seed}, input {number}: {type(error).__name__} escaped") from error


def test_every_reader_has_seeds_that_it_reads() -> None:
    for name, seeds in FILES.items():
        for content in seeds:
            reader = next(each for each in parse.READERS if each.matches(content[: parse.HEAD_BYTES], len(content)))
            assert reader.name == name and reader.read(io.BytesIO(content), len(content)).format
    for tables, kept, read in ((archive_readers, ARCHIVES, as_archive), (folder_readers, FOLDERS, as_folder)):
        readers: Sequence[Any] = tables.READERS
        assert [reader.name for reader in readers] == list(kept)
        for reader in readers:
            assert all(read(reader.read, entries).format for entries in kept[reader.name])
    assert [reader.name for reader in parse.READERS] == list(FILES)


def test_the_seeds_need_every_function_of_the_decoders() -> None:
    called: set[tuple[str, str]] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        called.add((frame.f_code.co_filename, frame.f_code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        test_every_reader_has_seeds_that_it_reads()
    finally:
        sys.setprofile(before)
    for module in DECODERS:
        members = [module, *(each for _, each in inspect.getmembers(module, inspect.isclass))]
        found = {function for owner in members for _, function in inspect.getmembers(owner, inspect.isfunction)}
        own = {each.__qualname__ for each in found if each.__module__ == module.__name__ and each.__name__[:2] != "__"}
        missing = own - {name for file, name in called if file == module.__file__} - NEEDED_BY_NONE
        assert not missing, (module.__name__, missing)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file(name: str, request: pytest.FixtureRequest) -> None:
    reader = next(each for each in parse.READERS if each.name == name)

    def attempt(rng: random.Random) -> object:
        content = damaged(rng, FILES[name])
        return reader.read(io.BytesIO(content), len(content)) if content else parse.identify(io.BytesIO(b"\0"))

    feed(request, attempt)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ARCHIVES)
def test_a_damaged_archive(name: str, request: pytest.FixtureRequest) -> None:
    reader = next(each for each in archive_readers.READERS if each.name == name)

    def attempt(rng: random.Random) -> object:
        entries = changed(rng, ARCHIVES[name])
        matching = reader.matches(frozenset(key.partition("/")[2] or key for key in entries))
        return as_archive(reader.read if matching else archive_readers.READERS[-1].read, entries)

    feed(request, attempt)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_damaged_directory(name: str, request: pytest.FixtureRequest) -> None:
    reader = next(each for each in folder_readers.READERS if each.name == name)

    def attempt(rng: random.Random) -> object:
        entries = changed(rng, FOLDERS[name])
        return as_folder(reader.read if reader.matches(frozenset(entries)) else folder_readers.identify, entries)

    feed(request, attempt)


@pytest.mark.timeout(300)
def test_any_bytes_find_their_reader(request: pytest.FixtureRequest) -> None:
    every = [seed for seeds in FILES.values() for seed in seeds]
    feed(request, lambda rng: parse.identify(io.BytesIO(damaged(rng, every) or b"\0")))

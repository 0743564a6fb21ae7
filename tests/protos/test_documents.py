"""Every value that crosses a wire or a disk comes back as it was, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos import artifact, capacity, documents, jobspec, limits, model, plan, work
from protos.artifact import FileEntry, Manifest, check_digest, check_manifest, check_path, digest_bytes, digest_file
from protos.errors import SpecError
from protos.ids import Digest

VALUES = [
    kind
    for module in (artifact, capacity, model, plan, work)
    for kind in vars(module).values()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
]
# A mapping by pairs of nodes stays inside the coordinator: it never becomes a document.
VALUES.remove(plan.ClusterView)
VALUES.remove(plan.Learned)
SPEC = jobspec.parse({"model": {"source": "model.py:build"}, "data": {"source": "builtin:digits"}})
st.register_type_strategy(jobspec.JobSpec, st.just(SPEC))
st.register_type_strategy(
    Mapping, lambda kind: st.dictionaries(*(st.from_type(part) for part in get_args(kind)), max_size=3)
)
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))
st.register_type_strategy(str, st.text(st.characters(codec="utf-8"), max_size=8))


@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.__name__)
def test_a_value_comes_back_as_it_was(kind: type[Any]) -> None:
    @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(value=st.from_type(kind))
    def check(value: Any) -> None:
        encoded = documents.encode(value)
        assert documents.decode(kind, encoded, limit_bytes=1 << 30) == value
        assert json.loads(json.dumps(documents.plain(value))) == json.loads(encoded)

    check()


@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.__name__)
def test_values_are_frozen_and_slotted(kind: type[Any]) -> None:
    assert kind.__dataclass_params__.frozen
    assert not hasattr(kind, "__dict__") or "__dict__" not in kind.__slots__


def test_a_job_spec_and_a_tuple_of_leases_are_documents_too() -> None:
    assert documents.decode(jobspec.JobSpec, documents.encode(SPEC)) == SPEC
    kind = tuple[work.HeldLease, ...]
    assert documents.decode(kind, documents.encode_as(kind, ())) == ()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_have_is_null(loss: float) -> None:
    metrics = work.Metrics(1.0, 1, 0, "train", loss, 32)
    assert documents.decode(work.Metrics, documents.encode(metrics)).loss is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"path": 3, "digest": "a", "bytes": 1}', "path"),
        (b'{"path": "a", "digest": "a"}', "bytes"),
        (b'{"path": "a", "digest": "a", "bytes": "many"}', "bytes"),
        (b"[]", "document"),
        (b"{", "FileEntry"),
        (b"\xff\xfe", "FileEntry"),
        (b"", "FileEntry"),
    ],
)
def test_a_wrong_document_is_refused_with_the_path(text: bytes, words: str) -> None:
    with pytest.raises(SpecError) as refused:
        documents.decode(FileEntry, text)
    assert words in refused.value.message
    assert refused.value.hint


def test_a_document_is_bounded() -> None:
    with pytest.raises(SpecError, match="over the limit"):
        documents.decode(FileEntry, b" " * (limits.MAX_DOCUMENT_BYTES + 1))


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_spec_error(content: bytes) -> None:
    for kind in (work.Outcome, Manifest, work.Progress):
        try:
            documents.decode(kind, content)
        except SpecError as error:
            assert error.message


# ---- artifacts: what becomes a file name


@pytest.mark.parametrize("path", ["a", "a/b.py", "a b/ü.csv", ".hidden", "a..b", "..a/b"])
def test_a_path_below_the_folder_is_taken(path: str) -> None:
    assert check_path(path) == path


@pytest.mark.parametrize(
    "path", ["", ".", "..", "/etc/passwd", "../a", "a/../b", "a/..", "a//b", "a/", "./a", "a\\b", "a\0b", "C:\\x"]
)
def test_a_path_that_could_leave_the_folder_is_refused(path: str) -> None:
    with pytest.raises(SpecError, match="unsafe path"):
        check_path(path)


@given(path=st.text(alphabet="./\\ab\0~ ", max_size=12) | st.text(max_size=12))
def test_whatever_path_is_taken_stays_below_its_folder(path: str) -> None:
    from pathlib import Path, PurePosixPath

    try:
        check_path(path)
    except SpecError:
        return
    assert ".." not in PurePosixPath(path).parts
    assert not Path(path).is_absolute()
    inside = Path("/folder") / path
    assert inside.is_relative_to("/folder")
    assert inside != Path("/folder")


@given(text=st.text(max_size=70) | st.text(alphabet="0123456789abcdefABCDEF", min_size=60, max_size=66))
def test_only_blake3_in_lower_case_hex_is_a_digest(text: str) -> None:
    good = len(text) == 64 and set(text) <= set("0123456789abcdef")
    if good:
        assert check_digest(text) == text
    else:
        with pytest.raises(SpecError):
            check_digest(text)


def entry(path: str, content: bytes = b"x", origin: str = "") -> FileEntry:
    return FileEntry(path, digest_bytes(content), len(content), origin)


@pytest.mark.parametrize(
    "files",
    [
        (entry("a"), entry("a")),
        (entry("../a"),),
        (FileEntry("a", Digest("zz"), 1),),
        (FileEntry("a", digest_bytes(b""), -1),),
        tuple(entry(str(number)) for number in range(limits.MAX_MANIFEST_FILES + 1)),
    ],
    ids=["twice", "path", "digest", "size", "many"],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(files: tuple[FileEntry, ...]) -> None:
    with pytest.raises(SpecError):
        check_manifest(Manifest(files))


def test_a_manifest_is_named_by_paths_and_contents_only() -> None:
    one = Manifest((entry("a", b"1", "/home/x/a"), entry("b", b"2")))
    assert one.digest == Manifest((entry("b", b"2"), entry("a", b"1"))).digest
    assert one.digest != Manifest((entry("a", b"2"), entry("b", b"1"))).digest
    assert one.digest != Manifest((entry("a", b"1"), entry("c", b"2"))).digest
    assert one.bytes == 2
    assert check_manifest(one) is one
    assert check_digest(one.digest)


def test_a_file_and_its_bytes_have_one_digest(tmp_path) -> None:  # type: ignore[no-untyped-def]
    content = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(content)
    assert digest_file(tmp_path / "file") == digest_bytes(content)

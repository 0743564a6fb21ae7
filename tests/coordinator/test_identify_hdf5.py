"""The HDF5 reader against the library itself: the same names, shapes and texts; nothing outside the file is opened."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.identify import parse
from coordinator.identify.hdf5_file import Node, read_tree
from protos.errors import HiveError, SpecError

h5py = pytest.importorskip("h5py")

LONG = "x" * 100_000


def written(fill: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", **options) as file:
        fill(file)
    return buffer.getvalue()


def tree(content: bytes) -> Node:
    return read_tree(io.BytesIO(content), len(content))


def names(file: Any) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    file.visititems(lambda name, item: found.update({name: item.shape} if isinstance(item, h5py.Dataset) else {}))
    return found


@pytest.mark.parametrize("version", ["earliest", "latest", "v110"])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("groups", [1, 9, 40, 250])
def test_it_reads_what_the_library_writes(version: str, ordered: bool, groups: int) -> None:
    def fill(file: Any) -> None:
        file.attrs["long"] = LONG
        file.attrs["fixed"] = np.bytes_("abc")
        file.attrs["several"] = [f"layer_{index}".encode() for index in range(30)]
        for index in range(12):
            file.attrs[f"more{index}"] = f"text {index}"  # more than a header holds
        for index in range(groups):
            group = file.create_group(f"group_{index}_{'n' * (index % 40)}", track_order=ordered)
            group["kernel"] = np.zeros((3, index + 1), "f4")
            group.attrs["name"] = "ä"
            if index < 3:
                for below in range(min(groups, 60)):
                    group.create_dataset(f"packed{below}", (4, 5), "f2", data=np.ones((4, 5)), compression="gzip")
        file["scalar"] = np.zeros(())
        file["flags"] = np.ones(3, bool)
        file["numbers"] = np.arange(4, dtype="u2")

    content = written(fill, libver=("earliest", version) if version == "v110" else version, track_order=ordered)
    root = tree(content)
    with h5py.File(io.BytesIO(content)) as file:
        expected = names(file)
    assert {name: node.shape for name, node in root.datasets()} == expected
    types = {node.dtype for _, node in root.datasets()}
    assert types == {"F16", "F32", "F64", "BOOL", "U16"}
    assert (root.text("long"), root.text("fixed"), root.text("more11")) == (LONG, "abc", "text 11")
    assert root.texts["several"] == tuple(f"layer_{index}" for index in range(30))
    assert root.children["group_0_"].text("name") == "ä"


def test_one_dataset_with_two_names_is_there_once() -> None:
    def fill(file: Any) -> None:
        file["a"] = np.zeros((2, 3))
        file["b"] = file["a"]
        file["group/itself"] = file["/"]

    assert [node.shape for _, node in tree(written(fill)).datasets()] == [(2, 3)]


def soft(file: Any) -> None:
    file["link"] = h5py.SoftLink("/elsewhere")


def external(file: Any) -> None:
    file["link"] = h5py.ExternalLink("/etc/passwd", "/data")


def outside(file: Any) -> None:
    file.create_dataset("kernel", (4,), "f4", external=[("/etc/passwd", 0, 16)])


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "data", (4,))
    file.create_virtual_dataset("kernel", layout)


def unwritten(file: Any) -> None:
    file.create_dataset("kernel", (1 << 30,), "f8")


def unwritten_chunks(file: Any) -> None:
    file.create_dataset("kernel", (1 << 40,), "f8", chunks=(1024,))


@pytest.mark.parametrize("version", ["earliest", "latest"])
@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (soft, "soft link"),
        (external, "external link|a link"),
        (outside, "another file"),
        (virtual, "virtual dataset"),
        (unwritten, "claims"),
        (unwritten_chunks, "claims"),
    ],
)
def test_what_is_not_in_the_file_is_refused_by_name(fill: Any, message: str, version: str) -> None:
    content = written(fill, libver=version)
    with pytest.raises(SpecError, match=message) as caught:
        parse.identify(io.BytesIO(content))
    assert caught.value.hint


def test_other_hdf5_files_are_only_named() -> None:
    profile = parse.identify(io.BytesIO(written(lambda file: file.update({"a": np.zeros(3)}))))
    assert (profile.framework, profile.format, profile.parameters) == ("hdf5", "hdf5", 0)
    assert "1 datasets" in profile.why_not


def small(file: Any) -> None:
    file.attrs["layer_names"] = ["dense"]
    for index in range(12):
        file[f"dense/{index}"] = np.zeros((2, 2), "f4")


VALID = [written(small, libver=version, track_order=True) for version in ("earliest", "latest")]


@settings(max_examples=200)
@given(st.sampled_from(VALID), st.data())
def test_damaged_files_are_ordinary_errors(valid: bytes, data: st.DataObject) -> None:
    content = bytearray(valid)
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(8, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(HiveError):
        parse.identify(io.BytesIO(bytes(content)))


@given(st.data())
def test_truncated_files_never_pass(data: st.DataObject) -> None:
    content = VALID[0]
    length = data.draw(st.integers(8, len(content) - 1))
    with pytest.raises(SpecError, match="damaged or was cut short"):
        parse.identify(io.BytesIO(content[:length]))


def test_groups_that_hold_each_other_end(tmp_path: Path) -> None:
    def fill(file: Any) -> None:
        deep = file
        for _ in range(100):
            deep = deep.create_group("g")

    with pytest.raises(SpecError, match="nested too deeply"):
        tree(written(fill))

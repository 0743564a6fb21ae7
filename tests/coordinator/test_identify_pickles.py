"""The walk of a pickle: every protocol is followed, nothing runs, and no file makes it work or remember without end."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import struct
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coordinator.identify import parse
from coordinator.identify.pickle_source import LONG_BYTES
from coordinator.identify.pickle_walk import Array, Global, Mapping, Object, walk
from protos.errors import HiveError, SpecError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Thing:
    """Module level, so that pickle finds it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.names = ["a", "b"]


class Slotted:
    __slots__ = ("x",)


class Words(list[str]):
    pass


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.canary}",)


def walked(content: bytes) -> object:
    return walk(io.BytesIO(content)).value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_are_what_pickle_says(protocol: int) -> None:
    value = [
        None,
        True,
        False,
        1,
        -5,
        300,
        70_000,
        2**80,
        -(2**80),
        1.5,
        "ä\n",
        b"\0\xff",
        (),
        (1,),
        (1, 2),
        (1, 2, 3, 4),
    ]
    assert walked(pickle.dumps(value, protocol)) == value
    nested = walked(pickle.dumps({"a": {1: [2]}, "s": {3}, "o": collections.OrderedDict(b=4)}, protocol))
    assert isinstance(nested, Mapping)
    assert nested.items["a"].items == {1: [2]}
    assert (nested.items["s"], nested.items["o"].items) == ([3], {"b": 4})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_are_records_with_their_state(protocol: int) -> None:
    slotted = Slotted()
    slotted.x = 7
    words = Words(["p", "q"])
    thing, slots, listed = walked(
        pickle.dumps([Thing(3), slotted, words] if protocol > 1 else [Thing(3)] * 3, protocol)
    )  # type: ignore[misc]
    assert isinstance(thing, Object)
    assert (thing.type.module, thing.type.name) == (__name__, "Thing")
    assert thing.attributes == {"size": 3, "names": ["a", "b"]}
    if protocol > 1:
        assert slots.attributes == {"x": 7}
        assert listed.elements == ["p", "q"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_have_shape_and_type_and_are_as_long_as_they_say(protocol: int) -> None:
    arrays = [
        np.zeros((3, 4), "f4"),
        np.arange(100_000),
        np.zeros(2, [("a", "f8"), ("b", "i4")]),
        np.array(["x", "yz"]),
    ]
    found = walked(pickle.dumps([*arrays, np.float64(2.5), np.array([Thing(1), "t"], object)], protocol))
    assert isinstance(found, list)
    assert [(array.shape, array.dtype.name) for array in found[:3]] == [
        ((3, 4), "F32"),
        ((100_000,), "I64"),
        ((2,), "V12"),
    ]
    assert found[2].dtype.fields == ("a", "b")
    assert found[4] == 2.5
    assert isinstance(found[5].objects[0], Object)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_runs_in_any_protocol(tmp_path: Path, protocol: int) -> None:
    canary = tmp_path / "executed"
    content = pickle.dumps({"weight": Payload(canary)}, protocol)
    with contextlib.suppress(SpecError):
        profile = parse.identify(io.BytesIO(content))
        assert not profile.trainable
        assert "system" in profile.why_not
    found = walk(io.BytesIO(content))
    assert list(found.foreign) == ["posix.system"]
    assert found.value.items["weight"].type == Global("posix", "system")
    assert not canary.exists()
    pickle.loads(content)  # noqa: S301 - proves that the payload would have fired
    assert canary.exists()


def call(opcodes: bytes) -> bytes:
    return b"\x80\x02" + opcodes + b"."


@pytest.mark.parametrize(
    "content",
    [
        b"cposix\nsystem\n(S'touch canary'\ntR.",
        b"(S'touch canary'\niposix\nsystem\n.",
        b"(cposix\nsystem\nS'touch canary'\no.",
        call(b"cposix\nsystem\nU\x0ctouch canary\x85\x81"),
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch canary\x85R.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch canary\x85}\x92.",
        call(b"cbuiltins\ngetattr\ncposix\nsystem\nU\x08__call__\x86RU\x0ctouch canary\x85R"),
        call(b"ccopyreg\n_reconstructor\ncposix\nsystem\nU\x0ctouch canary\x85R"),
    ],
)
def test_every_way_to_call_is_a_record(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = walk(io.BytesIO(content))
    assert "posix.system" in found.foreign
    assert isinstance(found.value, Object)
    assert list(tmp_path.iterdir()) == []


def test_registered_code_and_persistent_ids_are_named() -> None:
    assert list(walk(io.BytesIO(call(b"\x82\x07)R"))).foreign) == ["copyreg.extension 7"]
    assert list(walk(io.BytesIO(b"Pabc\n.")).foreign) == ["pickle.persistent_id"]
    assert list(walk(io.BytesIO(call(b"U\x03abcQ"))).foreign) == ["pickle.persistent_id"]


def test_data_outside_the_file_are_refused() -> None:
    content = pickle.dumps(np.zeros(1000), 5, buffer_callback=lambda buffer: None)
    with pytest.raises(SpecError, match="outside the file"):
        walk(io.BytesIO(content))


def test_long_bytes_are_stepped_over_but_must_be_there() -> None:
    content = pickle.dumps(np.zeros(LONG_BYTES), 4)
    found = walked(content)
    assert isinstance(found, Array)
    assert found.bytes == 8 * LONG_BYTES
    with pytest.raises(SpecError, match="cut short"):
        walk(io.BytesIO(content[: len(content) // 2]))
    lying = call(b"B" + struct.pack("<I", 2**32 - 1) + bytes(100))
    huge = b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + bytes(100) + b"."
    for broken in (lying, huge, b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x."):
        with pytest.raises(SpecError, match="cut short"):
            walk(io.BytesIO(broken))


@pytest.mark.parametrize("claimed", [(2**20,), (10, 10), (2**47,)])
def test_an_array_may_not_claim_more_than_it_holds(claimed: tuple[int, ...]) -> None:
    content = pickle.dumps(np.zeros(10), 2)
    shape = pickle.dumps((10,), 2)[2:-1]
    lie = pickle.dumps(claimed, 2)[2:-1]
    assert shape.split(b"q")[0] in content
    with pytest.raises(SpecError, match="claims"):
        walk(io.BytesIO(content.replace(shape.split(b"q")[0], lie.split(b"q")[0])))


@pytest.mark.parametrize(
    "content",
    [
        call(b"]q\x00" + b"(h\x00h\x00h\x00h\x00e" * 20_000),  # a list in itself, again and again
        call(b")" + b"2\x86" * 50_000),  # ((..), (..)): 2**50000 leaves
        call(b"}" + b"q\x00(K\x01h\x00u" * 20_000),
        call(b"(" * 50_000 + b"l" * 50_000),
        b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
        b"\x80\x04\x88" + b"\x85" * 50_000 + b".",
    ],
    ids=["lists", "pairs", "dicts", "lists of lists", "nested lists", "nested tuples"],
)
def test_what_multiplies_itself_is_walked_in_the_time_it_takes_to_read(content: bytes) -> None:
    walk(io.BytesIO(content))
    with contextlib.suppress(SpecError):
        parse.identify(io.BytesIO(content))


def test_mappings_that_hold_themselves_end() -> None:
    torch_file = io.BytesIO()
    weights: dict[str, object] = {"w": torch.zeros(2)}
    weights["again"] = weights
    more = weights
    for level in range(30):
        more = {f"{level}.{side}": more for side in "abcd"}
    torch.save({"model": more, "epoch": 1}, torch_file)
    with contextlib.suppress(HiveError):
        parse.identify(torch_file)


def test_too_many_bytes_to_remember_are_refused() -> None:
    content = call(b"".join(b"T" + struct.pack("<I", LONG_BYTES) + bytes(LONG_BYTES) + b"0" for _ in range(2100)))
    with pytest.raises(SpecError, match="names and numbers"):
        walk(io.BytesIO(content))


VALID = {
    **{f"thing{protocol}": pickle.dumps([Thing(2), np.zeros(3), {"a": 1}], protocol) for protocol in PROTOCOLS},
    "module": pickle.dumps(nn.Linear(2, 3).bias.detach().numpy()),
}


def joblib_bytes(value: object, compress: int = 0) -> bytes:
    buffer = io.BytesIO()
    joblib.dump(value, buffer, compress=compress)
    return buffer.getvalue()


VALID["joblib"] = joblib_bytes({"a": np.zeros((4, 4)), "b": np.array([1, "x"], object)})
VALID["packed"] = joblib_bytes({"a": np.zeros((4, 4))}, 3)


@settings(max_examples=150)
@given(st.sampled_from(sorted(VALID)), st.data())
def test_damaged_pickles_are_ordinary_errors(name: str, data: st.DataObject) -> None:
    content = bytearray(VALID[name])
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(1, len(content) - 1))]
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(HiveError):
        parse.identify(io.BytesIO(bytes(content)))

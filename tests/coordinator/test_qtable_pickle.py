"""Old pickled tables: every way numpy writes one is read, and nothing that a pickle can hold is ever run."""

from __future__ import annotations

import asyncio
import codecs
import os
import pickle
import pickletools
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import qtable_import
from coordinator.qtable_pickle import MAX_BYTES, array_of
from protos.errors import ErrorCode, SpecError
from qtable.ranks import ranks_of
from qtable.state import SHAPE

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
VALUES = np.random.default_rng(0).normal(size=SHAPE)


def refused(content: bytes) -> str:
    with pytest.raises(SpecError) as caught:
        array_of(content)
    assert caught.value.code is ErrorCode.DATA_UNUSABLE
    assert caught.value.hint
    return caught.value.message


def as_numpy_1(content: bytes) -> bytes:
    """The names that numpy 1 gave; only where the length of a name is not written before it."""
    return content.replace(b"numpy._core.", b"numpy.core.")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", ["<f8", ">f8", "<f4", "<i8", "i1"])
def test_an_array_of_numbers_is_read_in_every_protocol(protocol: int, kind: str) -> None:
    values = (VALUES * 40).astype(kind)
    for array in (values, np.asfortranarray(values)):
        assert np.array_equal(array_of(pickle.dumps(array, protocol)), values.astype(np.float64))
        held = {"q_table": array, "epsilon": 0.1, "episodes": 12, "alpha": np.float64(0.5)}
        assert np.array_equal(array_of(pickle.dumps(held, protocol)), values.astype(np.float64))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3])
def test_what_numpy_1_wrote_is_read_too(protocol: int) -> None:
    assert np.array_equal(array_of(as_numpy_1(pickle.dumps(VALUES, protocol))), VALUES)


class Run:
    """Runs a function as it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def text(name: str) -> bytes:
    return b"\x8c" + bytes([len(name)]) + name.encode()


def hostile(canary: str) -> dict[str, bytes]:
    """Payloads that would write the canary's file, by every way of a pickle to call something."""
    command = f"echo run > {canary}"
    line = command.encode() + b"\n"
    array = pickle.dumps(VALUES, 2)
    found = {
        f"{name} {protocol}": pickle.dumps(value, protocol)
        for protocol in PROTOCOLS
        for name, value in {
            "system": Run(os.system, command),
            "eval": Run(eval, f"open({canary!r}, 'w')"),
            "exec": Run(exec, f"open({canary!r}, 'w')"),
            "open": Run(open, canary, "w"),
            "in a dict": {"q_table": VALUES, "x": Run(os.system, command)},
            "in an array": np.array([Run(os.system, command)], dtype=object),
            "getattr": Run(getattr, os, "system") if protocol > 1 else Run(os.system, command),
            "numpy's own": Run(np.savetxt, canary, [1.0]),
            "decoder": Run(codecs.decode, "6f", "hex"),
            "class": OrderedDict(a=Run(os.system, command)),
        }.items()
        if name != "getattr"
    }
    return found | {
        "GLOBAL and REDUCE": b"cos\nsystem\n(S'" + command.encode() + b"'\ntR.",
        "INST": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nV" + line + b"o.",
        "NEWOBJ": b"\x80\x02cos\nsystem\nV" + line + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + text("os") + text("system") + b"\x93V" + line + b"\x85}\x92.",
        "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93V" + line + b"\x85R.",
        "STACK_GLOBAL of a dotted name": b"\x80\x04" + text("numpy") + text("os.system") + b"\x93V" + line + b"\x85R.",
        "EXT1": b"\x80\x02\x82\x01V" + line + b"\x85R.",
        "EXT4": b"\x80\x02\x84\x01\x00\x00\x00V" + line + b"\x85R.",
        "PERSID": b"Pos.system\n.",
        "BINPERSID": b"\x80\x02Vos.system\nQ.",
        "BUILD of a global": b"cnumpy\nndarray\n}V__setstate__\ncos\nsystem\nsb.",
        "_reconstruct of another class": b"cnumpy.core.multiarray\n_reconstruct\n(cos\nsystem\n(I0\ntS'b'\ntR.",
        "encode into code": b"c_codecs\nencode\n(V" + line + b"Vhex\ntR.",
        "after the end": array + b"cos\nsystem\n(V" + line + b"tR.",
        "two arrays": pickle.dumps({"a": VALUES, "b": VALUES}, 4),
        "out of band": b"\x80\x05\x97.",
        "a mark as value": b"(.",
        "a cycle": b"\x80\x02}q\x00V1\nh\x00s.",
        "nothing on the stack": b"\x80\x02.",
    }


def test_nothing_is_run_whatever_the_pickle_holds(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    loaded = set(sys.modules)
    for name, content in hostile(str(canary)).items():
        assert refused(content), name
        assert not canary.exists(), name
    assert set(sys.modules) - loaded <= {"encodings.hex_codec"}


def test_the_canary_would_have_shown_it(tmp_path: Path) -> None:
    payloads = hostile(str(tmp_path / "canary"))
    for name in ("system 0", "system 5", "GLOBAL and REDUCE", "INST", "OBJ", "STACK_GLOBAL"):
        pickle.loads(payloads[name])  # noqa: S301 - proves that the payload would have fired
        assert (tmp_path / "canary").exists(), name
        (tmp_path / "canary").unlink()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged"),
        (b"hello", "damaged"),
        (b"\x80\x04.", "damaged"),
        (pickle.dumps(VALUES)[:-40], "damaged"),
        (pickle.dumps([1.0, 2.0]), "opcode EMPTY_LIST"),
        (pickle.dumps(3.0), "does not hold one array"),
        (pickle.dumps(np.array(["a", "b"])), "plain numbers"),
        (pickle.dumps(np.zeros(3, dtype=[("a", "f8")])), "it|damaged"),
        (pickle.dumps(np.zeros(3, dtype="complex128")), "plain numbers"),
        (pickle.dumps(VALUES).replace(b"\x87", b"\x86", 1), "damaged"),
        (pickle.dumps(np.ma.masked_array([1.0])), "names numpy.ma"),
        (b"\x80\x02" + b"\x8a\xff" + b"\xff" * 255 + b".", "does not hold one array"),
        (b"I" + b"9" * 100_000 + b"\n.", "damaged"),
        (bytes(MAX_BYTES + 1), "at most"),
    ],
)
def test_what_is_no_table_is_refused_by_name(content: bytes, said: str) -> None:
    import re

    assert re.search(said, refused(content))


def test_a_shape_that_lies_is_refused() -> None:
    lying = pickle.dumps(np.zeros(8), 2).replace(b"K\x08\x85", b"K\x09\x85")
    assert "do not agree" in refused(lying)
    huge = pickle.dumps(np.zeros(1), 2).replace(b"K\x01\x85", b"\x8a\x09" + b"\xff" * 8 + b"\x00\x85")
    assert "do not agree" in refused(huge)


OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
GOOD = [pickle.dumps(VALUES[:1, :1], protocol) for protocol in PROTOCOLS]


def never_anything_else(content: bytes) -> None:
    try:
        assert array_of(content).dtype == np.float64
    except SpecError as error:
        assert error.code is ErrorCode.DATA_UNUSABLE


@settings(max_examples=200)
@given(st.sampled_from(GOOD), st.data())
def test_mutated_tables(good: bytes, data: st.DataObject) -> None:
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    never_anything_else(bytes(content))


@settings(max_examples=200)
@given(st.lists(st.sampled_from([*OPCODES, *(name.encode() + b"\n" for name in ("1", "numpy", "dtype"))]), max_size=40))
def test_random_opcodes(codes: list[bytes]) -> None:
    never_anything_else(b"".join(codes) + b".")


def test_it_is_read_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The real child: a table, what it refuses, and a payload that the child would have to run."""

    async def story() -> None:
        assert await qtable_import.read_pickle(pickle.dumps(VALUES)) == ranks_of(VALUES)
        for content, said in (
            (pickle.dumps(np.zeros((4, 3, 4, 3))), "shape"),
            (pickle.dumps(np.full(SHAPE, np.nan)), "not finite"),
            (pickle.dumps(np.zeros(SHAPE)), "no cell of it"),
            (hostile(str(tmp_path / "canary"))["system 4"], "names posix.system"),
            (b"", "empty"),
            (bytes(MAX_BYTES + 1), "at most"),
        ):
            with pytest.raises(SpecError, match=said) as caught:
                await qtable_import.read_pickle(content)
            assert caught.value.code is ErrorCode.DATA_UNUSABLE
        assert not (tmp_path / "canary").exists()
        with pytest.raises(SpecError, match="could not be read within"):
            await qtable_import.read_pickle(pickle.dumps(VALUES), deadline_s=0.001)

    asyncio.run(story())


@pytest.mark.parametrize(
    "answer", [b"", b"[]", b"{}", b'{"ranks": 5}', b'{"ranks": {"900": [0, 1]}}', b'{"ranks": {"0": [9]}}', b"\xff"]
)
def test_what_the_child_says_is_checked(answer: bytes) -> None:
    with pytest.raises(SpecError, match="stopped without an answer"):
        qtable_import._understood(answer)

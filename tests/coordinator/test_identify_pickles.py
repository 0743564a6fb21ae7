"""The walk of a pickle: every protocol is followed, nothing runs, and no file makes it work or remember without end."""

from __future__ import annotations

import collections
import contextlib
import gzip
import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coordinator.cli.main import cli
from coordinator.identify import parse
from coordinator.identify.pickle_source import LONG_BYTES
from coordinator.identify.pickle_walk import Array, Global, Mapping, Object, walk
from protos.command_line import run
from protos.errors import ErrorCode, HiveError, SpecError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Thing:
    """Module level, so that pickle finds it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.names = ["a", "b"]

    def grow(self) -> None:
        self.size += 1

    class Inner:
        pass


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
    for read in (parse.identify, walk):
        with pytest.raises(SpecError, match=r"names posix\.system, .* nothing was executed") as caught:
            read(io.BytesIO(content))
        assert caught.value.code is ErrorCode.MODEL_UNUSABLE and caught.value.hint
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
def test_every_way_to_call_a_shell_is_refused(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for wrapped in (content, zlib.compress(content), gzip.compress(content)):
        with pytest.raises(SpecError, match=r"names posix\.system"):
            parse.identify(io.BytesIO(wrapped))
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_with_the_name_and_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HIVE_HOME", str(tmp_path / "home"))
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    assert run(cli, "hive", ["models", "identify", str(tmp_path / "model.pkl")]) == 3
    said = capsys.readouterr()
    assert "posix.system" in said.err and "nothing was executed" in said.err and not said.out
    assert not (tmp_path / "executed").exists()


def named(module: str, name: str) -> bytes:
    """A global of that name, dotted too, as protocol 4 writes it."""
    parts = b"".join(b"X" + struct.pack("<I", len(part)) + part for part in (module.encode(), name.encode()))
    return b"\x80\x04" + parts + b"\x93."


@pytest.mark.parametrize(
    "name",
    [
        "os:system", "nt:system", "subprocess:Popen", "builtins:eval", "builtins:__import__", "__builtin__:apply",
        "importlib:import_module", "shutil:rmtree", "socket:create_connection", "webbrowser:open", "types:CodeType",
        "functools:reduce", "pathlib:Path.unlink", "random:_os", "enum:bltns", "operator:methodcaller", "_io:FileIO",
        "typing:get_type_hints", "dataclasses:make_dataclass", "logging.config:listen", "commands:getoutput",
        "torch:load", "torch.hub:load", "torch.serialization:os", "torch.serialization:os.system", "pip:main",
        "numpy.testing._private.utils:runstring", "joblib:load", "mymodel:Net.forward.__globals__", "mymodel:_sys.exit",
    ],
)  # fmt: skip
def test_names_that_reach_a_shell_files_or_code_are_refused(name: str) -> None:
    module, _, attribute = name.partition(":")
    with pytest.raises(SpecError, match="nothing was executed") as caught:
        parse.identify(io.BytesIO(named(module, attribute)))
    assert f"names {module.replace('__builtin__', 'builtins')}.{attribute}," in caught.value.message


@pytest.mark.parametrize(
    "name",
    [
        "mymodel:Net", "mymodel.os_like:Net.Block", "__main__:Net", "torch.nn.modules.linear:Linear", "builtins:object",
        "sklearn.linear_model._base:LinearRegression", "collections:deque", "argparse:Namespace", "re:_compile",
        "pathlib:PosixPath", "pathlib._local:PosixPath", "functools:partial", "typing:Any", "_collections_abc:Mapping",
        "torch.storage:_load_from_bytes", "numpy.random._pickle:__bit_generator_ctor", "math:log1p", "operator:add",
        "zoneinfo:ZoneInfo._unpickle", "__builtin__:unicode", "copy_reg:_reconstructor", "cloudpickle:_make_function",
    ],
)  # fmt: skip
def test_classes_of_the_user_and_plain_data_are_only_named(name: str) -> None:
    module, _, attribute = name.partition(":")
    profile = parse.identify(io.BytesIO(named(module, attribute)))
    assert not profile.trainable and attribute in profile.why_not


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bound_methods_and_nested_classes_are_no_payload(protocol: int) -> None:
    method, inner = walked(pickle.dumps([Thing(1).grow, Thing.Inner], protocol))  # type: ignore[misc]
    assert isinstance(method, Object) and inner == Global(__name__, "Thing.Inner")
    profile = parse.identify(io.BytesIO(pickle.dumps([Thing(1).grow, Thing.Inner()], protocol)))
    assert (profile.framework, profile.format, profile.trainable) == ("unknown", "pickle", False)


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (b"cbuiltins\ngetattr\ncmymodel\nhelper\nU\x0b__globals__\x86R", "attribute __globals__|helper.__globals__"),
        (b"cbuiltins\ngetattr\ncmymodel\nhelper\nU\x02os\x86R", "names the attribute os"),
        (b"cbuiltins\ngetattr\ncpathlib\nPath\nU\x06unlink\x86R", r"names pathlib\.Path\.unlink"),
        (b"cbuiltins\ngetattr\ncpathlib\nPath\nU\x01x\x85RU\x06unlink\x86R)R", "a call of what builtins.getattr gives"),
        (b"cfunctools\npartial\ncmymodel\nhelper\n\x85R)R", "a call of what functools.partial gives"),
    ],
)
def test_what_an_attribute_of_a_value_reaches_is_judged(opcodes: bytes, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        walk(io.BytesIO(call(opcodes)))


def test_text_that_pickle_would_not_follow_is_text() -> None:
    source = b"import os\nimport subprocess\n\ndef build():\n    os.system('true')\n"
    assert parse.identify(io.BytesIO(source)).format == "python_source"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickled_array_is_an_array_and_none_of_torchs(protocol: int) -> None:
    for packed in (False, True):
        content = pickle.dumps(np.zeros((4, 3, 4, 3, 5)), protocol)
        if packed and protocol < 2:
            continue  # joblib writes none of those
        profile = parse.identify(io.BytesIO(zlib.compress(content) if packed else content))
        assert (profile.framework, profile.format) == ("unknown", "joblib" if packed else "pickle")
        assert profile.notes == ("a numpy array, F64[4, 3, 4, 3, 5]",)
        assert "state_dict()" not in profile.why_not


def test_only_a_pickle_that_names_torch_is_pytorchs() -> None:
    profile = parse.identify(io.BytesIO(pickle.dumps({"thing": Thing(1)})))
    assert (profile.framework, profile.format) == ("unknown", "pickle")
    assert f"{__name__}.Thing" in profile.why_not and "state_dict()" not in profile.why_not
    profile = parse.identify(io.BytesIO(pickle.dumps(nn.Linear(2, 3))))
    assert (profile.framework, profile.format) == ("pytorch", "pickled_module")
    profile = parse.identify(io.BytesIO(pickle.dumps({"a": [1, "b"]})))
    assert (profile.framework, profile.format) == ("unknown", "pickle")


def test_registered_code_is_refused_and_persistent_ids_are_named() -> None:
    with pytest.raises(SpecError, match="copyreg extension 7"):
        walk(io.BytesIO(call(b"\x82\x07)R")))
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

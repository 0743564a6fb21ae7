"""A pickle read as data: its opcodes are followed, nothing is imported, called or built.

Owns an abstract machine over the opcodes of every protocol, 0 to 5. `walk(file)` answers with a `Walked`:

    value     what the pickle describes, in plain values and the records of pickle_values
    storages  torch's blocks of numbers it refers to, by key
    foreign   the names it uses outside torch's weights-only allow-list, in order: empty for a file of tensors alone

A class or function outside the allow-list is never looked up. What would be made of it is an `Object`: `type` (a
`Global` of module and name), `arguments`, `state`, `elements`, `items`, and `attributes`, which is its `__dict__`. So
modules and estimators can be looked into, for instance `__torch__.Net` of a TorchScript archive:
`walked.value.type.module`, `walked.value.attributes["weight"]`. numpy's arrays come as `Array`, torch's as `Tensor`.
The raw arrays that joblib puts into the stream are stepped over.

Refused: names that no model needs and an attack does (pickle_harm), code registered by number (EXT), data kept outside
the file (buffers), more than MAX_OPCODES, and whatever does not fit. Parts may be shared and cycles exist: whoever goes
through a value keeps count of what it has seen.
"""

from __future__ import annotations

import codecs
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from coordinator.identify.pickle_calls import array_of, build, call, global_of, storage_of
from coordinator.identify.pickle_harm import harmful
from coordinator.identify.pickle_source import Source, TooMuch
from coordinator.identify.pickle_values import ITEM_BYTES, Array, Blob, DType, Global, Mapping, Object, Storage, Tensor
from coordinator.identify.tensors import unusable

__all__ = [
    "ITEM_BYTES", "Array", "Blob", "DType", "Global", "Mapping", "Object", "Storage", "Tensor", "Walked", "walk",
]  # fmt: skip

MAX_OPCODES = 4_000_000
MAX_FOREIGN = 1_000
_MAX_NESTED = 4  # arrays of objects are pickles in joblib's stream; they hold no such arrays
_DAMAGED = "the file is damaged: write it again with torch.save(model.state_dict(), PATH)"
_JOBLIB = ("joblib.numpy_pickle", "NumpyArrayWrapper")


@dataclass(slots=True)
class Walked:
    value: Any = None
    storages: dict[str, Storage] = field(default_factory=dict)
    foreign: dict[str, Global] = field(default_factory=dict)


def walk(file: BinaryIO) -> Walked:
    """What the next pickle in `file` describes; the file is left behind its STOP. Raises SpecError."""
    walked = Walked()
    try:
        walked.value = _Machine(Source(file), walked).run()
    except TooMuch as error:
        raise unusable(f"the pickle inside holds {error}", _DAMAGED) from None
    except MemoryError:
        raise unusable("the pickle inside asks for too much memory", _DAMAGED) from None
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        OverflowError,
        RecursionError,
        struct.error,
    ) as error:
        detail = str(error)[:80].encode("ascii", "replace").decode()
        raise unusable(f"the pickle inside is damaged or cut short ({detail})", _DAMAGED) from None
    return walked


_MARK = object()


class _Machine:
    """The stack and the memo of an unpickler, over records."""

    def __init__(self, source: Source, walked: Walked, depth: int = 0) -> None:
        self.source = source
        self.walked = walked
        self.depth = depth
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        source = self.source
        for _ in range(MAX_OPCODES):
            code = source.code()
            step = _STEPS.get(code)
            if step is not None:
                step(self)
            elif code == b".":
                return self.stack.pop()
            else:
                raise ValueError(f"opcode {code.hex()}" if code else "no STOP")
        raise unusable(f"the pickle inside has more than {MAX_OPCODES} opcodes", _DAMAGED)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise ValueError("no mark")

    def last(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("stack underflow")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Object):
            target.elements = target.elements or []
            target = target.elements
        if not isinstance(target, list):
            raise ValueError("append to something that is not a list")
        target.extend(values)

    def update(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Object):
            target.items = target.items or Mapping()
            target = target.items
        _update(target, values)

    def named(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is not text")
        found, allowed = global_of(module, name)
        if not allowed:
            self.foreign(found)
        return found

    def foreign(self, found: Global) -> None:
        if len(self.walked.foreign) < MAX_FOREIGN:
            self.walked.foreign.setdefault(str(found), found)

    def inst(self) -> None:
        module, name = self.line(), self.line()
        self.push(call(self.named(module, name), tuple(self.to_mark())))

    def obj(self) -> None:
        function, *arguments = self.to_mark()
        self.push(call(function, tuple(arguments)))

    def line(self) -> str:
        return self.source.readline().decode("utf-8").rstrip("\n")

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push(self.named(module, name))

    def global_lines(self) -> None:
        module = self.line()
        self.push(self.named(module, self.line()))

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.push(call(function, arguments))

    def call_with_keywords(self) -> None:
        keywords, arguments, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.push(call(function, arguments, keywords if isinstance(keywords, Mapping) else None))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        build(target, state)
        if isinstance(target, Object) and (target.type.module, target.type.name) == _JOBLIB:
            self.stack[-1] = self.joblib_array(target.attributes)

    def joblib_array(self, wrapper: dict[Any, Any]) -> Array:
        """The array whose elements follow in the stream, behind a few bytes that align them."""
        dtype, shape = wrapper.get("dtype"), wrapper.get("shape")
        if not isinstance(dtype, DType) or not isinstance(shape, tuple):
            raise ValueError("an array of joblib without type or shape")
        if dtype.holds_objects:
            if self.depth == _MAX_NESTED:
                raise ValueError("arrays of objects in arrays of objects")
            found = _Machine(self.source, self.walked, self.depth + 1).run()
            return found if isinstance(found, Array) else Array(shape, dtype)
        if wrapper.get("numpy_array_alignment_bytes") is not None:
            self.source.skip(self.source.read(1)[0])
        array = array_of(shape, dtype, None)
        self.source.skip(array.bytes)
        return array

    def persistent(self, identity: Any) -> None:
        found = storage_of(identity)
        if isinstance(found, Storage):
            known = self.walked.storages.get(found.key)
            if known is None or known.bytes < found.bytes:
                self.walked.storages[found.key] = found
        elif isinstance(found, Object):
            self.foreign(found.type)
        self.push(found)

    def registered(self, size: int) -> None:
        number = int.from_bytes(self.source.read(size), "little")
        raise harmful(f"code by a number (copyreg extension {number})")


def _update(target: Any, values: list[Any]) -> None:
    if not isinstance(target, Mapping) or len(values) % 2:
        raise ValueError("item of something that is not a mapping")
    for key, value in zip(values[::2], values[1::2], strict=True):
        if isinstance(key, str | int):
            target.items[key] = value


def _mapping(values: list[Any]) -> Mapping:
    made = Mapping()
    _update(made, values)
    return made


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.update([key, value])


def _buffers(machine: _Machine) -> None:
    raise unusable("the pickle keeps its data outside the file, in buffers", "save it again without buffer_callback")


def _plain(opcode: pickletools.OpcodeInfo) -> Callable[[_Machine], None]:
    """A number, short text or short bytes: pickletools knows how to read it."""
    argument = opcode.arg
    assert argument is not None
    reader: Callable[[Any], Any] = argument.reader
    return lambda machine: machine.push(reader(machine.source))


def _long(size: int, *, text: bool = False) -> Callable[[_Machine], None]:
    """Bytes or text behind their length, which takes `size` bytes."""

    def step(machine: _Machine) -> None:
        length = int.from_bytes(machine.source.read(size), "little")
        machine.push(machine.source.text_of(length) if text else machine.source.bytes_of(length))

    return step


def _memoize(number: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        machine.memo[number(machine)] = machine.stack[-1]

    return step


def _recall(number: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.memo[number(machine)])


def _number(size: int) -> Callable[[_Machine], int]:
    return lambda machine: int.from_bytes(machine.source.read(size), "little")


def _decimal(machine: _Machine) -> int:
    return int(machine.line())


_SPECIAL: dict[str, Callable[[_Machine], Any]] = {
    "PROTO": lambda machine: machine.source.read(1),
    "FRAME": lambda machine: machine.source.read(8),
    "MARK": lambda machine: machine.push(_MARK),
    "EMPTY_DICT": lambda machine: machine.push(Mapping()),
    "DICT": lambda machine: machine.push(_mapping(machine.to_mark())),
    "EMPTY_LIST": lambda machine: machine.push([]),
    "EMPTY_SET": lambda machine: machine.push([]),
    "LIST": lambda machine: machine.push(machine.to_mark()),
    "FROZENSET": lambda machine: machine.push(machine.to_mark()),
    "EMPTY_TUPLE": lambda machine: machine.push(()),
    "TUPLE": lambda machine: machine.push(tuple(machine.to_mark())),
    "TUPLE1": lambda machine: machine.last(1),
    "TUPLE2": lambda machine: machine.last(2),
    "TUPLE3": lambda machine: machine.last(3),
    "NONE": lambda machine: machine.push(None),
    "NEWTRUE": lambda machine: machine.push(True),
    "NEWFALSE": lambda machine: machine.push(False),
    "POP": lambda machine: machine.stack.pop(),
    "POP_MARK": lambda machine: machine.to_mark(),
    "DUP": lambda machine: machine.push(machine.stack[-1]),
    "MEMOIZE": _memoize(lambda machine: len(machine.memo)),
    "PUT": _memoize(_decimal),
    "BINPUT": _memoize(_number(1)),
    "LONG_BINPUT": _memoize(_number(4)),
    "GET": _recall(_decimal),
    "BINGET": _recall(_number(1)),
    "LONG_BINGET": _recall(_number(4)),
    "APPEND": lambda machine: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine: machine.extend(machine.to_mark()),
    "ADDITEMS": lambda machine: machine.extend(machine.to_mark()),
    "SETITEM": _set_item,
    "SETITEMS": lambda machine: machine.update(machine.to_mark()),
    "GLOBAL": _Machine.global_lines,
    "STACK_GLOBAL": _Machine.stack_global,
    "INST": _Machine.inst,
    "OBJ": _Machine.obj,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _Machine.call_with_keywords,
    "BUILD": _Machine.build,
    "PERSID": lambda machine: machine.persistent(machine.line()),
    "BINPERSID": lambda machine: machine.persistent(machine.stack.pop()),
    "EXT1": lambda machine: machine.registered(1),
    "EXT2": lambda machine: machine.registered(2),
    "EXT4": lambda machine: machine.registered(4),
    "NEXT_BUFFER": _buffers,
    "READONLY_BUFFER": _buffers,
    "UNICODE": lambda machine: machine.push(
        codecs.raw_unicode_escape_decode(machine.source.readline().rstrip(b"\n"))[0]
    ),
    "BINSTRING": _long(4),
    "BINBYTES": _long(4),
    "BINBYTES8": _long(8),
    "BYTEARRAY8": _long(8),
    "BINUNICODE": _long(4, text=True),
    "BINUNICODE8": _long(8, text=True),
}
_STEPS: dict[bytes, Callable[[_Machine], Any]] = {
    opcode.code.encode("latin-1"): _SPECIAL.get(opcode.name) or _plain(opcode)
    for opcode in pickletools.opcodes
    if opcode.name != "STOP"
}

"""An old q_table.pkl read as data: its opcodes are followed, nothing is imported, called or built.

Owns an abstract machine over pickletools' opcode table that knows one thing: how numpy writes an array of plain numbers
(protocols 0 to 5, numpy 1 and 2). Whatever else a pickle names is refused by that name. What comes out is bytes with a
shape and a type, which numpy reads as numbers. Meant for the confined child (qtable_child.py).
"""

from __future__ import annotations

import math
import pickletools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from protos.errors import ErrorCode, SpecError
from qtable.contribution import Array

MAX_BYTES = 256 * 1024
_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
_ALLOWED = {
    *((module, name) for module in _MODULES[:2] for name in ("_reconstruct", "scalar")),
    *((module, "_frombuffer") for module in _MODULES[2:]),
    ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
}  # fmt: skip
_NUMBERS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1")
_ORDERS = ("<", ">", "=", "|")
_MARK = object()


def refused(why: str) -> SpecError:
    return SpecError(
        f"the table cannot be imported: {why}",
        "give a q_table.pkl that holds one numpy array, or what `hive qtable export` printed",
        code=ErrorCode.DATA_UNUSABLE,
    )


@dataclass(frozen=True, slots=True)
class Global:
    module: str
    name: str


@dataclass(slots=True)
class Type:
    """A numpy.dtype under construction."""

    code: str
    order: str = "="


@dataclass(slots=True)
class Numbers:
    """A numpy.ndarray under construction."""

    shape: tuple[int, ...] = ()
    type: Type = field(default_factory=lambda: Type(""))
    column_major: bool = False
    raw: bytes | None = None


@dataclass(frozen=True, slots=True)
class Scalar:
    """A single number of numpy: of no use here."""


def array_of(content: bytes) -> Array:
    """The one array that a pickle holds, alone or as the one array of a dict. Raises SpecError for everything else."""
    if len(content) > MAX_BYTES:
        raise refused(f"{len(content)} bytes, a q_table.pkl has at most {MAX_BYTES}")
    try:
        value = _run(content)
        arrays = [each for each in value.values() if isinstance(each, Numbers)] if isinstance(value, dict) else [value]
        if len(arrays) != 1 or not isinstance(arrays[0], Numbers):
            raise ValueError("it does not hold one array")
        return _numbers(arrays[0])
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        detail = str(error)[:100].encode("ascii", "replace").decode()
        raise refused(f"not a pickled array, or damaged ({detail})") from None


def _numbers(found: Numbers) -> Array:
    if found.raw is None or found.type.code not in _NUMBERS or found.type.order not in _ORDERS:
        raise ValueError("it is not an array of plain numbers")
    plain = np.dtype(found.type.order + found.type.code)
    if any(type(size) is not int or size < 0 for size in found.shape) or len(found.shape) > 32:
        raise ValueError("its shape is none")
    if math.prod(found.shape) * plain.itemsize != len(found.raw):
        raise ValueError("its shape and its bytes do not agree")
    order: Any = "F" if found.column_major else "C"
    return np.frombuffer(found.raw, plain).reshape(found.shape, order=order).astype(np.float64)


def _run(content: bytes) -> Any:
    machine = _Machine()
    for opcode, argument, position in pickletools.genops(content):
        if opcode.name == "STOP":
            if position is None or position + 1 != len(content):
                raise ValueError("something follows its end")
            return machine.pop()
        machine.step(opcode, argument)
    raise ValueError("no end")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value should be")
        return value

    def _to_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        stack = self.stack
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(self._to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple([self.pop() for _ in range(int(opcode.name[-1]))][::-1]))
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                stack.append(_updated({}, self._to_mark()))
            case "SETITEM":
                value, key = self.pop(), self.pop()
                _updated(stack[-1], [key, value])
            case "SETITEMS":
                values = self._to_mark()
                _updated(stack[-1], values)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "POP":
                stack.pop()
            case "DUP":
                stack.append(stack[-1])
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                module, _, name = argument.partition(" ")
                stack.append(_allowed(module, name))
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                stack.append(_allowed(str(module), str(name)))
            case "REDUCE":
                arguments, function = self.pop(), self.pop()
                stack.append(_called(function, arguments))
            case "BUILD":
                state = self.pop()
                _build(stack[-1], state)
            case "BYTEARRAY8":
                stack.append(bytes(argument))
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT":
                stack.append(argument)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BINUNICODE8":
                stack.append(argument)
            case name:
                raise refused(f"it uses the pickle opcode {name}, which no array needs")


def _allowed(module: str, name: str) -> Global:
    if (module, name) not in _ALLOWED:
        shown = f"{module[:60]}.{name[:60]}".encode("ascii", "replace").decode()
        raise refused(f"it names {shown}: it holds code or an object, not only numbers")
    return Global(module, name)


def _updated(target: Any, values: list[Any]) -> dict[Any, Any]:
    if not isinstance(target, dict) or len(values) % 2:
        raise ValueError("an item of something that is no dict")
    for key, value in zip(values[::2], values[1::2], strict=True):
        if not isinstance(key, str | int):
            raise ValueError("a key that is neither text nor a number")
        target[key] = value
    return target


def _called(function: Any, arguments: Any) -> Any:
    """What an allowed constructor would give. Each is called in the one way in which numpy calls it."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise ValueError("a call of something that is no constructor")
    match function.name:
        case "encode":
            text, encoding = arguments
            if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
                raise ValueError("bytes in another encoding")
            return text.encode("latin-1")
        case "dtype":
            code, *_ = arguments
            return Type(_text(code))
        case "_reconstruct":
            kind, *_ = arguments
            if kind != Global("numpy", "ndarray"):
                raise ValueError("an array of another class")
            return Numbers()
        case "_frombuffer":
            raw, kind, shape, order = arguments
            return Numbers(_shape(shape), _type(kind), order == "F", _raw(raw))
        case "scalar":
            return Scalar()
        case name:
            raise ValueError(f"a call of {name}")


def _build(target: Any, state: Any) -> None:
    match target:
        case Type():
            _, order, subtype, names, fields, *_ = state
            if (subtype, names, fields) != (None, None, None):
                raise ValueError("a type made of others")
            target.order = _text(order)
        case Numbers():
            _, shape, kind, column_major, raw = state
            target.shape, target.type, target.raw = _shape(shape), _type(kind), _raw(raw)
            target.column_major = bool(column_major)
        case _:
            raise ValueError("a state of something that has none")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text expected")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple):
        raise ValueError("a shape is a tuple")
    return value


def _type(value: Any) -> Type:
    if not isinstance(value, Type):
        raise ValueError("a type is a numpy.dtype")
    return value


def _raw(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("latin-1")  # of Python 2
    if not isinstance(value, bytes):
        raise ValueError("it holds objects, not numbers")
    return value

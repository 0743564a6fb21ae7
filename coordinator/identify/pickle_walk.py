"""A pickle read as data: its opcodes are followed, nothing is imported, called or built.

Owns an abstract machine over pickletools' opcode table. It knows the few constructors a state dict needs (allow-list)
and answers with plain values, `Storage` and `Tensor`; any other global stops the walk with `Disallowed`, naming it.
Bounds: opcodes, stack and memo are limited, so a small file cannot ask for much work.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from coordinator.identify.tensors import TensorInfo, check_shape, unusable

MAX_OPCODES = 2_000_000
_DAMAGED = "the file is damaged: write it again with torch.save(model.state_dict(), PATH)"

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128", "UntypedStorage": "U8",
}  # fmt: skip
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "complex64": "C64", "complex128": "C128",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8,
    "C128": 16, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip
_REBUILD = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"}
_PARAMETER = {"_rebuild_parameter", "_rebuild_parameter_with_state"}
_HARMLESS = {
    ("collections", "OrderedDict"), ("collections", "Counter"), ("collections", "defaultdict"),
    ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"),
    ("builtins", "set"), ("builtins", "complex"), ("builtins", "bytearray"), ("builtins", "dict"), ("builtins", "list"),
    ("__builtin__", "set"), ("__builtin__", "complex"), ("__builtin__", "bytearray"), ("_codecs", "encode"),
}  # fmt: skip


class Disallowed(Exception):
    """The pickle names something outside the allow-list: it holds objects with code, not only tensors."""

    def __init__(self, module: str, name: str) -> None:
        super().__init__(f"{module}.{name}")
        self.module = module
        self.name = name


@dataclass(frozen=True, slots=True)
class Global:
    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of numbers kept elsewhere in the file: `dtype` is what its typed storage says."""

    dtype: str
    key: str
    elements: int


@dataclass(frozen=True, slots=True)
class Tensor:
    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def info(self, name: str) -> TensorInfo:
        """As a named tensor; raises SpecError when it reaches beyond its storage or claims more than is stored."""
        shape = check_shape(name, self.shape)
        item = ITEM_BYTES[self.dtype]
        stored = self.storage.elements * ITEM_BYTES[self.storage.dtype]
        count = 1
        for size in shape:
            count *= size
        reach = self.offset + 1 + sum((size - 1) * step for size, step in zip(shape, self.stride, strict=True))
        if count and (reach * item > stored or count * item > stored):
            raise unusable(f"tensor {name[:80]!r} claims more than the {stored} bytes stored for it", _DAMAGED)
        identity = (self.storage.key, self.offset, shape, self.stride)
        return TensorInfo(name, self.dtype, shape, count * item, identity)


@dataclass(slots=True)
class Mapping:
    """A dict or OrderedDict under construction. Keys are kept only when they are text or integers."""

    items: dict[Any, Any] = field(default_factory=dict)


class Opaque:
    """A value that does not matter here."""


_MARK = object()
_OPAQUE = Opaque()


def walk(file: BinaryIO, storages: dict[str, Storage] | None = None) -> Any:
    """The value one pickle describes; the file is left behind its STOP. Raises Disallowed or SpecError.

    Every block of numbers the pickle refers to is noted in `storages` by its key.
    """
    try:
        return _Machine(storages if storages is not None else {}).run(file)
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        OverflowError,
        RecursionError,
    ) as error:
        detail = str(error)[:80].encode("ascii", "replace").decode()
        raise unusable(f"the pickle inside is damaged or cut short ({detail})", _DAMAGED) from None


class _Machine:
    def __init__(self, storages: dict[str, Storage]) -> None:
        self.storages = storages
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: BinaryIO) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count > MAX_OPCODES:
                raise unusable(f"the pickle inside has more than {MAX_OPCODES} opcodes", _DAMAGED)
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode, argument)
        raise ValueError("no STOP")

    def _step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        stack = self.stack
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append(Mapping())
            case "DICT":
                stack.append(_mapping(self._to_mark()))
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "LIST" | "FROZENSET":
                stack.append(self._to_mark())
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(self._to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                self._need(size)
                stack[-size:] = [tuple(stack[-size:])]
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._to_mark()
            case "DUP":
                stack.append(stack[-1])
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "APPEND":
                value = stack.pop()
                _extend(stack[-1], [value])
            case "APPENDS" | "ADDITEMS":
                values = self._to_mark()
                _extend(stack[-1], values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _update(stack[-1], [key, value])
            case "SETITEMS":
                values = self._to_mark()
                _update(stack[-1], values)
            case "GLOBAL":
                module, _, name = argument.partition(" ")
                stack.append(_allowed(module, name))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_allowed(str(module), str(name)))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "BUILD":
                stack.pop()  # the state of an OrderedDict (its _metadata) or of a Parameter: not needed
            case "BINPERSID":
                storage = _storage(stack.pop())
                self.storages[storage.key] = storage
                stack.append(storage)
            case "INST" | "OBJ" | "NEWOBJ_EX" | "EXT1" | "EXT2" | "EXT4" | "PERSID" | "NEXT_BUFFER" | "READONLY_BUFFER":
                raise Disallowed("pickle opcode", opcode.name)
            case _ if opcode.stack_before == [] and len(opcode.stack_after) == 1:
                stack.append(argument)  # numbers, text and bytes
            case _:
                raise ValueError(f"opcode {opcode.name}")

    def _need(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("stack underflow")

    def _to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise ValueError("no mark")


def _allowed(module: str, name: str) -> Any:
    if module == "torch" and name in DTYPES:
        return Global("dtype", DTYPES[name])
    if module in ("torch", "torch.storage", "torch.cuda") and name in STORAGES:
        return Global("storage", STORAGES[name])
    if module == "torch._utils" and name in _REBUILD | _PARAMETER:
        return Global(module, name)
    if (module, name) in _HARMLESS:
        return Global(module, name)
    raise Disallowed(module[:100], name[:100])


def _call(function: Any, arguments: Any) -> Any:
    """What an allowed constructor would give, as far as it matters."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise ValueError("call of something that is not a constructor")
    if function.name in _REBUILD:
        return _tensor(*arguments)
    if function.name in _PARAMETER:
        return arguments[0] if arguments and isinstance(arguments[0], Tensor) else _OPAQUE
    if function.name in ("OrderedDict", "dict", "Counter", "defaultdict"):
        made = Mapping()
        for pair in arguments[0] if arguments and isinstance(arguments[0], list) else []:
            _update(made, list(pair))
        return made
    if function.name in ("set", "list", "Size") and arguments and isinstance(arguments[0], (list, tuple)):
        return arguments[0]
    return _OPAQUE


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Tensor:
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise ValueError("tensor without storage")
    if not (isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)):
        raise ValueError("tensor shape")
    sizes = check_shape("tensor", shape)
    steps = check_shape("tensor", stride)
    dtype = storage.dtype
    for item in rest:
        if isinstance(item, Global) and item.module == "dtype":
            dtype = item.name  # _rebuild_tensor_v3: an untyped storage with the type beside it
    return Tensor(storage, dtype, offset, sizes, steps)


def _storage(identity: Any) -> Storage:
    """("storage", type, key, location, elements[, view]) as torch.save writes it."""
    tag, kind, key, _, elements = identity[:5]
    if tag not in ("storage", b"storage") or not isinstance(kind, Global) or kind.module != "storage":
        raise ValueError("persistent id")
    if type(elements) is not int or not 0 <= elements < 2**56 or not isinstance(key, str) or len(key) > 100:
        raise ValueError("persistent id")
    return Storage(kind.name, key, elements)


def _mapping(values: list[Any]) -> Mapping:
    made = Mapping()
    _update(made, values)
    return made


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif target is not _OPAQUE:
        raise ValueError("append to something that is not a list")


def _update(target: Any, values: list[Any]) -> None:
    if target is _OPAQUE:
        return
    if not isinstance(target, Mapping) or len(values) % 2:
        raise ValueError("item of something that is not a mapping")
    for key, value in zip(values[::2], values[1::2], strict=True):
        if isinstance(key, (str, int)):
            target.items[key] = value

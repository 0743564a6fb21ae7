"""What the constructors that torch and numpy name in pickles would give, told from their arguments; none is called.

Owns the allow-list (what torch's own weights-only reading takes) and numpy's arrays, types and numbers. Anything else
becomes an `Object`, unless pickle_harm refuses it.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from coordinator.identify.pickle_harm import RENAMED, check_attribute, check_call_of, check_name
from coordinator.identify.pickle_values import Array, Blob, DType, Global, Mapping, Object, Storage, Tensor
from coordinator.identify.tensors import check_shape, unusable

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
_REBUILD = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"}
_PARAMETER = {"_rebuild_parameter", "_rebuild_parameter_with_state"}
_MAPPINGS = {"OrderedDict", "Counter", "defaultdict", "dict"}
_SEQUENCES = {"set", "frozenset", "list", "Size"}
_HARMLESS = {
    ("collections", "OrderedDict"), ("collections", "Counter"), ("collections", "defaultdict"),
    ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"),
    ("builtins", "set"), ("builtins", "complex"), ("builtins", "bytearray"), ("builtins", "dict"), ("builtins", "list"),
    ("_codecs", "encode"),
}  # fmt: skip
_ARRAYS = {"numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric"}
_NUMBERS = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "b1": "?",
            "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}  # fmt: skip
_NESTED = Global("torch.storage", "_load_from_bytes")  # a file of torch.save within a plain pickle: not looked into
_DAMAGED = "the file is damaged: write it again"


def global_of(module: str, name: str) -> tuple[Global, bool]:
    """The record of a name, and whether torch's weights-only reading takes it. Raises SpecError for a harmful one."""
    check_name(module, name)
    module = RENAMED.get(module, module)
    if module == "torch" and name in DTYPES:
        return Global("dtype", DTYPES[name]), True
    if module in ("torch", "torch.storage", "torch.cuda") and name in STORAGES:
        return Global("storage", STORAGES[name]), True
    known = Global(module[:200], name[:200])
    if module == "torch._utils" and name in _REBUILD | _PARAMETER:
        return known, True
    return known, (module, name) in _HARMLESS


def call(function: Any, arguments: Any, keywords: Mapping | None = None) -> Any:
    """What REDUCE or NEWOBJ of this would give, as far as it matters. Raises SpecError for a harmful call."""
    if not isinstance(arguments, tuple):
        raise ValueError("call without a tuple of arguments")
    if not isinstance(function, Global):
        if isinstance(function, Object):
            check_call_of(function.type)
        return Object(Global("pickle", "call of a value"), (function, *arguments))
    match function.module:
        case "torch._utils" if function.name in _REBUILD:
            return _tensor(*arguments)
        case "torch._utils" if function.name in _PARAMETER and arguments and isinstance(arguments[0], Tensor):
            found = arguments[0]
            return Tensor(found.storage, found.dtype, found.offset, found.shape, found.stride, learned=True)
        case "torch._tensor" if function.name == "_rebuild_from_type_v2" and len(arguments) == 4:
            return call(arguments[0], arguments[2])  # a subclass of Tensor, or one with attributes of its own
        case "collections" | "builtins" if function.name in _MAPPINGS:
            pairs = arguments[-1] if arguments else None
            return _pairs(pairs if isinstance(pairs, list) else [])
        case "builtins" | "torch" if (
            function.name in _SEQUENCES and arguments and isinstance(arguments[0], list | tuple)
        ):
            return list(arguments[0]) if function.name != "Size" else tuple(arguments[0])
        case "builtins" if function.name == "getattr":
            return _attribute(function, arguments)
        case "_codecs" if function.name == "encode" and arguments:
            return _encoded(arguments[0])
        case "copyreg" if function.name == "_reconstructor" and arguments and isinstance(arguments[0], Global):
            return Object(arguments[0], arguments[1:])
        case "copyreg" if function.name == "__newobj__" and arguments:
            return call(arguments[0], arguments[1:])
        case "numpy" if function.name == "dtype" and arguments:
            return _dtype(arguments[0])
        case module if module in _ARRAYS:
            return _numpy(function, arguments)
        case _:
            return Object(function, arguments, items=keywords)


def build(target: Any, state: Any) -> None:
    """What BUILD would do: only records keep their state."""
    if isinstance(target, Object):
        earlier = target.state
        target.state = state if earlier is None else (earlier, state)
    elif isinstance(target, DType) and isinstance(state, tuple) and len(state) >= 5 and isinstance(state[3], tuple):
        target.fields = tuple(str(name)[:100] for name in state[3] if isinstance(name, str))
    elif isinstance(target, Array) and isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, _, data = state
        made = array_of(shape, dtype, data)
        target.shape, target.dtype, target.objects = made.shape, made.dtype, made.objects


def array_of(shape: Any, dtype: Any, data: Any) -> Array:
    """An array of numpy whose elements are `data`; raises SpecError when they are not as many as the shape says."""
    if not isinstance(shape, tuple):
        raise ValueError("array shape")
    sizes = check_shape("array", shape)
    if not isinstance(dtype, DType):
        return Array(sizes)  # a type of another library
    count = math.prod(sizes)
    if isinstance(data, list):
        if len(data) != count:
            raise unusable(f"an array claims {count} elements and holds {len(data)}", _DAMAGED)
        return Array(sizes, dtype, data)
    stored = data.length if isinstance(data, Blob) else len(data) if isinstance(data, bytes | bytearray | str) else -1
    if stored >= 0 and stored != count * dtype.item_bytes:
        raise unusable(f"an array claims {count * dtype.item_bytes} bytes and holds {stored}", _DAMAGED)
    return Array(sizes, dtype)


def storage_of(identity: Any) -> Any:
    """("storage", type, key, location, elements[, view]) as torch.save writes it, or the class it saved with source."""
    if isinstance(identity, tuple) and len(identity) > 1 and identity[0] == "module":
        return identity[1]
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] not in ("storage", b"storage"):
        return Object(Global("pickle", "persistent_id"), (identity,))
    _, kind, key, _, elements = identity[:5]
    if not isinstance(kind, Global) or kind.module != "storage":
        raise ValueError("persistent id")
    if type(elements) is not int or not 0 <= elements < 2**56 or not isinstance(key, str) or len(key) > 100:
        raise ValueError("persistent id")
    return Storage(kind.name, key, elements)


def _attribute(function: Global, arguments: tuple[Any, ...]) -> Any:
    """A nested class by its name, or a record of the attribute of a value: protocols below 4 write both as getattr."""
    if len(arguments) != 2 or not isinstance(arguments[1], str):
        raise ValueError("getattr without the name of an attribute")
    target, name = arguments
    check_attribute(name)
    if isinstance(target, Global) and target.module not in ("storage", "dtype"):
        return global_of(target.module, f"{target.name}.{name}")[0]
    return Object(function, arguments)


def _pairs(pairs: list[Any]) -> Mapping:
    made = Mapping()
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError("a pair of a mapping")
        if isinstance(pair[0], str | int):
            made.items[pair[0]] = pair[1]
    return made


def _encoded(text: Any) -> bytes | Blob:
    """Bytes that protocols below 3 write as a text of characters below 256."""
    if isinstance(text, Blob):
        return text
    return text.encode("latin-1", "replace") if isinstance(text, str) else b""


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Tensor | Object:
    if isinstance(storage, Object) and storage.type == _NESTED:
        return storage
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


def _dtype(code: Any) -> Any:
    """numpy.dtype("f8"): a kind and a size; U counts characters of four bytes."""
    if isinstance(code, bytes):
        code = code.decode("latin-1")
    plain = code.lstrip("<>|=") if isinstance(code, str) else ""
    if not plain or len(plain) > 12 or not plain[1:].isdecimal() or not plain.isascii():
        return Object(Global("numpy", "dtype"), (code,))
    size = int(plain[1:])
    return DType(plain, size * 4 if plain[0] == "U" else size)


def _numpy(function: Global, arguments: tuple[Any, ...]) -> Any:
    match function.name:
        case "_reconstruct":
            return Array()  # BUILD says what is in it
        case "scalar" if len(arguments) == 2:
            return _number(*arguments)
        case "_frombuffer" if len(arguments) == 4:
            data, dtype, shape, _ = arguments
            return array_of(shape, dtype, data)
        case _:
            return Object(function, arguments)


def _number(dtype: Any, data: Any) -> Any:
    form = _NUMBERS.get(dtype.code) if isinstance(dtype, DType) else None
    if form is None or not isinstance(data, bytes) or struct.calcsize(f"<{form}") != len(data):
        return data
    return struct.unpack(f"<{form}", data)[0]

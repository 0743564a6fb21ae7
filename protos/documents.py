"""Plain values to JSON bytes and back, checked: the only codec for values that cross a process or a disk.

A value is a frozen dataclass (or the pydantic JobSpec). Decoding is strict about types, refuses unknown keys where the
value says so, bounds the size, and raises SpecError naming the wrong path. Never pickle.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from protos import limits
from protos.errors import SpecError

T = TypeVar("T")


_adapters: dict[Any, TypeAdapter[Any]] = {}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def encode(value: object) -> bytes:
    """UTF-8 JSON of a value; non-finite floats are written as null."""
    return _adapter(type(value)).dump_json(value)


def encode_as(kind: Any, value: object) -> bytes:
    """Like `encode`, for a value whose class does not say what is in it: a tuple of leases."""
    return _adapter(kind).dump_json(value)


def plain_as(kind: Any, value: object) -> Any:
    """Like `plain`, for a value whose class does not say what is in it."""
    return _adapter(kind).dump_python(value, mode="json")


def plain(value: object) -> Any:
    """The same value as dicts, lists and scalars, ready for json.dumps."""
    return _adapter(type(value)).dump_python(value, mode="json")


def decode(kind: type[T], document: bytes | str, limit_bytes: int = limits.MAX_DOCUMENT_BYTES) -> T:
    """A value of `kind` from JSON. Raises SpecError with the path of the first wrong field."""
    if len(document) > limit_bytes:
        raise SpecError(f"document of {len(document)} bytes is over the limit of {limit_bytes}", "send a smaller one")
    try:
        value: T = _adapter(kind).validate_json(document)
        return value
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"]) or "document"
        raise SpecError(f"{kind.__name__}: {path}: {first['msg']}", "is the other side a different version?") from None

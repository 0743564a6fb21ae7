"""A small writer of protocol buffers, changed archives, and what is asked of every reader of strangers' bytes."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterable
from typing import BinaryIO

from protos.errors import ErrorCode, SpecError
from protos.model import ModelProfile

Content = int | float | str | bytes


def varint(value: int) -> bytes:
    value &= 0xFFFF_FFFF_FFFF_FFFF
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*found, value))


def field(number: int, value: Content) -> bytes:
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def message(*fields: tuple[int, Content]) -> bytes:
    return b"".join(field(number, value) for number, value in fields)


def packed(values: Iterable[int]) -> bytes:
    return b"".join(map(varint, values))


Reader = Callable[[BinaryIO, int], ModelProfile]


def outcome(read: Reader, content: bytes) -> ModelProfile | SpecError:
    """A profile or the one typed error; whatever else is raised fails the test."""
    try:
        return read(io.BytesIO(content), len(content))
    except SpecError as error:
        assert error.code is ErrorCode.MODEL_UNUSABLE and error.message and error.hint
        return error


def cut_everywhere(read: Reader, content: bytes, step: int = 1) -> list[ModelProfile]:
    """The file cut short at every `step`th byte; the profiles that it still gave."""
    found = (outcome(read, content[:length]) for length in range(1, len(content), step))
    return [each for each in found if isinstance(each, ModelProfile)]


def changed(content: bytes, change: Callable[[str, bytes], bytes | None]) -> bytes:
    """An archive with its members as `change` gives them back; None leaves one out."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            made = change(name, source.read(name))
            if made is not None:
                archive.writestr(name, made)
    return target.getvalue()

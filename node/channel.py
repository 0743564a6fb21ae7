"""Frames between a daemon and one worker, and packets between a daemon and its warm parent. JSON and raw bytes only.

A frame is two big-endian 32-bit lengths, a JSON object (the header) and raw bytes (the body). A packet is one JSON
object in one message of a SOCK_SEQPACKET socket, with file descriptors beside it where needed. Both ends enforce the
bounds: what is over them is refused before it is read. The other end of a frame may be a stranger's code: nothing is
trusted but the framing.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from protos import limits
from protos.errors import SpecError

MAX_HEADER_BYTES = 1024 * 1024
MAX_BODY_BYTES = limits.MAX_MESSAGE_BYTES
MAX_PACKET_BYTES = 64 * 1024
_LENGTHS = struct.Struct(">II")


@dataclass(frozen=True, slots=True)
class Frame:
    header: Mapping[str, Any]
    body: bytes = b""


def pack(frame: Frame) -> bytes:
    """The bytes of a frame. Raises SpecError when it is over the bounds."""
    header = json.dumps(frame.header, separators=(",", ":")).encode()
    _check_lengths(len(header), len(frame.body))
    return _LENGTHS.pack(len(header), len(frame.body)) + header + frame.body


def _check_lengths(header_bytes: int, body_bytes: int) -> None:
    if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
        raise SpecError(
            f"a frame of {header_bytes} + {body_bytes} bytes is over {MAX_HEADER_BYTES} + {MAX_BODY_BYTES}",
            "send less at once",
        )


def _header(content: bytes) -> Mapping[str, Any]:
    try:
        header = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"a frame's header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise SpecError("a frame's header is not a JSON object")
    return header


async def read_frame(reader: asyncio.StreamReader) -> Frame | None:
    """The next frame, None at the end of the stream. Raises SpecError for what is no frame."""
    try:
        header_bytes, body_bytes = _LENGTHS.unpack(await reader.readexactly(_LENGTHS.size))
        _check_lengths(header_bytes, body_bytes)
        header = _header(await reader.readexactly(header_bytes))
        return Frame(header, await reader.readexactly(body_bytes))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def receive_frame(connection: socket.socket) -> Frame | None:
    """The same for a blocking socket."""
    lengths = _receive_exactly(connection, _LENGTHS.size)
    if lengths is None:
        return None
    header_bytes, body_bytes = _LENGTHS.unpack(lengths)
    _check_lengths(header_bytes, body_bytes)
    header = _receive_exactly(connection, header_bytes)
    body = _receive_exactly(connection, body_bytes)
    return None if header is None or body is None else Frame(_header(header), body)


def _receive_exactly(connection: socket.socket, count: int) -> bytes | None:
    """None when the other end closed first."""
    content = bytearray(count)
    view = memoryview(content)
    while view:
        try:
            received = connection.recv_into(view)
        except ConnectionError:
            return None
        if not received:
            return None
        view = view[received:]
    return bytes(content)


def send_packet(control: socket.socket, packet: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
    """One JSON object, at once and whole. Raises OSError when the other end is gone."""
    content = json.dumps(packet, separators=(",", ":")).encode()
    if len(content) > MAX_PACKET_BYTES:
        raise SpecError(f"a control packet of {len(content)} bytes is over the limit of {MAX_PACKET_BYTES}")
    socket.send_fds(control, [content], list(descriptors))


def receive_packet(control: socket.socket, descriptors: int = 0) -> tuple[Mapping[str, Any], list[int]] | None:
    """One JSON object and the file descriptors beside it, None when the other end is gone."""
    try:
        content, received, _, _ = socket.recv_fds(control, MAX_PACKET_BYTES, descriptors)
    except ConnectionError:
        return None
    return (_header(content), received) if content else None

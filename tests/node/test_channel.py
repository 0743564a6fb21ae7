"""Frames survive any cutting, and what is no frame is refused before it is read."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as some

from node import channel
from node.channel import Frame
from node.log_lines import LineSplitter
from node.worker_environment import clean_environment
from protos.errors import SpecError

headers = some.dictionaries(some.text(max_size=8), some.integers() | some.text(max_size=20) | some.none(), max_size=5)
frames = some.builds(Frame, headers, some.binary(max_size=200))


async def _read_all(content: bytes, cut: int) -> list[Frame]:
    reader = asyncio.StreamReader()
    for at in range(0, len(content), cut):
        reader.feed_data(content[at : at + cut])
    reader.feed_eof()
    found = []
    while (frame := await channel.read_frame(reader)) is not None:
        found.append(frame)
    return found


@given(some.lists(frames, max_size=4), some.integers(1, 50))
def test_frames_come_out_as_they_went_in(sent: list[Frame], cut: int) -> None:
    assert asyncio.run(_read_all(b"".join(channel.pack(frame) for frame in sent), cut)) == sent


@given(some.lists(frames, max_size=3))
def test_both_ends_read_the_same(sent: list[Frame]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        content = b"".join(channel.pack(frame) for frame in sent)
        writer = threading.Thread(target=lambda: (theirs.sendall(content), theirs.shutdown(socket.SHUT_WR)))
        writer.start()
        found = []
        while (frame := channel.receive_frame(ours)) is not None:
            found.append(frame)
        writer.join()
    assert found == sent


@given(some.binary(max_size=300))
def test_any_bytes_give_frames_or_an_end_or_a_refusal(content: bytes) -> None:
    try:
        asyncio.run(_read_all(content, 64))
    except SpecError as error:
        assert error.message


def test_a_length_over_the_bound_is_refused_before_reading() -> None:
    with pytest.raises(SpecError, match="over"):
        asyncio.run(_read_all(struct.pack(">II", channel.MAX_HEADER_BYTES + 1, 0), 8))
    with pytest.raises(SpecError, match="over"):
        channel.pack(Frame({}, b"x" * (channel.MAX_BODY_BYTES + 1)))


def test_a_header_must_be_a_json_object() -> None:
    for header in (b"[]", b"{", b"\xff\xff", b"[" * 5000):
        with pytest.raises(SpecError):
            asyncio.run(_read_all(struct.pack(">II", len(header), 0) + header, 4096))


@given(
    some.lists(some.text(some.characters(exclude_characters="\r\n", codec="utf-8"), max_size=30)), some.integers(1, 9)
)
def test_lines_come_out_as_printed_however_they_are_cut(lines: list[str], cut: int) -> None:
    content = "".join(line + "\n" for line in lines).encode()
    splitter = LineSplitter(1000)
    found = [line for at in range(0, len(content), cut) for line in splitter.feed(content[at : at + cut])]
    assert found + splitter.finish() == lines


def test_a_rewritten_line_keeps_its_last_state_and_windows_ends_are_ends() -> None:
    assert LineSplitter().feed(b"1 %\r2 %\r3 %\nplain\r\n") == ["3 %", "plain"]


@given(some.binary(max_size=500), some.integers(1, 40))
def test_no_line_is_longer_than_the_bound(content: bytes, cut: int) -> None:
    splitter = LineSplitter(16)
    for at in range(0, len(content), cut):
        for line in splitter.feed(content[at : at + cut]):
            assert len(line.partition(" ... (")[0]) <= 16


def test_only_listed_variables_pass_to_workers() -> None:
    source = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "HIVE_TOKEN": "x",
        "HF_TOKEN": "x",
        "https_proxy": "u:p@h",
        "SSH_AUTH_SOCK": "s",
    }
    clean = clean_environment(source, 0.25)
    assert clean["PATH"] == "/bin" and clean["LC_ALL"] == "C" and clean["OMP_NUM_THREADS"] == "1"
    assert not {"HIVE_TOKEN", "HF_TOKEN", "https_proxy", "SSH_AUTH_SOCK"} & clean.keys()
    assert clean_environment(source, 2.5)["OMP_NUM_THREADS"] == "3"

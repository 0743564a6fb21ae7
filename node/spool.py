"""Messages that must not be lost: numbered, on disk, sent again until the coordinator has made them durable.

One append-only file per HIVE_HOME (length-prefixed protobuf). Reports and checkpoints are fsynced before they are sent;
progress and output survive a kill of the daemon, not of the machine. The numbering goes on across restarts, so the
coordinator recognises what it has already accepted. While the coordinator is away output is bounded, results are not.
"""

from __future__ import annotations

import errno
import os
import struct
from collections import deque
from pathlib import Path

from google.protobuf.message import DecodeError

from protos.gen import membership_pb2 as pb
from protos.ids import new_spool_id
from protos.log import Log
from protos.reserve import Reserve

log = Log("hive.node.spool")

_LENGTH = struct.Struct("<I")
_COMPACT_BYTES = 8 * 1024 * 1024
MAX_WAITING_LOG_BYTES = 32 * 1024 * 1024
_SYNCED = ("report", "checkpoint_json")
_RESERVE_BYTES = 1024 * 1024


class Spool:
    """`append` numbers and stores a message; `acknowledge` forgets all up to a number."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = folder / "spool"
        name = folder / "spool.id"
        if name.exists() and name.read_text().strip():
            self.spool_id = name.read_text().strip()
        else:
            self.spool_id = new_spool_id()
            self._path.unlink(missing_ok=True)  # numbered under a name that is gone: it cannot be sent any more
            _write_whole(name, (self.spool_id + "\n").encode(), sync=True)
        self._waiting: deque[pb.Durable] = deque()
        self._log_bytes = 0
        self._seq = 0
        for message in self._load():
            self._seq = max(self._seq, message.seq)
            if message.WhichOneof("body") is not None:  # without a body: the last number used before a compaction
                self._waiting.append(message)
                self._log_bytes += _output_bytes(message)
        self._file = self._path.open("ab")
        self._reserve = Reserve(folder / "reserve", _RESERVE_BYTES)
        self._reserve.take()

    def _load(self) -> list[pb.Durable]:
        """All whole records; a torn tail (killed while writing, or the machine died) is cut off."""
        if not self._path.exists():
            return []
        content = self._path.read_bytes()
        messages: list[pb.Durable] = []
        position = 0
        while position + _LENGTH.size <= len(content):
            (length,) = _LENGTH.unpack_from(content, position)
            end = position + _LENGTH.size + length
            if end > len(content):
                break
            try:
                messages.append(pb.Durable.FromString(content[position + _LENGTH.size : end]))
            except DecodeError:
                log.warning("the spool is damaged: what follows is given up", at=position, bytes=len(content))
                break
            position = end
        if position < len(content):
            os.truncate(self._path, position)
        return messages

    def append(self, message: pb.Durable) -> pb.Durable | None:
        """The message with its number, or None when it is output and too much of it waits already.

        Raises OSError when the disk does not take output or progress. How a job ended is said in any case: first the
        reserve is given up for it, and without one it waits in memory only, lost if this daemon dies before it is sent.
        """
        kind = message.WhichOneof("body")
        message.seq = self._seq + 1
        size = _output_bytes(message)
        if size and self._log_bytes + size > MAX_WAITING_LOG_BYTES:
            return None
        try:
            self._write(message, sync=kind in _SYNCED)
        except OSError as error:
            if kind not in _SYNCED:
                raise
            self._reserve.release()  # kept back for this: how a job ended must not be lost for want of a few bytes
            try:
                self._write(message, sync=True)
            except OSError:
                log.warning("not on disk until it is sent", job=message.job_id, reason=str(error))
        self._log_bytes += size
        self._seq += 1
        self._waiting.append(message)
        return message

    def acknowledge(self, seq: int) -> list[pb.Durable]:
        """Forget everything up to `seq`; returns what was forgotten, in order.

        A machine that lost its power may have lost numbers it had used: what the coordinator has counts.
        """
        self._seq = max(self._seq, seq)
        done: list[pb.Durable] = []
        while self._waiting and self._waiting[0].seq <= seq:
            message = self._waiting.popleft()
            self._log_bytes -= _output_bytes(message)
            done.append(message)
        if done and (not self._waiting or self._path.stat().st_size > _COMPACT_BYTES):
            try:
                self._compact()
            except OSError as error:  # a full disk: the longer file serves until there is room for the shorter one
                log.warning("the spool was not compacted", reason=str(error))
            self._reserve.take()
        return done

    def waiting(self, after_seq: int = 0) -> list[pb.Durable]:
        return [message for message in self._waiting if message.seq > after_seq]

    def reports(self) -> list[pb.Durable]:
        """Final reports that wait for their acknowledgement, for example of an earlier life of this daemon."""
        return [m for m in self._waiting if m.WhichOneof("body") == "report" and m.report.outcome_json]

    def close(self) -> None:
        self._file.close()

    def _write(self, message: pb.Durable, sync: bool) -> None:
        """The whole record or nothing of it. Raises OSError."""
        content = message.SerializeToString()
        before = os.fstat(self._file.fileno()).st_size
        try:
            os.writev(self._file.fileno(), [_LENGTH.pack(len(content)), content])
            if os.fstat(self._file.fileno()).st_size != before + _LENGTH.size + len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            if sync:
                os.fsync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), before)
            raise

    def _compact(self) -> None:
        """Rewrite the file with what still waits and the number reached. Raises OSError; then all is as it was."""
        contents = [message.SerializeToString() for message in (pb.Durable(seq=self._seq), *self._waiting)]
        whole = b"".join(_LENGTH.pack(len(content)) + content for content in contents)
        new = _write_beside(self._path, whole, sync=bool(self._waiting))
        file = new.open("ab")
        new.replace(self._path)
        self._file.close()
        self._file = file


def _output_bytes(message: pb.Durable) -> int:
    """What counts against MAX_WAITING_LOG_BYTES: output only, results never."""
    return message.ByteSize() if message.WhichOneof("body") == "logs" else 0


def _write_whole(path: Path, content: bytes, sync: bool) -> None:
    """The file is as before or as given, whatever is killed; `sync` also when the machine dies."""
    _write_beside(path, content, sync).replace(path)


def _write_beside(path: Path, content: bytes, sync: bool) -> Path:
    """A file of this content, to be put in the place of `path`. Raises OSError and leaves nothing."""
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary

"""The owner's remote control of a running daemon: one JSON line asked and one answered over a unix socket, mode 0600.

Owns where the socket lies and both of its ends. Refuses: lines over 64 KiB, commands outside COMMANDS, a second daemon
in the same HIVE_HOME. What a command does is the handler's: `async def handle(command, arguments) -> document`.
Invariants: every question is answered (a HiveError as {"error": ...}), every wait has a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from protos.errors import Conflict, DeadlineExceeded, ErrorCode, HiveError, NotFound, from_document

COMMANDS = ("status", "join", "pause", "resume", "drain", "leave", "doctor", "bench")
Handler = Callable[[str, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]

_MAX_LINE_BYTES = 64 * 1024
_MAX_SOCKET_PATH_BYTES = 100  # sun_path holds 108 with its terminator
_ASK_DEADLINE_S = 10.0
_READ_DEADLINE_S = 5.0


def socket_path(home: Path) -> Path:
    """HIVE_HOME/node/control.sock, or a short private path derived from it when that is too long for a socket."""
    natural = home / "node" / "control.sock"
    if len(os.fsencode(natural)) <= _MAX_SOCKET_PATH_BYTES:
        return natural
    key = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"hive-{os.getuid()}" / f"{key}.sock"


@contextlib.asynccontextmanager
async def serve(home: Path, handle: Handler) -> AsyncIterator[Path]:
    """Answer commands while the body runs. Raises Conflict when another daemon has this HIVE_HOME."""
    path = socket_path(home)
    _private_folder(path.parent)
    lock = (path.parent / (path.name + ".lock")).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise Conflict(
            f"a node daemon already runs in {home}",
            "stop it with hive-node leave, or give this one its own folder with --home",
        ) from None
    try:
        path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            server = await asyncio.start_unix_server(_answerer(handle), path, limit=_MAX_LINE_BYTES)
        finally:
            os.umask(before)
        try:
            yield path
        finally:
            server.close()
            path.unlink(missing_ok=True)
    finally:
        lock.close()


def _private_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise HiveError(
            f"{folder} belongs to another user",
            "remove it or give another folder with --home",
            code=ErrorCode.FORBIDDEN,
        )
    if stat.S_IMODE(found.st_mode) & 0o022:
        folder.chmod(0o700)


def _answerer(
    handle: Handler,
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            document = await _one_answer(reader, handle)
            writer.write(json.dumps(document).encode() + b"\n")
            async with asyncio.timeout(_READ_DEADLINE_S):
                await writer.drain()
        except (TimeoutError, ConnectionError):
            pass  # the asker is gone; the command was carried out all the same
        finally:
            writer.close()

    return answer


async def _one_answer(reader: asyncio.StreamReader, handle: Handler) -> Mapping[str, Any]:
    try:
        async with asyncio.timeout(_READ_DEADLINE_S):
            line = await reader.readline()
        question = json.loads(line)
        command, arguments = question["command"], question.get("arguments", {})
        if command not in COMMANDS or not isinstance(arguments, dict):
            raise HiveError(f"unknown command {command!r}", f"known: {', '.join(COMMANDS)}", code=ErrorCode.USAGE)
    except HiveError as error:
        return {"error": error.document()}
    except (ValueError, KeyError, TypeError):
        return {"error": HiveError("not a question", "", code=ErrorCode.USAGE).document()}
    try:
        return {"answer": dict(await handle(command, arguments))}
    except HiveError as error:
        return {"error": error.document()}
    except Exception as error:  # the asker must see that it failed; the daemon goes on
        return {"error": HiveError(f"{command} failed: {type(error).__name__}: {error}", "see the log").document()}


def ask(
    home: Path,
    command: str,
    arguments: Mapping[str, Any] | None = None,
    deadline_s: float = _ASK_DEADLINE_S,
) -> dict[str, Any]:
    """The daemon's answer. Raises NotFound when none runs here, DeadlineExceeded, or the error it answered."""
    question = json.dumps({"command": command, "arguments": dict(arguments or {})}).encode() + b"\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(deadline_s)
        try:
            connection.connect(str(socket_path(home)))
            connection.sendall(question)
            with connection.makefile("rb") as file:
                line = file.readline()
        except (FileNotFoundError, ConnectionError):
            raise NotFound(
                f"no daemon is running here ({home})",
                "start it with hive-node start, or name its folder with --home or HIVE_HOME",
            ) from None
        except PermissionError:
            raise HiveError(
                f"the daemon in {home} belongs to another user", "ask as that user", code=ErrorCode.FORBIDDEN
            ) from None
        except TimeoutError:
            raise DeadlineExceeded(
                f"the daemon did not answer {command} within {deadline_s:.0f} s", "look at its log; try again"
            ) from None
    try:
        document = json.loads(line)
    except ValueError:
        raise NotFound(
            "the daemon ended before it answered", "look at its log, start it with hive-node start"
        ) from None
    if "error" in document:
        raise from_document(document["error"])
    answer: dict[str, Any] = document["answer"]
    return answer

"""Starts a process that is to read a stranger's bytes and can do nothing else, and takes its one answer.

The child gives up its rights itself, before it reads (coordinator/identify/child.py). Invariants: it gets the handed
descriptors, an empty environment and a deadline; nothing that it started outlives it; what it says is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

# -I ignores the caller's path and variables; the one folder it needs is handed over, installed or not
_START = "import sys; sys.path.insert(0, sys.argv[1]); from {module} import main; main()"
_NO_VARIABLES: Mapping[str, str] = {}


async def answer_of(
    module: str,
    *arguments: str,
    stdin: int | bytes,
    most_bytes: int,
    deadline_s: float,
    descriptors: tuple[int, ...] = (),
    variables: Mapping[str, str] = _NO_VARIABLES,
) -> bytes:
    """What `main` of `module` writes to its stdout; nothing when it died or wrote more than `most_bytes`. `stdin`: a
    descriptor, or what it reads. Raises TimeoutError."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-c", _START.format(module=module), str(Path(__file__).parents[1]), *arguments,
        stdin=stdin if isinstance(stdin, int) else asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, pass_fds=descriptors,
        start_new_session=True, close_fds=True, env={"LANG": "C.UTF-8", **variables}, cwd="/",
    )  # fmt: skip
    try:
        async with asyncio.timeout(deadline_s):
            if isinstance(stdin, bytes) and process.stdin is not None:
                with contextlib.suppress(ConnectionError):  # it died: its answer is none
                    process.stdin.write(stdin)
                    await process.stdin.drain()
                process.stdin.close()
            return await _read(process, most_bytes)
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kills it and, by the session that it leads, whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()  # only while it is not waited for: then its number may be another's
    await process.wait()
    if not Path(f"/proc/{process.pid}").exists():  # another's; while some of its session live it is given to nobody
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


async def _read(process: asyncio.subprocess.Process, most_bytes: int) -> bytes:
    assert process.stdout is not None
    answer = bytearray()
    while block := await process.stdout.read(65536):
        answer += block
        if len(answer) > most_bytes:
            return b""
    await process.wait()  # so that it is not killed where it ends by itself
    return bytes(answer)

"""What somebody wants to teach the table: another coordinator's export or an old q_table.pkl, told apart by the bytes.

Owns the bounds, the refusals, and the confined child that reads pickles. A checksum says that a document is whole, not
who wrote it: numbers that rewards cannot give are refused, and only an administrator imports.
"""

from __future__ import annotations

import json
from typing import Any

from coordinator.confined import answer_of
from coordinator.qtable_pickle import MAX_BYTES as MAX_PICKLE_BYTES
from coordinator.qtable_pickle import refused
from protos import limits
from protos.errors import HiveError, from_document
from qtable import ranks, snapshot
from qtable.ranks import Ranks
from qtable.table import QTable

MAX_DOCUMENT_BYTES = limits.MAX_MESSAGE_BYTES - 64 * 1024
DEADLINE_S = 30.0
_MAX_ANSWER_BYTES = 256 * 1024


def is_document(content: bytes) -> bool:
    return content.lstrip()[:1] == b"{"


def read_document(content: bytes) -> QTable:
    """Another coordinator's table. Raises SpecError (DATA_UNUSABLE) with the first thing that is wrong."""
    if len(content) > MAX_DOCUMENT_BYTES:
        raise refused(f"{len(content)} bytes, an export has at most {MAX_DOCUMENT_BYTES}")
    try:
        table, _ = snapshot.parse(content)
        table.check_origin()
    except ValueError as error:
        raise refused(str(error)[:200]) from None
    return table


async def read_pickle(content: bytes, *, deadline_s: float = DEADLINE_S) -> Ranks:
    """The order of the actions in an old table, read in a process that can do nothing else. Raises SpecError
    (DATA_UNUSABLE) for a file that is no such table, whatever it was made to do."""
    if not content:
        raise refused("the file is empty")
    if len(content) > MAX_PICKLE_BYTES:
        raise refused(f"{len(content)} bytes, a q_table.pkl has at most {MAX_PICKLE_BYTES}")
    try:
        answer = await answer_of(
            "coordinator.qtable_child",
            stdin=content,
            most_bytes=_MAX_ANSWER_BYTES,
            deadline_s=deadline_s,
            variables={"OPENBLAS_NUM_THREADS": "1"},
        )
    except TimeoutError:
        raise refused(f"it could not be read within {deadline_s:g} s") from None
    return _understood(answer)


def _understood(answer: bytes) -> Ranks:
    """The child read hostile bytes: what it says is checked like any other document."""
    said: HiveError | None = None
    try:
        document: dict[str, Any] = json.loads(answer)
        if (error := document.get("error")) is not None:
            said = from_document({key: str(value) for key, value in error.items()})
        else:
            found = {int(cell): list(row) for cell, row in document["ranks"].items()}
            ranks.contribution(found)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise refused("its reader stopped without an answer") from None
    if said is not None:
        raise said
    if not found:
        raise refused("no cell of it puts one action before another")
    return found

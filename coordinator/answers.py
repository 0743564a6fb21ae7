"""Answers that fit into one message, however much there would be to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coordinator import views
from protos import limits
from protos.errors import Exhausted
from protos.gen import jobs_pb2

MAX_ANSWER_BYTES = limits.MAX_MESSAGE_BYTES - 64 * 1024


def answer(**content: Any) -> jobs_pb2.Document:
    document = views.document(**content)
    if len(document) > MAX_ANSWER_BYTES:
        raise Exhausted(f"the answer has {len(document)} bytes, over the limit of a message", "ask for less at once")
    return jobs_pb2.Document(json=document)


def fitting(name: str, rows: Sequence[Any], **content: Any) -> dict[str, Any]:
    """The content with as many rows, from the first on, as one message holds; `more` says that some were left out."""
    room = MAX_ANSWER_BYTES - len(views.document(**content))
    for count, row in enumerate(rows):
        room -= len(views.plain_json(row)) + 2
        if room < 0:
            return {name: list(rows[:count]), "more": True, **content}
    return {name: list(rows), **content}


def whole_steps(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """As many records as one message holds, the last step whole; `more` says to ask again after the last step."""
    found = {"more": False, **fitting("metrics", lines)}
    kept = found["metrics"]
    if found["more"]:
        following = lines[len(kept)]["step"]
        while kept and kept[-1]["step"] == following:
            kept.pop()
    return found

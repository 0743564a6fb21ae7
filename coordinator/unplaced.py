"""What is kept of a job for which there is no plan: every strategy as it was considered, with its reasons.

While the job waits, coordinator/placement.py has it; a job that ends without a plan leaves it in a `unplaced` event.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from protos import documents
from protos.errors import NoPlacement
from protos.plan import Candidate

UNPLACED = "unplaced"


class NothingFits(NoPlacement):
    """With `candidates`, which the message holds in words."""

    def __init__(self, message: str, hint: str, candidates: tuple[Candidate, ...]) -> None:
        super().__init__(message, hint)
        self.candidates = candidates


def considered(error: NoPlacement) -> tuple[Candidate, ...]:
    """Empty where nothing was asked: there were no nodes."""
    return error.candidates if isinstance(error, NothingFits) else ()


def payload(candidates: Iterable[Candidate]) -> dict[str, Any]:
    """Of an UNPLACED event, and as `candidates` of coordinator/views.py takes it."""
    return {"candidates": [documents.plain(each) for each in candidates]}

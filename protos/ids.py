"""Identifiers that cross rooms: distinct types, one alphabet, made in one place.

Random ids come from `secrets`, so an id is never guessable; a fence is a number that only grows within a job.
"""

from __future__ import annotations

import secrets
from typing import NewType

NodeId = NewType("NodeId", str)
JobId = NewType("JobId", str)
PlanId = NewType("PlanId", str)
Fence = NewType("Fence", int)
Digest = NewType("Digest", str)

_ALPHABET = "abcdefghjkmnpqrstvwxyz23456789"  # no i, l, o, u, 0, 1: read aloud without mistakes
_LENGTH = 8


def _random(prefix: str) -> str:
    return prefix + "-" + "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))


def new_job_id() -> JobId:
    return JobId(_random("j"))


def new_plan_id() -> PlanId:
    return PlanId(_random("p"))


def new_token_id() -> str:
    """Names a join token in lists; not its secret."""
    return _random("t")


def new_spool_id() -> str:
    """One per start of a node daemon: names the numbered series of messages it must have acknowledged."""
    return _random("s")

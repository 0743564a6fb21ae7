"""The error table is total, errors survive the wire, ids are what they promise, and versions name who must upgrade."""

from __future__ import annotations

import re

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import errors, ids, version
from protos.errors import TABLE, Blame, ErrorCode, HiveError, from_document
from protos.version import negotiate

# those that travel; a room may have its own, which arrive elsewhere as what they extend
SUBCLASSES = [kind for kind in HiveError.__subclasses__() if kind.__module__ == "protos.errors"]
CLASSES = [HiveError, *SUBCLASSES]


@pytest.mark.parametrize("code", ErrorCode)
def test_every_code_has_its_surface(code: ErrorCode) -> None:
    surface = TABLE[code]
    assert hasattr(grpc.StatusCode, surface.grpc)
    assert 400 <= surface.http < 600
    assert surface.exit_code in {1, 2, 3, 4, 5, 6, 7, 8, 100, 103}


def test_the_table_has_no_code_too_many() -> None:
    assert set(TABLE) == set(ErrorCode)


def test_nothing_that_would_fail_again_is_said_to_be_worth_a_retry() -> None:
    retryable = {code for code in ErrorCode if TABLE[code].retryable}
    assert retryable == {ErrorCode.UNREACHABLE, ErrorCode.TIMEOUT, ErrorCode.EXHAUSTED, ErrorCode.CORRUPT}


@pytest.mark.parametrize("code", ErrorCode)
def test_an_error_is_the_same_on_the_other_side(code: ErrorCode) -> None:
    made = from_document({"code": code.value, "message": "what happened", "hint": "what to do"})
    again = from_document(made.document())
    assert (type(again), again.code, again.message, again.hint) == (type(made), code, "what happened", "what to do")
    assert again.exit_code == TABLE[code].exit_code


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_says_what_and_what_next(kind: type[HiveError]) -> None:
    error = kind("what happened", "what to do", blame=Blame.NODE)
    assert str(error) == "what happened"
    assert error.document() == {"code": kind.default_code.value, "message": "what happened", "hint": "what to do"}
    assert error.blame is Blame.NODE
    assert isinstance(from_document(error.document()), kind)


@given(document=st.dictionaries(st.text(max_size=8), st.text(max_size=20)))
def test_any_document_becomes_an_error(document: dict[str, str]) -> None:
    assert isinstance(from_document(document), HiveError)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    named = set(re.findall(r"[├└]─ (\w+)", errors.__doc__))
    assert named == {kind.__name__ for kind in SUBCLASSES}


# ---- versions


def test_the_highest_version_both_speak_is_used() -> None:
    assert negotiate("node lab-3", 3, 1, ours=5, our_minimum=2).protocol == 3
    assert negotiate("node lab-3", 7, 4, ours=5, our_minimum=2).protocol == 5
    assert negotiate("node lab-3", version.PROTOCOL, version.MINIMUM_PROTOCOL).protocol == version.PROTOCOL


def test_an_old_node_is_told_to_upgrade() -> None:
    agreement = negotiate("node lab-3", 1, 1, ours=5, our_minimum=2)
    assert agreement.protocol is None
    assert agreement.reason == (
        "node lab-3 speaks protocol 1, this coordinator needs at least 2: upgrade hive on node lab-3"
    )


def test_an_old_coordinator_is_told_to_upgrade() -> None:
    agreement = negotiate("the CLI", 7, 6, ours=5, our_minimum=2)
    assert agreement.protocol is None
    assert agreement.reason == (
        "the CLI needs protocol 6 or newer, this coordinator speaks 5: upgrade hive on the coordinator"
    )


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_an_agreement_is_what_both_can_speak(peer: int, peer_minimum: int, ours: int, our_minimum: int) -> None:
    peer, ours = max(peer, peer_minimum), max(ours, our_minimum)
    agreement = negotiate("node x", peer, peer_minimum, ours, our_minimum)
    assert agreement.reason
    if agreement.protocol is None:
        assert peer < our_minimum or ours < peer_minimum
    else:
        assert max(peer_minimum, our_minimum) <= agreement.protocol <= min(peer, ours)


# ---- ids


@pytest.mark.parametrize(
    ("make", "prefix"),
    [(ids.new_job_id, "j"), (ids.new_plan_id, "p"), (ids.new_token_id, "t"), (ids.new_spool_id, "s")],
)
def test_ids_are_read_aloud_without_mistakes_and_never_repeat(make, prefix: str) -> None:  # type: ignore[no-untyped-def]
    made = {make() for _ in range(500)}
    assert len(made) == 500
    assert all(re.fullmatch(rf"{prefix}-[a-hjkmnp-tv-z2-9]{{8}}", one) for one in made)

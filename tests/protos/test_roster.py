"""Rosters as documents: what is signed, what is refused, and the book of those a node holds, step by step."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.authority import Authority, open_authority
from node.roster_book import MAX_ROSTERS, Caller, RosterBook
from protos import roster as rosters
from protos.errors import AccessError, ErrorCode, HiveError, SpecError
from protos.ids import Digest, Fence, NodeId
from protos.roster import Action, Member, PeerAddress, Reference, Roster, parse_reference
from protos.token import Role

ME, OTHER = NodeId("n-me"), NodeId("n-other")
DIGEST = Digest("a" * 64)
HERE = (PeerAddress("10.0.0.0/24", "10.0.0.2:4000"),)


def member(node_id: NodeId, *may: Action) -> Member:
    return Member(node_id, "machine", "k" * 64, HERE, may)


ROSTER = Roster(
    "j-1", Fence(3), (member(ME, Action.FETCH), member(OTHER, Action.FETCH)), (DIGEST,), 1000.0, 1600.0
)  # fmt: skip


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return open_authority(tmp_path_factory.mktemp("authority"))


def book(authority: Authority) -> RosterBook:
    return RosterBook(ME, authority.certificate_pem)


def take(into: RosterBook, authority: Authority, roster: Roster, now: float = 1001.0) -> Roster:
    document = rosters.encode(roster)
    return into.take(document, authority.sign_roster(document), now)


def code_of(into: RosterBook, reference: Reference, now: float, action: Action = Action.FETCH) -> ErrorCode | None:
    try:
        into.admit(reference, Caller(OTHER, "k" * 64), action, now)
    except HiveError as error:
        return error.code
    return None


def test_what_the_authority_signed_is_what_is_read(authority: Authority) -> None:
    document = rosters.encode(ROSTER)
    assert rosters.verify(document, authority.sign_roster(document), authority.certificate_pem) == ROSTER


@given(st.data())
def test_a_changed_byte_or_another_signature_is_refused(authority: Authority, data: st.DataObject) -> None:
    document = bytearray(rosters.encode(ROSTER))
    signature = authority.sign_roster(bytes(document))
    at = data.draw(st.integers(0, len(document) - 1))
    document[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(AccessError):
        rosters.verify(bytes(document), signature, authority.certificate_pem)
    with pytest.raises(AccessError):
        rosters.verify(rosters.encode(ROSTER), data.draw(st.binary(max_size=80)), authority.certificate_pem)


def test_a_signature_of_another_authority_or_over_something_else_is_refused(
    authority: Authority, tmp_path: Path
) -> None:
    document = rosters.encode(ROSTER)
    theirs = open_authority(tmp_path)
    with pytest.raises(AccessError):
        rosters.verify(document, theirs.sign_roster(document), authority.certificate_pem)
    certificate = authority.certificate
    with pytest.raises(AccessError):  # what the authority signs as a certificate is no roster
        rosters.verify(certificate.tbs_certificate_bytes, certificate.signature, authority.certificate_pem)


@pytest.mark.parametrize(
    "changes",
    [
        {"members": (member(ME), member(ME))},
        {"members": tuple(member(NodeId(f"n-{i}")) for i in range(rosters.MAX_MEMBERS + 1))},
        {"members": (replace(member(ME), addresses=HERE * 33),)},
        {"digests": (Digest("../etc/passwd"),)},
        {"digests": (DIGEST,) * (rosters.MAX_DIGESTS + 1)},
        {"subject": ""},
        {"subject": "x" * 65},
        {"fence": Fence(-1)},
        {"expires_unix_s": float("inf")},
    ],
)
def test_a_roster_out_of_bounds_is_never_made(changes: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        rosters.encode(replace(ROSTER, **changes))  # type: ignore[arg-type]


@given(st.text(max_size=100))
def test_whatever_a_call_names_is_a_reference_or_refused(text: str) -> None:
    try:
        found = parse_reference(text)
    except SpecError:
        return
    assert parse_reference(str(found)) == found


def test_only_the_newest_of_a_subject_counts(authority: Authority) -> None:
    held = book(authority)
    take(held, authority, ROSTER)
    assert code_of(held, ROSTER.reference, 1001.0) is None
    newer = replace(ROSTER, fence=Fence(4), issued_unix_s=1002.0)
    take(held, authority, newer)
    assert code_of(held, ROSTER.reference, 1003.0) is ErrorCode.STALE_FENCE
    assert code_of(held, newer.reference, 1003.0) is None
    with pytest.raises(HiveError) as late:
        take(held, authority, ROSTER)
    assert late.value.code is ErrorCode.STALE_FENCE


def test_one_that_is_over_ends_what_was_held_and_no_replay_brings_it_back(authority: Authority) -> None:
    held = book(authority)
    take(held, authority, ROSTER)
    take(held, authority, replace(ROSTER, issued_unix_s=1100.0, expires_unix_s=1100.0), 1100.0)
    assert code_of(held, ROSTER.reference, 1101.0) is ErrorCode.FORBIDDEN
    with pytest.raises(HiveError):
        take(held, authority, ROSTER, 1101.0)
    assert list(held.sources(DIGEST, 1101.0)) == [] and held.get("j-1", 1101.0) is None


def test_who_is_listed_and_what_for_decides_until_it_expires(authority: Authority) -> None:
    held = book(authority)
    roster = take(held, authority, ROSTER)
    assert code_of(held, ROSTER.reference, 1599.0) is None
    assert code_of(held, ROSTER.reference, 1599.0, Action.PROBE) is ErrorCode.FORBIDDEN
    assert code_of(held, ROSTER.reference, 1600.0) is ErrorCode.FORBIDDEN
    assert code_of(held, Reference("j-2", Fence(3)), 1001.0) is ErrorCode.FORBIDDEN
    held.check_digest(roster, DIGEST)
    for digest in ("b" * 64, "", "../x"):
        with pytest.raises(AccessError):
            held.check_digest(roster, digest)
    for stranger in (Caller("n-third", "k" * 64), Caller(OTHER, "x" * 64)):
        with pytest.raises(AccessError):
            held.admit(ROSTER.reference, stranger, Action.FETCH, 1001.0)


def test_sources_are_the_other_members_that_serve_in_the_order_of_the_roster(authority: Authority) -> None:
    held = book(authority)
    third = replace(member(NodeId("n-third")), addresses=())
    take(held, authority, replace(ROSTER, members=(member(OTHER), member(ME, Action.FETCH), third)))
    assert [(str(ref), each.node_id) for ref, each in held.sources(DIGEST, 1001.0)] == [("j-1/3", OTHER)]
    assert list(held.sources(Digest("b" * 64), 1001.0)) == [] and list(held.sources(DIGEST, 1600.0)) == []


def test_a_roster_without_this_node_and_one_too_many_are_refused(authority: Authority) -> None:
    held = book(authority)
    with pytest.raises(AccessError, match="does not list this node"):
        take(held, authority, replace(ROSTER, members=(member(OTHER),)))
    for number in range(MAX_ROSTERS):
        take(held, authority, replace(ROSTER, subject=f"j-{number}"))
    with pytest.raises(HiveError) as full:
        take(held, authority, replace(ROSTER, subject="one-more"))
    assert full.value.code is ErrorCode.EXHAUSTED
    take(held, authority, replace(ROSTER, subject="one-more", issued_unix_s=2000.0, expires_unix_s=2600.0), 2000.0)


def test_a_nodes_certificate_serves_under_its_own_id_and_a_persons_does_not(authority: Authority) -> None:
    made = {role: authority.credential(role, "hive-coordinator", "h:1", "h:2", time.time()) for role in Role}
    for role, credential in made.items():
        assert rosters.can_serve(credential.certificate_pem.encode(), credential.id) is (role is Role.NODE)
        assert not rosters.can_serve(credential.certificate_pem.encode(), "hive-coordinator")

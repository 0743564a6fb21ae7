"""The rosters this node holds, and what they let another node do here. Pure: the time is passed in.

Refuses a roster that is not signed by our authority, does not list this node, is over, or is older than the one held.
Invariants: what no roster allows is refused; of a job only the newest fence counts, so a late caller is told that its
fence is stale; a roster ends by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from protos import roster as rosters
from protos.errors import AccessError, Conflict, ErrorCode, Exhausted
from protos.ids import Digest
from protos.roster import Action, Member, Reference, Roster

MAX_ROSTERS = 256
_HINT = "the coordinator sends rosters to the nodes of a job: this one may have ended"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, from its verified certificate."""

    node_id: str
    key_sha256: str


class RosterBook:
    def __init__(self, node_id: str, ca_pem: bytes) -> None:
        self._node_id = node_id
        self._ca_pem = ca_pem
        self._held: dict[str, Roster] = {}
        self._allowed: dict[str, frozenset[Digest]] = {}

    def take(self, document: bytes, signature: bytes, now_unix_s: float) -> Roster:
        """Hold a roster from now on. Raises HiveError for one that must not count."""
        roster = rosters.verify(document, signature, self._ca_pem)
        if roster.member(self._node_id) is None:
            raise _forbidden("a roster came that does not list this node")
        held = self._held.get(roster.subject)
        if held is not None and (roster.fence, roster.issued_unix_s) < (held.fence, held.issued_unix_s):
            raise Conflict(
                f"a roster of {roster.reference} came after one of {held.reference}", code=ErrorCode.STALE_FENCE
            )
        if held is None and len(self._held) >= MAX_ROSTERS:
            self._forget_ended(now_unix_s)
        if held is None and len(self._held) >= MAX_ROSTERS:
            raise Exhausted(f"{MAX_ROSTERS} rosters are held already", "they end by themselves within minutes")
        self._held[roster.subject] = roster  # also one that is over: it ends what was held
        self._allowed[roster.subject] = frozenset(roster.digests)
        return roster

    def admit(self, reference: Reference, caller: Caller, action: Action, now_unix_s: float) -> Roster:
        """The roster under which this caller may do this here, now. Raises AccessError or Conflict (stale fence)."""
        held = self._held.get(reference.subject)
        if held is None:
            raise _forbidden(f"this node holds no roster of {reference}")
        if reference.fence < held.fence:
            raise Conflict(f"{reference} is over: fence {held.fence} is current", _HINT, code=ErrorCode.STALE_FENCE)
        if reference.fence > held.fence:
            raise _forbidden(f"this node holds no roster of {reference}")
        if now_unix_s >= held.expires_unix_s:
            raise _forbidden(f"the roster of {reference} has expired")
        member = held.member(caller.node_id)
        if member is None or member.key_sha256 != caller.key_sha256:
            raise _forbidden(f"{caller.node_id} is not on the roster of {reference}")
        if action not in member.may:
            raise _forbidden(f"{caller.node_id} may not {action} under the roster of {reference}")
        return held

    def check_digest(self, roster: Roster, digest: str) -> None:
        """Raises AccessError unless the roster's files include this one."""
        if self._held.get(roster.subject) is not roster or digest not in self._allowed[roster.subject]:
            raise _forbidden(f"{digest[:64]} is not among the files of {roster.reference}")

    def get(self, subject: str, now_unix_s: float) -> Roster | None:
        held = self._held.get(subject)
        return held if held is not None and now_unix_s < held.expires_unix_s else None

    def sources(self, digest: Digest, now_unix_s: float) -> Iterator[tuple[Reference, Member]]:
        """Other members that may be asked for a file, in the order the coordinator named them."""
        seen = {self._node_id}
        for subject, roster in list(self._held.items()):
            mine = roster.member(self._node_id)
            may = mine is not None and Action.FETCH in mine.may and now_unix_s < roster.expires_unix_s
            if may and digest in self._allowed[subject]:
                for member in roster.members:
                    if member.addresses and member.node_id not in seen:
                        seen.add(member.node_id)
                        yield roster.reference, member

    def _forget_ended(self, now_unix_s: float) -> None:
        for subject in [s for s, roster in self._held.items() if roster.expires_unix_s <= now_unix_s]:
            del self._held[subject], self._allowed[subject]


def _forbidden(message: str) -> AccessError:
    return AccessError(message, _HINT, code=ErrorCode.FORBIDDEN)

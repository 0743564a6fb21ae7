"""Join tokens and who joined with them, over the store: what coordinator.enrolment and the session door ask.

Owns creation, use, listing and revocation of tokens, and membership of keys. Refuses with one sentence per reason (the
store's rules). Invariants: the secret is returned once, by `create`, and only its hash is kept; a use, the member it
makes and the event are one transaction.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

from coordinator.authority import subject_id
from coordinator.records import Member, TokenRecord
from coordinator.store.protocol import AppendEvent, PutMember, PutToken, Store, UseToken, Write
from coordinator.store.rules import unknown_token
from protos.errors import AccessError, Conflict, ErrorCode, HiveError, NotFound
from protos.ids import NodeId, new_token_id
from protos.states import Eligibility, NodeLink
from protos.token import Role, new_token, secret_hash

MAX_USES = 1_000_000
MAX_LIFETIME_S = 10 * 365 * 86_400.0


class TokenBook:
    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    async def create(self, role: Role, uses: int | None, lifetime_s: float) -> tuple[str, str]:
        """(token id, secret) of a new token for one role. `uses` None is unlimited."""
        if uses is not None and not 1 <= uses <= MAX_USES:
            raise HiveError(
                f"a token cannot have {uses} uses",
                f"give between 1 and {MAX_USES}, or none for no limit",
                code=ErrorCode.USAGE,
            )
        if not (math.isfinite(lifetime_s) and 0 < lifetime_s <= MAX_LIFETIME_S):
            raise HiveError(f"a token cannot live for {lifetime_s} s", "give up to ten years", code=ErrorCode.USAGE)
        now = self._clock()
        secret = new_token("").secret
        token = TokenRecord(new_token_id(), secret_hash(secret), role.value, uses, now + lifetime_s, now)
        payload = {"token_id": token.token_id, "role": token.role, "uses": uses, "expires_s": token.expires_s}
        await self._store.commit(PutToken(token), AppendEvent("token.created", payload=payload))
        return token.token_id, secret

    async def use(self, secret_hash: str, key_id: str, name: str, now: float) -> Role:
        """Use a token once for a key and make the key a member; the same (token, key) again is the same use.

        Raises AccessError: the token is unknown, revoked, expired or used up.
        """
        for _ in range(5):
            try:
                return await self._use(secret_hash, key_id, name, now)
            except Conflict:  # the member's row was written meanwhile, by this key's other call or by the controller
                continue
        return await self._use(secret_hash, key_id, name, now)

    async def _use(self, secret_hash: str, key_id: str, name: str, now: float) -> Role:
        token = await self._store.token_by_hash(secret_hash)
        if token is None:
            raise unknown_token()
        use = UseToken(secret_hash, now, key_id)
        role = Role(token.role)
        member = await self._store.member(NodeId(subject_id(role, key_id)))
        writes: list[Write] = [use]
        if member is None or member.left or member.role != role:
            joined = _joined(member, NodeId(subject_id(role, key_id)), name, role, now)
            payload = {"name": joined.name, "role": role.value, "token_id": token.token_id}
            writes.append(PutMember(joined, None if member is None else member.version))
            writes.append(AppendEvent("member.joined", node_id=joined.node_id, payload=payload))
        await self._store.commit(*writes)
        return role

    async def returning(self, key_id: str, now: float) -> Role:
        """The role of a key that is a member. Raises AccessError when it never was or was removed."""
        for node_id in dict.fromkeys(subject_id(role, key_id) for role in Role):
            member = await self._store.member(NodeId(node_id))
            if member is not None and not member.left:
                return Role(member.role)
        raise AccessError(
            "this machine's key is not a member of this coordinator (it never joined, or was removed)",
            "join with a token: hive token create on the coordinator prints one",
        )

    async def is_member(self, member_id: str) -> bool:
        """Whether the holder of a certificate is a member still: asked on every call."""
        member = await self._store.member(NodeId(member_id))
        return member is not None and not member.left

    async def list(self) -> tuple[TokenRecord, ...]:
        """Newest first, without secrets."""
        return await self._store.tokens()

    async def revoke(self, token_id: str) -> TokenRecord:
        """Who joined with it stays. Raises NotFound."""
        token = next((token for token in await self._store.tokens() if token.token_id == token_id), None)
        if token is None:
            raise NotFound(f"there is no token {token_id}", "hive token list shows them")
        revoked = replace(token, revoked=True)
        if revoked != token:
            payload = {"token_id": token_id}
            await self._store.commit(PutToken(revoked), AppendEvent("token.revoked", payload=payload))
        return revoked


def _joined(member: Member | None, node_id: NodeId, name: str, role: Role, now: float) -> Member:
    if member is None:
        return Member(node_id, name, role.value, NodeLink.JOINING, Eligibility.OK, now)
    link = NodeLink.JOINING if member.link is NodeLink.LEFT else member.link
    return replace(member, name=name or member.name, role=role.value, link=link, left=False, reason="", last_seen_s=now)

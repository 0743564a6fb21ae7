"""Join tokens over the store: who may join, how often, and who is a member after that."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace

import pytest

from coordinator.authority import subject_id
from coordinator.store.memory import MemoryStore
from coordinator.store.protocol import PutMember
from coordinator.token_book import TokenBook
from protos.errors import AccessError, HiveError, NotFound
from protos.ids import NodeId
from protos.states import NodeLink
from protos.token import Role, secret_hash

NOW = 1000.0


def book() -> tuple[TokenBook, MemoryStore]:
    store = MemoryStore(clock=lambda: NOW)
    return TokenBook(store, clock=lambda: NOW), store


def test_a_token_lets_a_key_in_and_makes_it_a_member() -> None:
    async def main() -> None:
        tokens, store = book()
        token_id, secret = await tokens.create(Role.NODE, 1, 60.0)
        assert await tokens.use(secret_hash(secret), "key", "lab-1", NOW) is Role.NODE
        member = await store.member(NodeId(subject_id(Role.NODE, "key")))
        assert member is not None and (member.name, member.role, member.link) == ("lab-1", "node", NodeLink.JOINING)
        assert await tokens.is_member(member.node_id)
        assert await tokens.returning("key", NOW) is Role.NODE
        assert [event.kind for event in await store.events()] == ["token.created", "member.joined"]
        assert secret not in str([*await store.events(), *await tokens.list()])
        (listed,) = await tokens.list()
        assert (listed.token_id, listed.uses_left, listed.expires_s) == (token_id, 0, NOW + 60.0)

    asyncio.run(main())


def test_a_lost_answer_can_be_asked_for_again_but_another_key_is_refused() -> None:
    async def main() -> None:
        tokens, _ = book()
        _, secret = await tokens.create(Role.SUBMITTER, 1, 60.0)
        asks = [tokens.use(secret_hash(secret), "key", "ada", NOW) for _ in range(5)]
        assert set(await asyncio.gather(*asks)) == {Role.SUBMITTER}
        with pytest.raises(AccessError, match="used up"):
            await tokens.use(secret_hash(secret), "other", "eve", NOW)
        assert not await tokens.is_member(subject_id(Role.SUBMITTER, "other"))

    asyncio.run(main())


def test_each_refusal_has_its_own_sentence() -> None:
    async def main() -> None:
        tokens, _ = book()
        token_id, secret = await tokens.create(Role.NODE, None, 60.0)
        with pytest.raises(AccessError, match="not known"):
            await tokens.use(secret_hash("nobody's"), "key", "", NOW)
        with pytest.raises(AccessError, match="expired"):
            await tokens.use(secret_hash(secret), "key", "", NOW + 60.0)
        assert (await tokens.revoke(token_id)).revoked
        await tokens.revoke(token_id)
        with pytest.raises(AccessError, match="revoked"):
            await tokens.use(secret_hash(secret), "key", "", NOW)
        with pytest.raises(AccessError, match="not a member"):
            await tokens.returning("key", NOW)
        with pytest.raises(NotFound):
            await tokens.revoke("t-none")

    asyncio.run(main())


def test_a_removed_member_comes_back_only_with_a_token() -> None:
    async def main() -> None:
        tokens, store = book()
        _, first = await tokens.create(Role.NODE, 1, 60.0)
        await tokens.use(secret_hash(first), "key", "lab-1", NOW)
        member = await store.member(NodeId(subject_id(Role.NODE, "key")))
        assert member is not None
        await store.commit(PutMember(replace(member, left=True, link=NodeLink.LEFT), member.version))
        assert not await tokens.is_member(member.node_id)
        with pytest.raises(AccessError, match="not a member"):
            await tokens.returning("key", NOW)
        _, second = await tokens.create(Role.NODE, 1, 60.0)
        await tokens.use(secret_hash(second), "key", "", NOW)
        back = await store.member(member.node_id)
        assert back is not None and (back.left, back.link, back.name) == (False, NodeLink.JOINING, "lab-1")

    asyncio.run(main())


@pytest.mark.parametrize(("uses", "lifetime_s"), [(0, 60.0), (-1, 60.0), (1, 0.0), (1, math.nan), (1, math.inf)])
def test_a_token_nobody_could_use_is_not_made(uses: int, lifetime_s: float) -> None:
    with pytest.raises(HiveError) as refused:
        asyncio.run(book()[0].create(Role.NODE, uses, lifetime_s))
    assert refused.value.exit_code == 2


def test_the_event_of_a_token_says_what_was_made() -> None:
    async def main() -> None:
        tokens, store = book()
        token_id, _ = await tokens.create(Role.ADMIN, None, 60.0)
        (event,) = await store.events()
        assert json.loads(event.payload_json) == {
            "token_id": token_id,
            "role": "admin",
            "uses": None,
            "expires_s": NOW + 60.0,
        }

    asyncio.run(main())

"""The token that `hive coordinator start` prints, over many starts."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from coordinator.join_token import FILE_NAME, JoinToken
from coordinator.store.memory import MemoryStore
from coordinator.token_book import TokenBook
from protos.token import Role, secret_hash


class House:
    def __init__(self, folder: Path) -> None:
        self.now, self.folder = 1_000_000.0, folder
        self.book = TokenBook(MemoryStore(), lambda: self.now)

    async def start(self) -> str:
        """What a start of the coordinator prints."""
        return await JoinToken(self.folder, self.book, lambda: self.now).secret()

    async def valid(self) -> list[str]:
        tokens = await self.book.list()
        return [token.secret_hash for token in tokens if not token.revoked and token.expires_s > self.now]


def run(tmp_path: Path, body: Callable[[House], Awaitable[None]]) -> None:
    asyncio.run(body(House(tmp_path)))


def test_every_start_within_a_day_prints_the_same_token(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        first = await house.start()
        house.now += 22 * 3600
        assert await house.start() == first
        assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600
        assert await house.book.use(secret_hash(first), "key", "box", house.now) is Role.NODE

    run(tmp_path, body)


def test_one_that_ends_soon_is_replaced_and_never_two_are_valid(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        secrets = set()
        for _ in range(5):
            secrets.add(await house.start())
            assert len(await house.valid()) == 1
            house.now += 23.5 * 3600
        assert len(secrets) == 5

    run(tmp_path, body)


def test_a_revoked_token_is_never_printed_again(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        first = await house.start()
        await house.book.revoke((await house.book.list())[0].token_id)
        second = await house.start()
        assert second != first and await house.valid() == [secret_hash(second)]

    run(tmp_path, body)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"secret": 7}', b'{"secret": "unknown"}'])
def test_a_file_that_says_nothing_useful_is_replaced(tmp_path: Path, content: bytes) -> None:
    async def body(house: House) -> None:
        (tmp_path / FILE_NAME).write_bytes(content)
        made = await house.start()
        assert await house.valid() == [secret_hash(made)] and await house.start() == made

    run(tmp_path, body)

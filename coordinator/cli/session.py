"""One command's conversation with the coordinator: connect, work, close."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from coordinator import connect

if TYPE_CHECKING:
    from coordinator.client import Client

T = TypeVar("T")


def connected(work: Callable[[Client], Awaitable[T]]) -> T:
    """Run `work` with a client of the coordinator that the environment means."""

    async def whole() -> T:
        async with await connect.connect(connect.load()) as client:
            return await work(client)

    return asyncio.run(whole())

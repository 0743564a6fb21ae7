"""Becoming a member: by the credential on disk or the token given, else by the owner's word to a daemon that waits.

A daemon without either shows itself on the LAN and waits for `hive-node start --token` in the same HIVE_HOME. Owns that
wait alone; who this node is and how it enrols is node.enrolment's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from node.enrolment import Identity
from protos.credentials import Credential
from protos.errors import AccessError, Conflict
from protos.log import Log
from protos.token import parse_token

log = Log("hive.node.joining")


class Joining:
    """`may_wait`: no token was given, and others can see this machine. `waits` is told when it comes to that."""

    def __init__(self, identity: Identity, stop: asyncio.Event, waits: Callable[[], None]) -> None:
        self._identity = identity
        self._stop = stop
        self._waits = waits
        self._invited: asyncio.Future[Credential] | None = None

    async def member(self, may_wait: bool) -> Credential | None:
        """Who this node is, None when the owner stopped it first. Raises HiveError when it cannot join."""
        stopped = asyncio.create_task(self._stop.wait())
        joining = asyncio.create_task(self._identity.current())
        try:
            await asyncio.wait([joining, stopped], return_when=asyncio.FIRST_COMPLETED)
            if not joining.done():
                return None
            try:
                return await joining
            except AccessError as error:
                if not may_wait:
                    raise
                self._waits()
                log.warning("not joined", reason=error.message, hint=f"{error.hint}; hive nodes --lan there lists us")
                self._invited = asyncio.get_running_loop().create_future()
                events: list[asyncio.Future[Any]] = [self._invited, stopped]
                await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
                return self._invited.result() if self._invited.done() else None
        finally:
            joining.cancel()
            stopped.cancel()
            self._invited = None

    async def invite(self, home: object, token: str, coordinator: str | None) -> None:
        """The owner typed the command that `hive nodes --lan` showed, where this daemon already waits."""
        invited = self._invited
        if invited is None or invited.done():
            raise Conflict(
                f"a node daemon already runs in {home}",
                "stop it with hive-node leave, or give this one its own folder with --home",
            )
        credential = await self._identity.invited(parse_token(token), coordinator)
        if not invited.done():
            invited.set_result(credential)

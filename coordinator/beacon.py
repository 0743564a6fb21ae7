"""The coordinator on the LAN: announces itself as `_hive._tcp`, and sees `_hive-node._tcp` machines.

Owns nothing that matters: planning and membership use what comes over authenticated streams; a sighting is only shown
to a person (`hive nodes --lan`), with the command that joins the machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from protos.announcement import (
    COORDINATOR_TYPE,
    NODE_TYPE,
    CoordinatorAnnouncement,
    NodeSighting,
    coordinator_txt,
    read_node,
)
from protos.lan import Lan, Service


class Beacon:
    """Use `async with Beacon(announcement)`: announced and watching inside."""

    def __init__(self, announcement: CoordinatorAnnouncement, interfaces: Sequence[str] | None = None) -> None:
        self._announcement = announcement
        self._lan = Lan(interfaces)

    async def __aenter__(self) -> Beacon:
        await self._lan.__aenter__()
        try:
            self._lan.watch(NODE_TYPE)
            await self._lan.announce(
                Service(
                    COORDINATOR_TYPE,
                    f"hive-{self._announcement.fingerprint[:16]}",
                    self._announcement.enrolment_port,
                    coordinator_txt(self._announcement),
                )
            )
        except BaseException:
            await self._lan.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._lan.__aexit__()

    @property
    def problem(self) -> str:
        """Why the LAN cannot be used, or nothing: for `hive doctor`."""
        return self._lan.problem

    def next_change(self) -> asyncio.Event:
        """Set when `nodes` changes next: take it, look, then wait."""
        return self._lan.next_change()

    def nodes(self) -> tuple[NodeSighting, ...]:
        """The machines seen now, by name. Hints only."""
        return sightings(self._lan)


def sightings(lan: Lan) -> tuple[NodeSighting, ...]:
    found = [
        NodeSighting(announcement, seen.addresses)
        for seen in lan.seen
        if (announcement := read_node(seen.txt)) is not None
    ]
    return tuple(sorted(found, key=lambda each: (each.announcement.name, each.announcement.id, each.addresses)))

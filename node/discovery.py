"""The node on the LAN: advertises `_hive-node._tcp`, and finds the coordinator that a token belongs to.

Owns the choice among several coordinators: the fingerprint in the token decides, and an address counts only after the
coordinator there has shown that CA. Announcements are hints: what is planned with comes over the authenticated stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

from protos.announcement import (
    COORDINATOR_TYPE,
    FINGERPRINT_CHARACTERS,
    NODE_TYPE,
    CoordinatorSighting,
    NodeAnnouncement,
    node_txt,
    read_coordinator,
)
from protos.errors import HiveError, Unreachable
from protos.lan import Lan, Service

VERIFY_S = 2.0  # for one address: an announced one may be out of reach from here
_DISCARD_PORT = 9  # a node listens nowhere; DNS-SD wants a port

Verify = Callable[[str], Awaitable[object]]  # front-door address -> raises HiveError when it is not the one


class Advertiser:
    """Use `async with Advertiser(...)`, then `update` when something changed. `instance` is unique on the LAN."""

    def __init__(self, instance: str, announcement: NodeAnnouncement, interfaces: Sequence[str] | None = None) -> None:
        self._instance = instance
        self._announcement = announcement
        self._lan = Lan(interfaces)

    async def __aenter__(self) -> Advertiser:
        await self._lan.__aenter__()
        try:
            await self._announce()
        except BaseException:
            await self._lan.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._lan.__aexit__()

    @property
    def problem(self) -> str:
        """Why the LAN cannot be used, or nothing: for `hive-node doctor`."""
        return self._lan.problem

    async def update(self, announcement: NodeAnnouncement) -> None:
        """Announce a change; the same announcement again sends nothing."""
        if announcement != self._announcement:
            self._announcement = announcement
            await self._announce()

    async def _announce(self) -> None:
        await self._lan.announce(Service(NODE_TYPE, self._instance, _DISCARD_PORT, node_txt(self._announcement)))


async def find_coordinator(
    fingerprint: str, verify: Verify, deadline_s: float = 10.0, interfaces: Sequence[str] | None = None
) -> str:
    """The front-door address (host:port) of the coordinator with this CA fingerprint.

    `verify` is tried on every address that claims the fingerprint until one holds; with protos.enrol.fetch_ca that is
    the token's own check. Raises Unreachable with the three ways to name a coordinator when the deadline passes.
    """
    tried: dict[str, str] = {}
    async with Lan(interfaces) as lan:
        lan.watch(COORDINATOR_TYPE)
        try:
            async with asyncio.timeout(deadline_s):
                while not lan.problem:
                    changed = lan.next_change()
                    for address in candidates(coordinators(lan), fingerprint):
                        try:
                            async with asyncio.timeout(VERIFY_S):
                                await verify(address)
                            return address
                        except HiveError as error:
                            tried[address] = error.message
                        except TimeoutError:
                            tried[address] = "it did not answer in time"
                    with contextlib.suppress(TimeoutError):  # try again: it may only just be starting
                        async with asyncio.timeout(VERIFY_S):
                            await changed.wait()
        except TimeoutError:
            pass
        raise _not_found(fingerprint, coordinators(lan), tried, lan.problem, deadline_s)


def coordinators(lan: Lan) -> tuple[CoordinatorSighting, ...]:
    return tuple(
        CoordinatorSighting(announcement, seen.addresses)
        for seen in lan.seen
        if (announcement := read_coordinator(seen.txt)) is not None
    )


def candidates(sightings: Sequence[CoordinatorSighting], fingerprint: str) -> list[str]:
    """Front-door addresses that claim the fingerprint, in the order to try."""
    return [
        f"[{host}]:{sighting.announcement.enrolment_port}"
        if ":" in host
        else f"{host}:{sighting.announcement.enrolment_port}"
        for sighting in sightings
        if sighting.announcement.fingerprint == fingerprint[:FINGERPRINT_CHARACTERS]
        for host in sighting.addresses
    ]


def _not_found(
    fingerprint: str,
    sightings: Sequence[CoordinatorSighting],
    tried: dict[str, str],
    problem: str,
    deadline_s: float,
) -> Unreachable:
    others = sum(each.announcement.fingerprint != fingerprint[:FINGERPRINT_CHARACTERS] for each in sightings)
    if tried:
        address, why = next(iter(tried.items()))
        what = f"the coordinator of this token announces itself at {address}, but {why}"
    elif problem:
        what = f"the LAN cannot be searched for the coordinator: {problem}"
    elif others:
        what = f"no coordinator of this token announced itself within {deadline_s:.0f} s ({others} other seen)"
    else:
        what = f"no coordinator announced itself on this network within {deadline_s:.0f} s"
    return Unreachable(
        what,
        "three ways to it: be on the same network (zeroconf, UDP port 5353 open), or give --coordinator HOST:PORT, "
        "or set HIVE_COORDINATOR=HOST:PORT",
    )

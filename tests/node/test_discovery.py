"""Zeroconf both ways, on loopback only, and the choice among coordinators."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from coordinator.beacon import Beacon
from node.discovery import Advertiser, candidates, find_coordinator
from protos import lan
from protos.announcement import CoordinatorAnnouncement, CoordinatorSighting, NodeAnnouncement
from protos.errors import AccessError, Unreachable
from protos.lan import Lan, Service

LOOPBACK = ("127.0.0.1",)
OURS, OTHER = "a" * 64, "b" * 64
NODE = NodeAnnouncement("", "box", "0.1.0", 8.0, 2**34, "RTX 4090", 900.0, joined=False)


def coordinator(fingerprint: str, port: int) -> CoordinatorAnnouncement:
    return CoordinatorAnnouncement(fingerprint, port, port + 1, 1, "0.1.0", "lab")


async def until(watching: Lan | Beacon, holds: Callable[[], bool], deadline_s: float = 20.0) -> None:
    """Look again after every change of what is seen, until it holds."""
    async with asyncio.timeout(deadline_s):
        while True:
            change = watching.next_change()
            if holds():
                return
            await change.wait()


def run(body: Awaitable[None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60):
            await body

    asyncio.run(main())


async def accept(address: str) -> None:
    return None


def test_a_node_finds_the_coordinator_of_its_token_among_several() -> None:
    async def body() -> None:
        async with Beacon(coordinator(OTHER, 5000), LOOPBACK), Beacon(coordinator(OURS, 6000), LOOPBACK):
            assert await find_coordinator(OURS, accept, 20.0, LOOPBACK) == "127.0.0.1:6000"

    run(body())


def test_an_announcement_is_only_a_hint_until_the_address_proves_it() -> None:
    async def body() -> None:
        tried: list[str] = []

        async def refuse(address: str) -> None:
            tried.append(address)
            raise AccessError(f"{address} is another coordinator")

        async with Beacon(coordinator(OURS, 6000), LOOPBACK):
            with pytest.raises(Unreachable, match=r"announces itself at 127\.0\.0\.1:6000, but .* is another"):
                await find_coordinator(OURS, refuse, 1.5, LOOPBACK)
        assert set(tried) == {"127.0.0.1:6000"}

    run(body())


def test_nothing_found_names_the_three_ways() -> None:
    async def body() -> None:
        with pytest.raises(Unreachable, match="no coordinator announced itself") as missing:
            await find_coordinator(OURS, accept, 0.3, LOOPBACK)
        assert missing.value.exit_code == 6
        for way in ("zeroconf", "--coordinator HOST:PORT", "HIVE_COORDINATOR"):
            assert way in missing.value.hint

    run(body())


def test_the_coordinator_sees_a_machine_appear_join_and_leave() -> None:
    async def body() -> None:
        async with Beacon(coordinator(OURS, 6000), LOOPBACK) as beacon:
            async with Advertiser("box-1", NODE, LOOPBACK) as advertiser:
                await until(beacon, lambda: len(beacon.nodes()) == 1)
                assert beacon.nodes()[0].announcement == NODE
                assert beacon.nodes()[0].addresses == LOOPBACK
                joined = replace(NODE, id="n-abc", joined=True)
                await advertiser.update(joined)
                await until(beacon, lambda: [each.announcement for each in beacon.nodes()] == [joined])
            await until(beacon, lambda: beacon.nodes() == ())
            assert beacon.problem == ""

    run(body())


def test_a_crowd_of_strangers_stays_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lan, "MAX_SEEN", 3)

    async def body() -> None:
        async with Beacon(coordinator(OURS, 6000), LOOPBACK) as beacon, asyncio.TaskGroup() as group:
            crowd = [Advertiser(f"box-{i}", replace(NODE, name=f"box-{i}"), LOOPBACK) for i in range(5)]
            try:
                for each in [group.create_task(each.__aenter__()) for each in crowd]:
                    await each
                await until(beacon, lambda: len(beacon.nodes()) == 3)
            finally:
                for advertiser in crowd:
                    group.create_task(advertiser.__aexit__())
            assert len(beacon.nodes()) <= 3

    run(body())


def test_a_machine_without_multicast_goes_on_and_says_why() -> None:
    async def body() -> None:
        nowhere = ("192.0.2.77",)  # no interface has it
        async with Advertiser("box-1", NODE, nowhere) as advertiser:
            assert "zeroconf cannot be opened" in advertiser.problem
            await advertiser.update(replace(NODE, joined=True))
        with pytest.raises(Unreachable, match="cannot be searched") as refused:
            await find_coordinator(OURS, accept, 20.0, nowhere)
        assert "--coordinator" in refused.value.hint

    run(body())


def test_a_change_of_addresses_is_announced_again() -> None:
    addresses = ("127.0.0.1",)

    async def body() -> None:
        nonlocal addresses
        kind = "_hive-node._tcp.local."
        async with Lan(LOOPBACK) as watcher, Lan(LOOPBACK, lambda: addresses, check_s=0.02) as moving:
            watcher.watch(kind)
            await moving.announce(Service(kind, "mover", 9, {"name": "x"}))
            await until(watcher, lambda: [each.addresses for each in watcher.seen] == [("127.0.0.1",)])
            addresses = ("127.0.0.2",)
            await until(watcher, lambda: any("127.0.0.2" in each.addresses for each in watcher.seen))

    run(body())


def test_candidates_are_this_tokens_addresses_in_order() -> None:
    sightings = [
        CoordinatorSighting(coordinator(OTHER[:16], 1), ("10.0.0.1",)),
        CoordinatorSighting(coordinator(OURS[:16], 2), ("10.0.0.2", "fd00::2")),
    ]
    assert candidates(sightings, OURS) == ["10.0.0.2:2", "[fd00::2]:2"]

"""Rendezvous: torch.distributed.Store's semantics, one name space per generation, over when the generation is."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.rendezvous import Rendezvous
from protos import limits
from protos.errors import DeadlineExceeded, ErrorCode, Exhausted, HiveError
from protos.ids import Fence, JobId

JOB = JobId("j-1")


class Client:
    """One generation's store as a rank sees it."""

    def __init__(self, stores: Rendezvous, fence: int = 1, job: JobId = JOB) -> None:
        self._stores, self._fence, self._job = stores, Fence(fence), job

    async def __call__(
        self,
        operation: str,
        *keys: str,
        value: bytes = b"",
        expected: bytes = b"",
        amount: int = 0,
        timeout_s: float = 5.0,
        request: str = "",
    ) -> tuple[bytes, int]:
        return await self._stores.call(
            self._job, self._fence, operation, keys, value, expected, amount, timeout_s, request
        )


@pytest.fixture
def stores() -> Rendezvous:
    return Rendezvous(lambda job_id, fence: job_id == JOB and fence in (1, 2))


async def _missing(call: Client) -> None:
    with pytest.raises(DeadlineExceeded, match="nobody set k"):
        await call("get", "k", timeout_s=0.0)


def test_what_one_rank_sets_another_gets(stores: Rendezvous) -> None:
    async def run() -> None:
        call = Client(stores)
        await call("set", "k", value=b"v")
        assert await call("get", "k") == (b"v", 0)
        assert await call("check", "k") == (b"", 1)
        assert await call("check", "k", "other") == (b"", 0)
        assert await call("num_keys") == (b"", 1)
        assert await call("delete_key", "k") == (b"", 1)
        assert await call("delete_key", "k") == (b"", 0)
        await _missing(call)

    asyncio.run(run())


def test_get_and_wait_end_when_the_keys_appear(stores: Rendezvous) -> None:
    async def run() -> None:
        call = Client(stores)
        async with asyncio.TaskGroup() as group:
            got = group.create_task(call("get", "a"))
            both = group.create_task(call("wait", "a", "b"))
            await asyncio.sleep(0)
            await call("set", "a", value=b"1")
            assert (await got) == (b"1", 0)
            assert not both.done()
            await call("set", "b", value=b"2")
        assert both.result() == (b"", 0)

    asyncio.run(run())


def test_a_key_that_nobody_sets_is_a_deadline(stores: Rendezvous) -> None:
    async def run() -> None:
        await _missing(Client(stores))
        with pytest.raises(DeadlineExceeded, match="k"):
            await Client(stores)("wait", "k", timeout_s=0.01)

    asyncio.run(run())


def test_add_counts_and_its_number_can_be_read(stores: Rendezvous) -> None:
    async def run() -> None:
        call = Client(stores)
        assert await call("add", "n", amount=2) == (b"", 2)
        assert await call("add", "n", amount=-5) == (b"", -3)
        assert await call("get", "n") == (b"-3", 0)
        await call("set", "n", value=b"text")
        with pytest.raises(ValueError, match="text"):
            await call("add", "n", amount=1)

    asyncio.run(run())


def test_compare_set_is_that_of_torch(stores: Rendezvous) -> None:
    async def run() -> None:
        call = Client(stores)
        assert await call("compare_set", "k", value=b"1", expected=b"other") == (b"other", 0)
        assert await call("check", "k") == (b"", 0)
        assert await call("compare_set", "k", value=b"1", expected=b"") == (b"1", 0)
        assert await call("compare_set", "k", value=b"2", expected=b"wrong") == (b"1", 0)
        assert await call("compare_set", "k", value=b"2", expected=b"1") == (b"2", 0)

    asyncio.run(run())


def test_a_call_that_arrives_twice_changes_the_store_once(stores: Rendezvous) -> None:
    async def run() -> None:
        call = Client(stores)
        assert await call("add", "n", amount=1, request="s-1/1") == (b"", 1)
        assert await call("add", "n", amount=1, request="s-1/1") == (b"", 1)
        assert await call("add", "n", amount=1, request="s-2/1") == (b"", 2)
        await call("set", "k", value=b"v")
        assert await call("delete_key", "k", request="s-1/2") == (b"", 1)
        assert await call("delete_key", "k", request="s-1/2") == (b"", 1)
        assert await call("check", "n", request="s-1/3") == (b"", 1)
        await call("delete_key", "n")
        assert await call("check", "n", request="s-1/3") == (b"", 0)  # what changes nothing is answered afresh

    asyncio.run(run())


def test_generations_do_not_see_each_other(stores: Rendezvous) -> None:
    async def run() -> None:
        await Client(stores, fence=1)("set", "k", value=b"old")
        await _missing(Client(stores, fence=2))

    asyncio.run(run())


@pytest.mark.parametrize("client", [{"fence": 3}, {"fence": 1, "job": JobId("j-2")}])
def test_a_generation_that_is_not_current_is_refused(stores: Rendezvous, client: dict) -> None:
    async def run() -> None:
        with pytest.raises(HiveError) as refused:
            await Client(stores, **client)("set", "k", value=b"v")
        assert refused.value.code is ErrorCode.STALE_FENCE

    asyncio.run(run())


def test_whoever_waits_in_a_generation_that_ends_is_told(stores: Rendezvous) -> None:
    async def run() -> None:
        call = Client(stores)
        waiting = asyncio.create_task(call("get", "k", timeout_s=60.0))
        await asyncio.sleep(0)
        await stores.close(JOB, Fence(1))
        with pytest.raises(HiveError) as over:
            await waiting
        assert over.value.code is ErrorCode.STALE_FENCE
        await stores.close(JOB, Fence(1))

    asyncio.run(run())


def test_a_store_is_bounded(stores: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        call = Client(stores)
        with pytest.raises(Exhausted):
            await call("set", "k", value=b"x" * (limits.MAX_STORE_VALUE_BYTES + 1))
        with pytest.raises(Exhausted):
            await call("set", "k" * 2000, value=b"x")
        monkeypatch.setattr(limits, "MAX_STORE_KEYS", 2)
        await call("set", "a", value=b"x")
        await call("set", "b", value=b"x")
        with pytest.raises(Exhausted):
            await call("set", "c", value=b"x")
        await call("set", "a", value=b"y")

    asyncio.run(run())


@pytest.mark.parametrize("operation", ["explode", ""])
def test_an_operation_nobody_knows_is_refused(stores: Rendezvous, operation: str) -> None:
    with pytest.raises(HiveError) as refused:
        asyncio.run(Client(stores)(operation, "k"))
    assert refused.value.code is ErrorCode.USAGE


@pytest.mark.parametrize("operation", ["get", "set", "add", "compare_set", "delete_key"])
def test_an_operation_without_its_key_is_refused(stores: Rendezvous, operation: str) -> None:
    with pytest.raises(HiveError, match="without a key"):
        asyncio.run(Client(stores)(operation))


def test_a_generation_holds_so_many_bytes_and_no_more_until_some_are_deleted(stores: Rendezvous) -> None:
    async def run() -> None:
        call = Client(stores)
        value = b"x" * limits.MAX_STORE_VALUE_BYTES
        whole = limits.MAX_STORE_BYTES // limits.MAX_STORE_VALUE_BYTES
        for number in range(whole):
            await call("set", f"k{number}", value=value)
        await call("set", "k0", value=value)  # in its own place
        with pytest.raises(Exhausted):
            await call("set", "one more", value=b"x")
        await call("delete_key", "k0")
        await call("set", "one more", value=value)

    asyncio.run(run())

"""Rendezvous calls through an outage of the coordinator."""

from __future__ import annotations

import asyncio

from node_bench import run_async

from node.store_calls import StoreCalls
from protos import limits
from protos.gen import membership_pb2 as pb
from protos.gen import work_pb2
from protos.ids import Fence, JobId


class Line:
    """A session that is connected or not, and what was sent on it."""

    def __init__(self) -> None:
        self.open = True
        self.sent: list[work_pb2.StoreCall] = []

    def send(self, message: pb.NodeMessage) -> bool:
        if self.open:
            self.sent.append(message.store_call)
        return self.open


async def asked(calls: StoreCalls, operation: str = "get", value: bytes = b"", timeout_s: float = 30.0):  # type: ignore[no-untyped-def]
    return await calls.call(JobId("j-1"), Fence(1), operation, ["key"], value, b"", 0, timeout_s)


def test_answers_find_their_questions_whatever_their_order() -> None:
    async def body() -> None:
        line = Line()
        calls = StoreCalls(line.send)
        first, second = asyncio.create_task(asked(calls)), asyncio.create_task(asked(calls, "add"))
        await asyncio.sleep(0)
        numbers = [call.call_id for call in line.sent]
        calls.answered(work_pb2.StoreReply(call_id=numbers[1], status="ok", number=5))
        calls.answered(work_pb2.StoreReply(call_id=numbers[0], status="ok", value=b"v"))
        calls.answered(work_pb2.StoreReply(call_id=numbers[0], status="ok", value=b"again"))
        calls.answered(work_pb2.StoreReply(call_id=99, status="ok"))
        assert ((await first).value, (await second).number) == (b"v", 5)

    run_async(body())


def test_what_was_not_answered_is_asked_again_under_its_number() -> None:
    """1 a call is sent 2 the connection breaks, another call is made meanwhile 3 it is back: both are asked, each under
    the number it had, by which the coordinator knows one that it has carried out."""

    async def body() -> None:
        line = Line()
        calls = StoreCalls(line.send)
        first = asyncio.create_task(asked(calls, "add"))
        await asyncio.sleep(0)
        line.open = False
        second = asyncio.create_task(asked(calls))
        await asyncio.sleep(0)
        line.open = True
        calls.connected()
        assert [call.call_id for call in line.sent] == [1, 1, 2]
        for number in (1, 2):
            calls.answered(work_pb2.StoreReply(call_id=number, status="ok"))
        assert [(await call).status for call in (first, second)] == ["ok", "ok"]
        calls.connected()
        assert len(line.sent) == 3

    run_async(body())


def test_a_call_that_its_caller_gave_up_is_not_asked_again() -> None:
    async def body() -> None:
        line = Line()
        calls = StoreCalls(line.send)
        call = asyncio.create_task(asked(calls))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait({call})
        calls.connected()
        assert len(line.sent) == 1

    run_async(body())


def test_what_no_message_would_hold_is_refused_here() -> None:
    """On the stream it would end every connection, again and again."""

    async def body() -> None:
        line = Line()
        answer = await asked(StoreCalls(line.send), "set", b"x" * (limits.MAX_STORE_VALUE_BYTES + 1))
        assert answer.status == "refused" and not line.sent

    run_async(body())

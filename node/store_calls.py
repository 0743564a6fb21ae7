"""Rendezvous calls of local workers over the session stream: numbered, bounded, and sent again after an outage."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

from node.worker_handle import StoreAnswer, StoreResult
from protos import limits
from protos.gen import membership_pb2 as pb
from protos.gen import work_pb2
from protos.ids import Fence, JobId

_MARGIN_S = 2.0  # the coordinator's own time-out answers first when it is there


class StoreCalls:
    def __init__(self, send: Callable[[pb.NodeMessage], bool]) -> None:
        self._send = send
        self._numbers = itertools.count(1)
        self._open: dict[int, tuple[work_pb2.StoreCall, asyncio.Future[StoreAnswer]]] = {}

    async def call(
        self,
        job_id: JobId,
        fence: Fence,
        operation: str,
        keys: Sequence[str],
        value: bytes,
        expected: bytes,
        amount: int,
        timeout_s: float,
    ) -> StoreAnswer:
        """Waits for the answer through an outage of the coordinator, up to the call's own deadline."""
        if sum(len(part) for part in (*keys, value, expected)) > limits.MAX_STORE_VALUE_BYTES:
            return StoreResult("refused", message="keys and values are over the limit of a rendezvous store")
        number = next(self._numbers)
        message = work_pb2.StoreCall(
            call_id=number,
            job_id=job_id,
            fence=fence,
            operation=operation,
            keys=keys,
            value=value,
            expected=expected,
            amount=amount,
            deadline_s=timeout_s,
        )
        answer: asyncio.Future[StoreAnswer] = asyncio.get_running_loop().create_future()
        self._open[number] = (message, answer)
        self._send(pb.NodeMessage(store_call=message))
        try:
            async with asyncio.timeout(timeout_s + _MARGIN_S):
                return await answer
        except TimeoutError:
            return StoreResult("timeout", message=f"the coordinator did not answer within {timeout_s:.0f} s")
        finally:
            self._open.pop(number, None)

    def connected(self) -> None:
        """Ask everything again that was not answered: a call that was already carried out changes nothing twice."""
        for message, _ in list(self._open.values()):
            self._send(pb.NodeMessage(store_call=message))

    def answered(self, reply: work_pb2.StoreReply) -> None:
        waiting = self._open.get(reply.call_id)
        if waiting is not None and not waiting[1].done():
            waiting[1].set_result(StoreResult(reply.status, reply.value, reply.number, reply.message))

"""The nodes that are connected now: one outgoing queue each, and questions that wait for an answer.

Owns delivery to connected nodes only. What must survive a disconnect is decided and repeated by the control loop; a
message to a node that is not here is dropped, on purpose.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from protos import documents
from protos.artifact import Manifest
from protos.capacity import Capacity, LinkEstimate
from protos.errors import DeadlineExceeded, HiveError, NotFound, Unreachable
from protos.gen import membership_pb2 as pb
from protos.gen import work_pb2
from protos.ids import NodeId
from protos.work import Outcome, Task

_MAX_QUEUED = 10_000


@dataclass(slots=True, eq=False)
class Session:
    """One connected node."""

    node_id: NodeId
    name: str
    spool_id: str
    capacity: Capacity
    key_sha256: str = ""  # of the key it proved; empty for a node that knows nothing of rosters
    outgoing: asyncio.Queue[pb.CoordinatorMessage | None] = field(
        default_factory=lambda: asyncio.Queue(maxsize=_MAX_QUEUED)
    )
    tasks: dict[int, asyncio.Future[Outcome]] = field(default_factory=dict)
    files: dict[int, asyncio.Future[frozenset[str]]] = field(default_factory=dict)
    probes: dict[int, asyncio.Future[pb.ProbeResult]] = field(default_factory=dict)
    closed: bool = False
    open_calls: int = 0  # of the rendezvous, not answered yet

    def send(self, message: pb.CoordinatorMessage) -> None:
        """Queue a message; a node that does not read for so long is cut off."""
        if self.closed:
            return
        try:
            self.outgoing.put_nowait(message)
        except asyncio.QueueFull:
            self.close()

    def close(self) -> None:
        """End the stream; every open question fails."""
        self.closed = True
        while not self.outgoing.empty():
            self.outgoing.get_nowait()
        self.outgoing.put_nowait(None)
        questions: list[asyncio.Future[Any]] = [*self.tasks.values(), *self.files.values(), *self.probes.values()]
        for waiting in questions:
            if not waiting.done():
                waiting.set_exception(_away(self.name))


def _away(name: str) -> Unreachable:
    return Unreachable(f"{name} went away", "it is asked again when it is back")


class Sessions(Mapping[NodeId, Session]):
    """By node id; a node that connects again replaces its older stream. See coordinator.peers for the rest: `links`,
    what was measured between two of them, by the sorted pair; `unanswered`, how often in a row the second of a pair did
    not answer a probe of the first."""

    def __init__(self) -> None:
        self.links: dict[tuple[NodeId, NodeId], LinkEstimate] = {}
        self.unanswered: dict[tuple[NodeId, NodeId], int] = {}
        self._sessions: dict[NodeId, Session] = {}
        self._numbers = itertools.count(1)

    def __getitem__(self, node_id: NodeId) -> Session:
        return self._sessions[node_id]

    def __iter__(self) -> Iterator[NodeId]:
        return iter(self._sessions)

    def __len__(self) -> int:
        return len(self._sessions)

    def add(self, session: Session) -> None:
        older = self._sessions.get(session.node_id)
        if older is not None:
            older.close()
        self._sessions[session.node_id] = session

    def remove(self, session: Session) -> bool:
        """False when a newer stream of the same node has already taken its place."""
        session.close()
        if self._sessions.get(session.node_id) is not session:
            return False
        del self._sessions[session.node_id]
        return True

    def send(self, node_id: NodeId, message: pb.CoordinatorMessage) -> bool:
        session = self._sessions.get(node_id)
        if session is None:
            return False
        session.send(message)
        return True

    def open_tasks(self, node_id: NodeId) -> int:
        """How many tasks a node was asked for and has not answered."""
        session = self._sessions.get(node_id)
        return len(session.tasks) if session else 0

    async def run_task(self, node_id: NodeId, task: Task, deadline_s: float) -> Outcome:
        """A short task outside any job's group. Raises Unreachable when the node goes away, DeadlineExceeded."""
        session = self._sessions.get(node_id)
        if session is None:
            raise NotFound(f"{node_id} is not connected", "hive nodes shows who is")
        if session.closed:
            raise _away(session.name)
        number = next(self._numbers)
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        session.tasks[number] = answer
        request = work_pb2.TaskRequest(call_id=number, task_json=documents.encode(task), deadline_s=deadline_s)
        session.send(pb.CoordinatorMessage(task_request=request))
        try:
            async with asyncio.timeout(deadline_s):
                return await answer
        except TimeoutError:
            raise DeadlineExceeded(
                f"{session.name} did not finish {task.kind.value} within {deadline_s:.0f} s",
                "hive nodes shows its state",
            ) from None
        finally:
            session.tasks.pop(number, None)
            if answer.cancelled():  # late, or the caller no longer wants it: the node need not go on
                session.send(pb.CoordinatorMessage(task_cancel=work_pb2.TaskCancel(call_id=number)))

    async def who_sees(self, node_id: NodeId, manifest: Manifest, deadline_s: float) -> frozenset[str]:
        """The digests of files that a node has itself, in its cache or at the path they came from."""
        session = self._sessions.get(node_id)
        if session is None or session.closed:
            return frozenset()
        number = next(self._numbers)
        answer: asyncio.Future[frozenset[str]] = asyncio.get_running_loop().create_future()
        session.files[number] = answer
        question = work_pb2.FileQuestion(call_id=number, manifest_json=documents.encode(manifest))
        session.send(pb.CoordinatorMessage(file_question=question))
        try:
            async with asyncio.timeout(deadline_s):
                return await answer
        except (TimeoutError, Unreachable):
            return frozenset()
        finally:
            session.files.pop(number, None)

    async def probe(self, node_id: NodeId, subject: str, peer_id: NodeId, deadline_s: float) -> pb.ProbeResult:
        """The link from one node to another as it measured it. Raises Unreachable, DeadlineExceeded."""
        session = self._sessions.get(node_id)
        if session is None or session.closed:
            raise Unreachable(f"{node_id} is not connected", "it is asked again when it is back")
        number = next(self._numbers)
        answer: asyncio.Future[pb.ProbeResult] = asyncio.get_running_loop().create_future()
        session.probes[number] = answer
        order = pb.ProbeOrder(call_id=number, subject=subject, peer_id=peer_id)
        session.send(pb.CoordinatorMessage(probe_order=order))
        try:
            async with asyncio.timeout(deadline_s):
                return await answer
        except TimeoutError:
            raise DeadlineExceeded(f"{session.name} did not finish a probe within {deadline_s:.0f} s") from None
        finally:
            session.probes.pop(number, None)

    def answer_task(self, node_id: NodeId, result: work_pb2.TaskResult) -> None:
        session = self._sessions.get(node_id)
        waiting = session.tasks.get(result.call_id) if session else None
        if waiting is None or waiting.done():
            return
        try:
            waiting.set_result(documents.decode(Outcome, result.outcome_json))
        except HiveError as error:  # it concerns the question, not the stream
            waiting.set_exception(error)

    def answer_files(self, node_id: NodeId, answer: work_pb2.FileAnswer) -> None:
        session = self._sessions.get(node_id)
        waiting = session.files.get(answer.call_id) if session else None
        if waiting is not None and not waiting.done():
            waiting.set_result(frozenset(answer.present_digests))

    def answer_probe(self, node_id: NodeId, result: pb.ProbeResult) -> None:
        session = self._sessions.get(node_id)
        waiting = session.probes.get(result.call_id) if session else None
        if waiting is not None and not waiting.done():
            waiting.set_result(result)

"""The node daemon put together: identity, session, agent, workers, fitness, advertisement, control socket.

Owns no decision: node.agent decides, this performs. Invariants: it never imports torch or numpy; SIGTERM hands over
what runs and ends within a bound, a second one at once; a second start in the same HIVE_HOME touches nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from typing import Any

from node import agent, control, probe
from node.attempt import Tools
from node.attempts import Attempts
from node.cache import BlobCache
from node.calibrate import CalibrationCache
from node.config import NodeConfig
from node.discovery import Advertiser, find_coordinator
from node.enrolment import Identity, Wanted
from node.errands import Errands
from node.faults import CannotWork, failed_outcome
from node.fitness import Fitness
from node.joining import Joining
from node.owner_view import OwnerView
from node.peer import PeerListeners, PeerService
from node.peer_client import PeerClient
from node.peer_files import PeerFiles
from node.peering import Peering
from node.runner import Runner, make_runner
from node.session import Session
from node.spool import Spool
from node.store_calls import StoreCalls
from node.transfers import Transfers
from node.workspace import Workspaces
from protos import documents, enrol, machine_bounds, version
from protos.artifact import Manifest
from protos.capacity import Capacity
from protos.errors import Conflict, HiveError
from protos.gen import membership_pb2 as pb
from protos.gen import work_pb2
from protos.ids import Fence, JobId
from protos.log import Log
from protos.states import Activity, AttemptState, StopMode
from protos.token import parse_token
from protos.work import HeldLease, Task

log = Log("hive.node.daemon")

_DRAIN_S = 60.0
_DRAIN_ALONE_S = 15.0  # the same without a coordinator: workers write their checkpoint, nothing can be sent
_GOODBYE_S = 2.0


async def run(config: NodeConfig) -> None:
    """Until SIGTERM, Ctrl-C or `hive-node leave`. Raises HiveError when this node cannot work at all."""
    door = _Door()
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(control.serve(config.home, door.handle))  # first: it locks the folder
        door.daemon = await Daemon.open(config, stack)
        await door.daemon.run()


class _Door:
    """Takes the owner's commands from the first moment on."""

    daemon: Daemon | None = None

    async def handle(self, command: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.daemon is None:
            raise Conflict("the daemon is starting", "ask again in a moment")
        return await self.daemon.handle_command(command, arguments)


class Daemon:
    def __init__(self, config: NodeConfig, runner: Runner, capacity: Capacity, identity: Identity) -> None:
        folder = config.home / "node"
        self._config = config
        self._identity = identity
        self._runner = runner
        self._spool = Spool(folder / "spool")
        self._session = Session(
            identity.current, self._hello, self._handle, self._delivered, self._beat, self._connected, self._spool
        )
        client = PeerClient(identity.held, self._capacity)
        transfers = Transfers(identity.held, config.caps.max_upload_bytes_per_s, client.fetch)
        self._cache = BlobCache(folder / "cache")
        self._workspaces = Workspaces(folder / "jobs", self._cache, transfers.fetch)
        self._errands = Errands(runner, self._workspaces, config.name)
        self._store_calls = StoreCalls(self._session.send)
        self._tools = Tools(runner, self._workspaces, transfers, self._store_calls, self._session.send_durable)
        self._attempts = Attempts(
            config.name,
            self._tools,
            lambda: self._fitness,
            self._background,
            lambda: self._peering.break_off(),
            self._changed,
        )
        calibrations = CalibrationCache(folder / "calibration")
        self._fitness = Fitness(
            config, capacity, runner, self._errands, transfers, self._session, calibrations, self._attempts.judge
        )
        service = PeerService(None, PeerFiles(self._cache, self._workspaces), transfers.limiter, self._is_working)
        self._peering = Peering(
            config.peer,
            PeerListeners(service, config.peer_port),
            service,
            client,
            identity.held,
            self._capacity,
            self._reached_at,
            transfers.limiter,
        )
        self._view = OwnerView(config.name, self._fitness, self._session, self._spool, runner, self._peering)
        self._advertiser: Advertiser | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._under_way: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._joining = Joining(identity, self._stop, self._waits_for_owner)
        self._hurry = False
        self._node_id = ""
        self._for_good = False

    @classmethod
    async def open(cls, config: NodeConfig, stack: contextlib.AsyncExitStack) -> Daemon:
        folder = config.home / "node"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        runner = await make_runner(config.caps, folder / "work", machine_bounds.available_cores())
        stack.push_async_callback(runner.close)
        found = probe.probe(config.home, config.caps, config.trusted_lan, runner.cpu_limit.mechanism)
        for note in found.notes:
            log.info("not probed", what=note)
        token = parse_token(config.token) if config.token else None
        wanted = Wanted(folder / "credential.json", config.name, token, config.coordinator)
        daemon = cls(config, runner, found.capacity, Identity(wanted, _find))
        stack.push_async_callback(daemon._tools.transfers.close)
        return daemon

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_stop)
        try:
            async with contextlib.AsyncExitStack() as stack:
                if self._config.advertise:
                    self._advertiser = Advertiser(
                        f"hive-{self._spool.spool_id}", self._view.announcement(self._node_id)
                    )
                    await stack.enter_async_context(self._advertiser)
                if await self._join():
                    await self._work()
        finally:
            await self._peering.close()
            self._spool.close()
        if self._for_good:
            (self._config.home / "node" / "credential.json").unlink(missing_ok=True)

    def _asked_to_stop(self) -> None:
        self._hurry = self._stop.is_set()  # asked before: what is not handed over by now stays here
        self._stop.set()
        self._attempts.quiet.set()

    async def _work(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                session = tasks.create_task(self._session.run())
                helpers = [
                    tasks.create_task(self._fitness.keep_measured()),
                    tasks.create_task(self._fitness.keep_fresh(self._sweep)),
                    tasks.create_task(self._view.keep_announced(self._advertiser, self._node_id)),
                    tasks.create_task(self._peering.keep_open()),
                ]
                await self._until_stopped(session)
                for task in (session, *helpers, *self._under_way):
                    task.cancel()
        except* HiveError as group:
            raise _first(group) from None

    async def _join(self) -> bool:
        """False when the owner stopped it first."""
        credential = await self._joining.member(may_wait=not self._config.token and self._advertiser is not None)
        if credential is None:
            return False
        self._node_id = credential.id
        log.info("member", node_id=credential.id, coordinator=credential.session_address)
        self._peering.joined(credential)
        await self._peering.follow()
        return True

    def _waits_for_owner(self) -> None:
        self._fitness.obstacle = "not joined yet"

    async def _until_stopped(self, session: asyncio.Task[None]) -> None:
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait([stopped, session], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if session.done():
            return  # its exception ends the group
        await self._hand_over("this node is leaving" if self._for_good else "this node is shutting down")
        told = self._session.is_connected
        leaving = pb.Leaving(reason="stopped by its owner", for_good=self._for_good)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                await self._session.finish(pb.NodeMessage(leaving=leaving))
        if self._for_good and not told:
            log.warning("left without a word: the coordinator is away", hint="there: hive node remove NODE")

    async def _hand_over(self, why: str) -> None:
        """Stop what runs with a checkpoint and wait, bounded, until its reports are with the coordinator."""
        self._attempts.apply(agent.OwnerAsked("drain", why))
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        while self._attempts or (self._session.is_connected and self._spool.waiting()):
            left_s = started_s + (_DRAIN_S if self._session.is_connected else _DRAIN_ALONE_S) - loop.time()
            if left_s <= 0 or self._hurry:
                log.warning("not everything was handed over", waiting=len(self._spool.waiting()))
                return
            self._attempts.quiet.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(1.0, left_s)):  # the connection may break meanwhile
                    await self._attempts.quiet.wait()

    # ---- what the session asks

    def _hello(self) -> pb.Hello:
        leases = {(lease.job_id, lease.fence, lease.rank): lease for lease in self._attempts.leases()}
        for message in self._spool.reports():  # of an earlier life of this daemon
            key = (JobId(message.job_id), Fence(message.fence), message.rank)
            leases.setdefault(key, HeldLease(*key, AttemptState(message.report.state)))
        activity, reason = self._attempts.activity()
        self._fitness.told = self._fitness.capacity
        return pb.Hello(
            protocol=version.PROTOCOL,
            minimum_protocol=version.MINIMUM_PROTOCOL,
            software=version.SOFTWARE,
            name=self._config.name,
            capacity_json=documents.encode(self._fitness.capacity),
            leases_json=documents.encode_as(tuple[HeldLease, ...], tuple(leases.values())),
            spool_id=self._spool.spool_id,
            activity=activity.value,
            activity_reason=reason,
            peers=True,
        )

    def _beat(self) -> pb.Heartbeat:
        activity, reason = self._attempts.activity()
        return pb.Heartbeat(load=os.getloadavg()[0], activity=activity.value, activity_reason=reason)

    def _changed(self) -> None:
        self._session.send_heartbeat()

    def _connected(self) -> None:
        self._identity.connected()
        self._errands.cancel_all()  # asked on an older stream: nobody waits for the answers
        self._store_calls.connected()
        self._fitness.connected()
        log.info("connected")

    def _delivered(self, durable: pb.Durable) -> None:
        """The coordinator has made it durable."""
        self._attempts.quiet.set()
        if durable.WhichOneof("body") != "report" or not durable.report.outcome_json:
            return
        job_id = JobId(durable.job_id)
        self._attempts.apply(agent.Acknowledged(job_id, Fence(durable.fence), durable.rank))
        if durable.report.state == AttemptState.DONE.value and job_id not in self._attempts.jobs:
            self._workspaces.close_job(job_id)

    async def _handle(self, message: pb.CoordinatorMessage) -> None:
        try:
            self._understand(message)
        except (HiveError, ValueError) as error:  # of another version: the rest of the stream may still make sense
            log.warning("message not understood", body=message.WhichOneof("body"), reason=str(error))

    def _understand(self, message: pb.CoordinatorMessage) -> None:
        match message.WhichOneof("body"):
            case "offer":
                self._attempts.apply(agent.Offered(documents.decode(Task, message.offer.task_json)))
            case "stop":
                stop = message.stop
                mode = StopMode(stop.mode)
                self._attempts.apply(agent.StopAsked(JobId(stop.job_id), Fence(stop.fence), mode, stop.reason))
            case "store_reply":
                self._store_calls.answered(message.store_reply)
            case "task_request":
                errand = self._background(self._errand(message.task_request))
                self._errands.asked(message.task_request.call_id, errand)
            case "task_cancel":
                self._errands.cancel(message.task_cancel.call_id)
            case "file_question":
                self._background(self._answer_files(message.file_question))
            case "roster":
                self._peering.take(message.roster)
            case "probe_order":
                self._background(self._probe(message.probe_order))
            case body:
                log.warning("unknown message", body=body)

    async def _errand(self, request: work_pb2.TaskRequest) -> None:
        activity, reason = self._attempts.activity()
        try:
            if activity is Activity.PAUSED:
                raise Conflict(f"{self._config.name} takes no work: {reason}")
            task = documents.decode(Task, request.task_json)
            async with asyncio.timeout(request.deadline_s):
                outcome = await self._errands.run(task, self._fitness.threads, self._fitness.device)
        except (HiveError, TimeoutError, OSError) as error:
            if isinstance(error, CannotWork):
                self._fitness.doubt(error)
            outcome = failed_outcome(error if isinstance(error, HiveError) else HiveError(str(error) or "too slow"))
        result = work_pb2.TaskResult(call_id=request.call_id, outcome_json=documents.encode(outcome))
        self._session.send(pb.NodeMessage(task_result=result))

    async def _answer_files(self, question: work_pb2.FileQuestion) -> None:
        present = await self._cache.present(documents.decode(Manifest, question.manifest_json))
        answer = work_pb2.FileAnswer(call_id=question.call_id, present_digests=sorted(present))
        self._session.send(pb.NodeMessage(file_answer=answer))

    async def _probe(self, order: pb.ProbeOrder) -> None:
        self._session.send(pb.NodeMessage(probe_result=await self._peering.answer(order)))

    def _capacity(self) -> Capacity:
        return self._fitness.capacity

    def _is_working(self) -> bool:
        return bool(self._attempts)

    def _reached_at(self, port: int | None) -> None:
        self._fitness.capacity = replace(self._fitness.capacity, peer_port=port)
        self._fitness.tell()

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        assert self._tasks is not None  # nothing is asked before run
        task = self._tasks.create_task(_guarded(work))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    def _sweep(self) -> None:
        self._workspaces.sweep(self._attempts.jobs)

    # ---- the owner's commands

    async def handle_command(self, command: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        match command:
            case "pause":
                self._attempts.apply(agent.OwnerAsked("pause", "paused by its owner"))
            case "resume":
                self._attempts.resume()
            case "drain":
                await self._hand_over("draining on its owner's word")
            case "leave":
                self._for_good = True
                self._stop.set()
            case "join":
                coordinator = arguments.get("coordinator")
                await self._joining.invite(self._config.home, str(arguments.get("token")), coordinator)
            case "bench":
                if self._attempts:
                    raise HiveError("this node is working", "pause it first: hive-node pause")
                await self._fitness.measure(again=True)
                return {"schema": version.SCHEMA, "capacity": documents.plain(self._fitness.capacity)}
            case "doctor":
                return {"schema": version.SCHEMA, "checks": self._view.checks(self._attempts.unfit, self._advertiser)}
        status = self._view.status(self._node_id, *self._attempts.activity(), self._attempts.leases())
        return {"schema": version.SCHEMA, "node": status}


async def _find(fingerprint: str) -> str:
    return await find_coordinator(fingerprint, lambda address: enrol.fetch_ca(address, fingerprint))


async def _guarded(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except HiveError as error:
        log.warning("failed", reason=error.message)
    except Exception:
        log.exception("failed")


def _first(group: BaseExceptionGroup[HiveError]) -> HiveError:
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise group


__all__ = ["Daemon", "run"]

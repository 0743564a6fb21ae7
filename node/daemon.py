"""The node daemon put together: identity, session, agent, workers, capacity, advertisement, control socket.

Owns no decision: node.agent decides, this performs. Invariants: it never imports torch or numpy; SIGTERM hands over
what runs and ends within a bound; a second start in the same HIVE_HOME is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import pwd
import signal
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from typing import Any

import structlog

from node import agent, calibrate, control, networks, probe
from node.attempt import Attempt, failed_outcome
from node.cache import BlobCache
from node.calibration_run import calibrate_machine
from node.config import NodeConfig
from node.discovery import Advertiser, find_coordinator
from node.enrolment import Identity, Wanted
from node.errands import Errands
from node.runner import Runner, make_runner
from node.session import Session
from node.spool import Spool
from node.store_calls import StoreCalls
from node.transfers import Transfers
from node.workspace import Workspaces
from protos import documents, enrol, version
from protos.announcement import NodeAnnouncement
from protos.artifact import Manifest
from protos.capacity import Capacity
from protos.credentials import Credential
from protos.errors import AccessError, Conflict, HiveError
from protos.gen import membership_pb2 as pb
from protos.gen import work_pb2
from protos.ids import Fence, JobId
from protos.states import Activity, AttemptState, StopMode
from protos.token import parse_token
from protos.work import HeldLease, Outcome, Task

log = structlog.get_logger()

_DRAIN_S = 60.0
_REFRESH_S = 15.0
_CHANGED = 0.3  # a rate that moved by this share is told to the coordinator


async def run(config: NodeConfig) -> None:
    """Until SIGTERM, Ctrl-C or `hive-node leave`. Raises HiveError when this node cannot work at all."""
    async with contextlib.AsyncExitStack() as stack:
        daemon = await Daemon.open(config, stack)
        await stack.enter_async_context(control.serve(config.home, daemon.handle_command))
        await daemon.run()


class Daemon:
    def __init__(self, config: NodeConfig, runner: Runner, capacity: Capacity, identity: Identity) -> None:
        folder = config.home / "node"
        self._config = config
        self._identity = identity
        self._runner = runner
        self.capacity = capacity
        self._state = agent.State()
        self._measuring = "starting"
        self._spool = Spool(folder / "spool")
        self._session = Session(identity.current, self._hello, self._handle, self._beat, self._connected, self._spool)
        self._transfers = Transfers(identity.held, config.caps.max_upload_bytes_per_s)
        self._cache = BlobCache(folder / "cache")
        self._workspaces = Workspaces(folder / "jobs", self._cache, self._transfers.fetch)
        self._errands = Errands(runner, self._workspaces, config.name)
        self._store_calls = StoreCalls(self._session.send)
        self._calibrations = calibrate.CalibrationCache(folder / "calibration")
        self._attempts: dict[tuple[JobId, Fence], Attempt] = {}
        self._advertiser: Advertiser | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._stop = asyncio.Event()
        self._quiet = asyncio.Event()
        self._told: Capacity | None = None
        self._node_id = ""
        self._for_good = False
        self._invited: asyncio.Future[Credential] | None = None  # while it waits for a token

    @classmethod
    async def open(cls, config: NodeConfig, stack: contextlib.AsyncExitStack) -> Daemon:
        folder = config.home / "node"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        runner = await make_runner(config.caps, folder / "work", probe.available_cores())
        stack.push_async_callback(runner.close)
        found = probe.probe(config.home, config.caps, config.trusted_lan, runner.cpu_limit.mechanism)
        for note in found.notes:
            log.info("not probed", what=note)
        token = parse_token(config.token) if config.token else None
        wanted = Wanted(folder / "credential.json", config.name, token, config.coordinator)
        daemon = cls(config, runner, found.capacity, Identity(wanted, _find))
        stack.push_async_callback(daemon._transfers.close)
        return daemon

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        async with contextlib.AsyncExitStack() as stack:
            if self._config.advertise:
                self._advertiser = Advertiser(f"hive-{self._spool.spool_id}", self._announcement())
                await stack.enter_async_context(self._advertiser)
            if not await self._join():
                return
            try:
                async with asyncio.TaskGroup() as tasks:
                    self._tasks = tasks
                    session = tasks.create_task(self._session.run())
                    helpers = [
                        tasks.create_task(self._measure()),
                        tasks.create_task(self._refresh()),
                    ]
                    await self._until_stopped(session)
                    for task in (session, *helpers):
                        task.cancel()
                    for attempt in list(self._attempts.values()):
                        await attempt.kill()
            except* HiveError as group:
                raise _first(group) from None
            finally:
                self._spool.close()
        if self._for_good:
            (self._config.home / "node" / "credential.json").unlink(missing_ok=True)

    async def _join(self) -> bool:
        """False when the owner stopped it first. Without a token it shows itself on the LAN and waits for its owner."""
        stopped = asyncio.create_task(self._stop.wait())
        joining = asyncio.create_task(self._identity.current())
        try:
            await asyncio.wait([joining, stopped], return_when=asyncio.FIRST_COMPLETED)
            if not joining.done():
                return False
            try:
                credential = await joining
            except AccessError as error:
                if self._config.token or self._advertiser is None:
                    raise
                self._measuring = "not joined yet"
                log.warning("not joined", reason=error.message, hint=f"{error.hint}; hive nodes --lan there lists us")
                self._invited = asyncio.get_running_loop().create_future()
                events: list[asyncio.Future[Any]] = [self._invited, stopped]
                await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
                if not self._invited.done():
                    return False
                credential = self._invited.result()
        finally:
            joining.cancel()
            stopped.cancel()
            self._invited = None
        self._node_id = credential.id
        if self._advertiser is not None:
            await self._advertiser.update(self._announcement())
        log.info("member", node_id=credential.id, coordinator=credential.session_address)
        return True

    async def _until_stopped(self, session: asyncio.Task[None]) -> None:
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait([stopped, session], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if session.done():
            return  # its exception ends the group
        await self._hand_over("this node is leaving" if self._for_good else "this node is shutting down")
        self._session.send(pb.NodeMessage(leaving=pb.Leaving(reason="stopped by its owner", for_good=self._for_good)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await self._session.drained()

    async def _hand_over(self, why: str) -> None:
        """Stop what runs with a checkpoint and wait, bounded, until its reports are with the coordinator."""
        self._apply(agent.OwnerAsked("drain", why))
        try:
            async with asyncio.timeout(_DRAIN_S if self._session.is_connected else 5.0):
                while self._attempts or (self._session.is_connected and self._spool.waiting()):
                    self._quiet.clear()
                    await self._quiet.wait()
        except TimeoutError:
            log.warning("not everything was handed over", waiting=len(self._spool.waiting()))

    # ---- what the session asks

    def _activity(self) -> tuple[Activity, str]:
        activity, reason = self._state.activity
        if self._measuring and activity is not Activity.BUSY:
            return Activity.PAUSED, self._measuring
        return activity, reason

    def _hello(self) -> pb.Hello:
        leases = {(lease.job_id, lease.fence): lease for lease in self._state.leases()}
        for message in self._spool.reports():  # of an earlier life of this daemon
            key = (JobId(message.job_id), Fence(message.fence))
            state = AttemptState(message.report.state)
            leases.setdefault(key, HeldLease(key[0], key[1], message.rank, state))
        activity, reason = self._activity()
        self._told = self.capacity
        return pb.Hello(
            protocol=version.PROTOCOL,
            minimum_protocol=version.MINIMUM_PROTOCOL,
            software=version.SOFTWARE,
            name=self._config.name,
            capacity_json=documents.encode(self.capacity),
            leases_json=documents.encode_as(tuple[HeldLease, ...], tuple(leases.values())),
            spool_id=self._spool.spool_id,
            activity=activity.value,
            activity_reason=reason,
        )

    def _beat(self) -> pb.Heartbeat:
        activity, reason = self._activity()
        return pb.Heartbeat(load=os.getloadavg()[0], activity=activity.value, activity_reason=reason)

    def _connected(self) -> None:
        self._identity.connected()
        self._store_calls.connected()
        log.info("connected")

    async def _handle(self, message: pb.CoordinatorMessage) -> None:
        match message.WhichOneof("body"):
            case "offer":
                self._apply(agent.Offered(documents.decode(Task, message.offer.task_json)))
            case "stop":
                stop = message.stop
                mode = StopMode(stop.mode)
                self._apply(agent.StopAsked(JobId(stop.job_id), Fence(stop.fence), mode, stop.reason))
            case "acknowledged":
                for durable in self._spool.acknowledge(message.acknowledged.seq):
                    if durable.WhichOneof("body") == "report" and durable.report.outcome_json:
                        self._reported(durable)
                self._quiet.set()
            case "store_reply":
                self._store_calls.answered(message.store_reply)
            case "task_request":
                self._background(self._errand(message.task_request))
            case "file_question":
                self._background(self._answer_files(message.file_question))
            case "drain":
                action = "resume" if message.drain.undo else "drain"
                self._apply(agent.OwnerAsked(action, message.drain.reason))
            case body:
                log.warning("unknown message", body=body)

    def _reported(self, durable: pb.Durable) -> None:
        job_id = JobId(durable.job_id)
        self._apply(agent.Acknowledged(job_id, Fence(durable.fence)))
        if durable.report.state == AttemptState.DONE.value:
            self._workspaces.close_job(job_id)

    async def _errand(self, request: work_pb2.TaskRequest) -> None:
        try:
            task = documents.decode(Task, request.task_json)
            async with asyncio.timeout(request.deadline_s):
                outcome = await self._errands.run(task, self._threads(), self._device())
        except (HiveError, TimeoutError, OSError) as error:
            outcome = failed_outcome(error if isinstance(error, HiveError) else HiveError(str(error) or "too slow"))
        result = work_pb2.TaskResult(call_id=request.call_id, outcome_json=documents.encode(outcome))
        self._session.send(pb.NodeMessage(task_result=result))

    async def _answer_files(self, question: work_pb2.FileQuestion) -> None:
        present = await self._cache.present(documents.decode(Manifest, question.manifest_json))
        answer = work_pb2.FileAnswer(call_id=question.call_id, present_digests=sorted(present))
        self._session.send(pb.NodeMessage(file_answer=answer))

    # ---- the agent's effects

    def _apply(self, event: agent.Event) -> None:
        before = self._activity()
        decision = agent.step(self._state, event)
        self._state = decision.state
        for effect in decision.effects:
            match effect:
                case agent.Start(task):
                    self._start(task)
                case agent.StopWorker(job_id, fence, mode, why):
                    attempt = self._attempts.get((job_id, fence))
                    if attempt is not None:
                        log.info("stopping", job=job_id, mode=mode.value, why=why)
                        self._background(attempt.stop(mode))
                case agent.Report(job_id, fence, rank, state, outcome):
                    report = pb.Durable(job_id=job_id, fence=fence, rank=rank)
                    report.report.state = state.value
                    if outcome is not None:
                        report.report.outcome_json = documents.encode(outcome)
                    self._session.send_durable(report)
        if self._activity() != before:
            self._session.send(pb.NodeMessage(heartbeat=self._beat()))

    def _start(self, task: Task) -> None:
        key = (task.job_id, task.fence)
        # By address: an interface may have several, and its owner named one. Empty (not trusted here) binds nowhere.
        address = next((n.address for n in self.capacity.networks if n.cidr == task.network), "")

        def ended(outcome: Outcome) -> None:
            self._attempts.pop(key, None)
            self._apply(agent.WorkerEnded(*key, outcome))
            self._quiet.set()

        attempt = Attempt(
            task,
            self._config.name,
            address,
            self._threads(),
            self._device(),
            self._runner,
            self._workspaces,
            self._transfers,
            self._store_calls,
            self._session,
            ready=lambda: self._apply(agent.WorkerReady(*key)),
            progressed=lambda step: self._apply(agent.WorkerProgressed(*key, step)),
            ended=ended,
        )
        self._attempts[key] = attempt
        self._background(attempt.run())

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._tasks is not None  # nothing is asked before run
        self._tasks.create_task(_guarded(work))

    def _threads(self) -> int:
        return max(1, round(self.capacity.cores))

    def _device(self) -> str:
        return f"cuda:{self.capacity.gpus[0].index}" if self.capacity.gpus else "cpu"

    # ---- capacity

    async def _measure(self, again: bool = False) -> None:
        """How fast this machine is under its caps: from the cache, or measured when it is this daemon's turn."""
        self._measuring = "measuring how fast this machine is"
        try:
            self.capacity = await calibrate_machine(
                self.capacity, self._calibrations, self._errands, self._threads(), self._device(), again=again
            )
        except HiveError as error:
            log.warning("not measured", reason=error.message)
        finally:
            self._measuring = ""
        self._tell_capacity()
        self._session.send(pb.NodeMessage(heartbeat=self._beat()))

    def _tell_capacity(self) -> None:
        self._told = self.capacity
        self._session.send(pb.NodeMessage(capacity_json=documents.encode(self.capacity)))

    async def _refresh(self) -> None:
        """Look again at what changes: round trip, bandwidth once per connection, disk, load, battery."""
        probed_for: object = None
        while True:
            await asyncio.sleep(1.0 if self._session.rtt_s is None else _REFRESH_S)
            rate = self.capacity.bandwidth_bytes_per_s
            if self._session.is_connected and probed_for is not self._session.connection:
                with contextlib.suppress(HiveError):
                    rate = await self._transfers.bandwidth_bytes_per_s()
                    probed_for = self._session.connection
            config = self._config
            trusted = networks.still_here(config.trusted_lan, networks.interface_addresses())
            now = probe.capacity(config.home, config.caps, trusted, self._runner.cpu_limit.mechanism)
            self.capacity = replace(
                self.capacity,
                rtt_s=self._session.rtt_s,
                bandwidth_bytes_per_s=rate,
                disk_free_bytes=now.disk_free_bytes,
                networks=now.networks,
                load=now.load,
                battery=now.battery,
                on_mains=now.on_mains,
                user_idle_s=now.user_idle_s,
                gpus=now.gpus,
            )
            if _moved(self._told, self.capacity):
                self._tell_capacity()
            if self._advertiser is not None:
                await self._advertiser.update(self._announcement())
            self._workspaces.sweep(frozenset(job_id for job_id, _ in self._attempts))

    def _announcement(self) -> NodeAnnouncement:
        best = max((rate.best for rate in self.capacity.flops.values()), default=0.0)
        return NodeAnnouncement(
            id=self._node_id,
            name=self._config.name,
            version=version.SOFTWARE,
            cores=self.capacity.cores,
            memory_bytes=self.capacity.memory_bytes,
            gpu=self.capacity.gpus[0].name if self.capacity.gpus else "",
            gflops=best / 1e9,
            joined=bool(self._node_id),
        )

    # ---- the owner's commands

    async def handle_command(self, command: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        match command:
            case "pause" | "resume":
                self._apply(agent.OwnerAsked(command, "paused by its owner"))
            case "drain":
                await self._hand_over("draining on its owner's word")
            case "leave":
                self._for_good = True
                self._stop.set()
            case "join":
                await self._accept_invitation(str(arguments.get("token")), arguments.get("coordinator"))
            case "bench":
                if self._attempts:
                    raise HiveError("this node is working", "pause it first: hive-node pause")
                await self._measure(again=True)
                return {"schema": version.SCHEMA, "capacity": documents.plain(self.capacity)}
            case "doctor":
                return {"schema": version.SCHEMA, "checks": self._checks()}
        return {"schema": version.SCHEMA, "node": self._status()}

    async def _accept_invitation(self, token: str, coordinator: str | None) -> None:
        """The owner typed the command that `hive nodes --lan` showed, where this daemon already waits."""
        if self._invited is None or self._invited.done():
            raise Conflict(
                f"a node daemon already runs in {self._config.home}",
                "stop it with hive-node leave, or give this one its own folder with --home",
            )
        credential = await self._identity.invited(parse_token(token), coordinator)
        if not self._invited.done():
            self._invited.set_result(credential)

    def _status(self) -> dict[str, Any]:
        activity, reason = self._activity()
        return {
            "id": self._node_id,
            "name": self._config.name,
            "link": "CONNECTED" if self._session.is_connected else "DISCONNECTED",
            "activity": activity.value,
            "reason": reason or self._session.problem,
            "user": pwd.getpwuid(os.geteuid()).pw_name,
            "cpu_mechanism": self._runner.cpu_limit.mechanism,
            "pid": os.getpid(),
            "jobs": documents.plain_as(tuple[HeldLease, ...], self._state.leases()),
        }

    def _checks(self) -> list[dict[str, Any]]:
        limit = self._runner.cpu_limit
        lan = self._advertiser.problem if self._advertiser is not None else "not announced (--no-advertise)"
        trusted = [network.cidr for network in self.capacity.networks if network.cidr != "loopback"]
        measured = {name: f"{rate.best / 1e9:.1f}" for name, rate in self.capacity.flops.items()}
        return [
            _check("session", self._session.is_connected, self._session.problem or "connected"),
            _check("cpu cap", True, f"{limit.mechanism}: {limit.reason}"),
            _check("memory cap", True, f"{self.capacity.memory_bytes / 2**30:.1f} GiB, watched on the worker tree"),
            _check("speed", bool(measured), f"GFLOP/s: {measured}" if measured else self._measuring or "not measured"),
            _check("trusted networks", True, ", ".join(trusted) or "none but loopback (see --trusted-lan)"),
            _check("zeroconf", not (self._advertiser and lan), lan or "announced"),
            _check("spool", True, f"{len(self._spool.waiting())} messages wait for the coordinator"),
        ]


def _check(name: str, ok: bool, message: str) -> dict[str, Any]:
    return {"name": name, "ok": ok, "message": message, "hint": ""}


async def _find(fingerprint: str) -> str:
    return await find_coordinator(fingerprint, lambda address: enrol.fetch_ca(address, fingerprint))


def _moved(told: Capacity | None, now: Capacity) -> bool:
    if told is None or told.networks != now.networks or len(told.gpus) != len(now.gpus):
        return True
    pairs = ((told.rtt_s, now.rtt_s), (told.bandwidth_bytes_per_s, now.bandwidth_bytes_per_s))
    for before, after in pairs:
        if (before is None) != (after is None):
            return True
        if before and after and abs(math.log(after / before)) > _CHANGED:
            return True
    return told.on_mains != now.on_mains


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

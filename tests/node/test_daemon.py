"""The daemon with real workers, against a coordinator whose every word the test says, over TLS on loopback."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from node_bench import make_task

from coordinator import listeners
from coordinator.artifacts import ArtifactsService
from coordinator.authority import open_authority
from coordinator.blobs import BlobStore
from node import calibrate, control
from node import daemon as daemons
from node.config import NodeConfig
from node.cpu_limit import NoLimit
from node.daemon import Daemon
from node.enrolment import Identity, Wanted
from node.limits import Caps
from node.runner import Runner
from protos import credentials, documents
from protos.artifact import FileEntry, Manifest
from protos.capacity import Calibration, Capacity, Rate
from protos.credentials import Credential
from protos.errors import Conflict
from protos.gen import artifacts_pb2_grpc, membership_pb2_grpc, work_pb2
from protos.gen import membership_pb2 as pb
from protos.ids import Digest, Fence, JobId
from protos.states import AttemptState, Reason
from protos.token import Role
from protos.work import HeldLease, Outcome, Task, TaskKind

CAPACITY = Capacity("host", "machine", "linux", "3.11", 1.0, 1, 1, 1, 1)
RATE = Rate(1e9, 1e9, 0.0)
MEASURED = Calibration({"fp32": RATE}, RATE, {}, "2", 1, 1.0)


class Coordinator(membership_pb2_grpc.MembershipServicer):
    """Acknowledges nothing by itself. What a node says is kept until a test asks for it."""

    def __init__(self) -> None:
        self.context: Any = None
        self.hello = pb.Hello()
        self.connected = asyncio.Event()
        self.heard: list[pb.NodeMessage] = []
        self.more = asyncio.Event()
        self.closed = asyncio.Event()

    async def Attach(self, messages: Any, context: Any) -> None:
        self.hello = (await anext(aiter(messages))).hello
        self.context = context
        await self.say(welcome=pb.Welcome(protocol=1, heartbeat_s=0.05, lease_ttl_s=5.0))
        self.connected.set()
        async for message in messages:
            self.heard.append(message)
            self.more.set()
        self.closed.set()

    async def Probe(self, request: pb.Echo, context: Any) -> pb.Echo:
        return request

    async def say(self, **body: Any) -> None:
        await self.context.write(pb.CoordinatorMessage(**body))

    async def hear(self, kind: str, what: Callable[[Any], bool] = lambda body: True) -> Any:
        """The first message of a kind that fits; it is heard once."""
        while True:
            for at, message in enumerate(self.heard):
                if message.WhichOneof("body") == kind and what(getattr(message, kind)):
                    return getattr(self.heard.pop(at), kind)
            self.more.clear()
            await self.more.wait()

    async def beat(self, activity: str) -> str:
        """Waits for a heartbeat with this activity; its reason."""
        self.heard = [message for message in self.heard if message.WhichOneof("body") != "heartbeat"]
        beat = await self.hear("heartbeat", lambda beat: beat.activity == activity)
        return str(beat.activity_reason)

    async def report(self, state: AttemptState, fence: int = 1) -> tuple[pb.Durable, Outcome | None]:
        durable = await self.hear("durable", lambda d: d.report.state == state.value and d.fence == fence)
        document = durable.report.outcome_json
        return durable, documents.decode(Outcome, document) if document else None

    async def offer(self, task: Task) -> None:
        await self.say(offer=work_pb2.Offer(task_json=documents.encode(task), ttl_s=5.0))


@dataclass
class Owner:
    """A node's owner: the daemon, its files, and how it ended."""

    home: Path
    coordinator: Coordinator
    daemon: Daemon
    runner: Runner
    running: asyncio.Task[None]
    credential: Credential = field(repr=False)

    async def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        return dict(await self.daemon.handle_command(command, arguments))


def task(what: str, fence: int = 1, **changes: Any) -> Task:
    return replace(make_task(what), fence=Fence(fence), **changes)


@asynccontextmanager
async def owner(folder: Path, entry: str = "worker_entries:run", measured: bool = True) -> AsyncIterator[Owner]:
    async def anyone(member_id: str) -> bool:
        return True

    coordinator, authority = Coordinator(), open_authority(folder / "coordinator")
    server = listeners.session_server(anyone)
    membership_pb2_grpc.add_MembershipServicer_to_server(coordinator, server)  # type: ignore[no-untyped-call]
    artifacts = ArtifactsService(BlobStore(folder / "blobs"))
    artifacts_pb2_grpc.add_ArtifactsServicer_to_server(artifacts, server)  # type: ignore[no-untyped-call]
    address = f"127.0.0.1:{listeners.bind_session(server, authority, '127.0.0.1', 0)}"
    home = folder / "home"
    credential = authority.credential(Role.NODE, "box", address, address, time.time())
    credentials.save(credential, home / "node" / "credential.json")
    if measured:
        digest = calibrate.hardware_digest(CAPACITY, calibrate.cpu_model(), calibrate.torch_version())
        calibrate.CalibrationCache(home / "node" / "calibration").store(digest, MEASURED)

    async def nowhere(fingerprint: str) -> str:
        raise AssertionError("nothing is searched for")

    (home / "node" / "work").mkdir()
    runner = Runner(Caps(), home / "node" / "work", NoLimit("not limited in this test"), entry=entry)
    config = NodeConfig(home, "box", advertise=False)
    identity = Identity(Wanted(home / "node" / "credential.json", "box"), nowhere)
    async with AsyncExitStack() as stack:
        await server.start()
        stack.push_async_callback(server.stop, 0)
        stack.push_async_callback(runner.close)
        daemon = Daemon(config, runner, CAPACITY, identity)
        stack.push_async_callback(daemon._tools.transfers.close)
        running = asyncio.create_task(daemon.run())
        made = Owner(home, coordinator, daemon, runner, running, credential)
        try:
            await coordinator.connected.wait()
            yield made
        finally:
            running.cancel()
            await asyncio.wait({running})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def start(body: Callable[[Owner], Awaitable[None]], **options: Any) -> None:
        async def main() -> None:
            async with asyncio.timeout(60), owner(tmp_path, **options) as made:
                await body(made)

        asyncio.run(main())

    return start


def test_a_job_from_its_offer_to_the_last_acknowledgement(run: Callable[..., None]) -> None:
    async def body(made: Owner) -> None:
        far = made.coordinator
        await far.beat("IDLE")
        await far.offer(task("says_everything"))
        for state in (AttemptState.ACCEPTED, AttemptState.READY, AttemptState.RUNNING):
            await far.report(state)
        durable, outcome = await far.report(AttemptState.DONE)
        assert outcome is not None and [a.name for a in outcome.artifacts] == ["model.safetensors"]
        jobs = made.home / "node" / "jobs"
        assert [path.name for path in jobs.iterdir()] == ["j-aaaaaaaa"]
        await far.say(acknowledged=pb.Acknowledged(seq=durable.seq))
        await far.beat("IDLE")
        assert list(jobs.iterdir()) == [] and (await made.ask("status"))["node"]["jobs"] == []

    run(body)


def test_a_late_acknowledgement_does_not_take_the_files_of_the_next_group(run: Callable[..., None]) -> None:
    """1 group 1 is done, its report is not acknowledged yet 2 group 2 starts here 3 the acknowledgement comes."""

    async def body(made: Owner) -> None:
        far = made.coordinator
        await far.offer(task("says_everything"))
        durable, _ = await far.report(AttemptState.DONE)
        await far.offer(task("waits_for_stop", 2))
        await far.report(AttemptState.READY, 2)
        await far.say(acknowledged=pb.Acknowledged(seq=durable.seq))
        await far.beat("BUSY")
        folder = made.home / "node" / "jobs" / "j-aaaaaaaa"
        assert (folder / "attempt-2-0" / "output").is_dir() and (folder / "checkpoints").is_dir()

    run(body)


def test_a_machine_on_which_no_worker_starts_says_why_and_refuses_work(run: Callable[..., None]) -> None:
    async def body(made: Owner) -> None:
        far = made.coordinator
        reason = await far.beat("PAUSED")
        while not reason.startswith("cannot work"):
            reason = await far.beat("PAUSED")
        assert "no_such_module" in reason and "pip install" in reason
        await far.offer(task("returns"))
        _, outcome = await far.report(AttemptState.FAILED)
        assert outcome is not None and outcome.fault is not None
        assert (outcome.fault.reason, outcome.fault.retryable) == (Reason.NODE_LEFT, True)
        assert outcome.fault.message == reason
        identify = replace(task("returns"), kind=TaskKind.IDENTIFY)
        await far.say(task_request=work_pb2.TaskRequest(call_id=7, task_json=documents.encode(identify), deadline_s=30))
        result = await far.hear("task_result")
        refused = documents.decode(Outcome, result.outcome_json)
        assert refused.fault is not None and refused.fault.retryable and reason in refused.fault.message
        checks = {check["name"]: check for check in (await made.ask("doctor"))["checks"]}
        assert not checks["workers"]["ok"] and "no_such_module" in checks["workers"]["message"]
        await made.ask("resume")  # the owner's word does not mend it
        assert (await far.beat("PAUSED")).startswith(("cannot work", "measuring"))

    run(body, entry="no_such_module:run", measured=False)


def test_workers_that_stop_starting_after_a_good_start_are_noticed_by_the_first_task(run: Callable[..., None]) -> None:
    async def body(made: Owner) -> None:
        far = made.coordinator
        await far.beat("IDLE")  # measured before: nothing was started yet
        await far.offer(task("returns"))
        _, outcome = await far.report(AttemptState.FAILED)
        assert outcome is not None and outcome.fault is not None and outcome.fault.retryable
        assert (await far.beat("PAUSED")).startswith("cannot work")

    run(body, entry="no_such_module:run")


def test_pausing_ends_what_runs_and_refuses_what_comes_until_the_owner_resumes(run: Callable[..., None]) -> None:
    async def body(made: Owner) -> None:
        far = made.coordinator
        await far.offer(task("holds_when_stopped"))
        await far.report(AttemptState.ACCEPTED)
        await far.hear("durable", lambda durable: bool(durable.checkpoint_json))
        assert (await made.ask("pause"))["node"]["activity"] == "PAUSED"
        _, outcome = await far.report(AttemptState.FAILED)
        assert outcome is not None and outcome.held_step == 5
        await far.offer(task("returns", 2))
        _, refused = await far.report(AttemptState.FAILED, 2)
        assert refused is not None and refused.fault is not None and refused.fault.message == "paused by its owner"
        await made.ask("resume")
        await far.beat("IDLE")

    run(body)


def test_leaving_hands_over_says_goodbye_and_forgets_who_it_was(run: Callable[..., None]) -> None:
    async def body(made: Owner) -> None:
        far = made.coordinator
        await far.offer(task("holds_when_stopped"))
        await far.report(AttemptState.ACCEPTED)
        await far.hear("durable", lambda durable: bool(durable.checkpoint_json))
        await made.ask("leave")
        durable, outcome = await far.report(AttemptState.FAILED)
        assert outcome is not None and outcome.held_step == 5
        handed_over = await far.hear("durable", lambda durable: bool(durable.checkpoint_json))
        await far.say(acknowledged=pb.Acknowledged(seq=max(durable.seq, handed_over.seq)))
        leaving = await far.hear("leaving")
        assert leaving.for_good
        await made.running
        assert far.closed.is_set() and not (made.home / "node" / "credential.json").exists()

    run(body)


def test_a_second_signal_ends_a_drain_at_once(run: Callable[..., None]) -> None:
    """1 SIGTERM: what runs is asked to end, but it does not listen 2 SIGTERM again: the daemon ends, the worker too."""

    async def body(made: Owner) -> None:
        far = made.coordinator
        await far.offer(task("ignores_stop"))
        await far.report(AttemptState.READY)
        worker = made.runner.workers[0]
        os.kill(os.getpid(), signal.SIGTERM)
        await far.beat("PAUSED")
        assert not made.running.done()
        os.kill(os.getpid(), signal.SIGTERM)
        await made.running
        assert not worker.running and (made.home / "node" / "credential.json").exists()

    run(body)


def test_a_signal_during_a_download_that_does_not_end_is_obeyed(run: Callable[..., None]) -> None:
    async def body(made: Owner) -> None:
        far = made.coordinator
        absent = Manifest((FileEntry("model.py", Digest("a" * 64), 4),))
        await far.offer(task("returns", code=absent))
        await far.report(AttemptState.ACCEPTED)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        await made.running

    run(body)


def test_what_cannot_be_understood_does_not_end_the_session(run: Callable[..., None]) -> None:
    async def body(made: Owner) -> None:
        far = made.coordinator
        await far.say(offer=work_pb2.Offer(task_json=b"{"))
        await far.say(stop=work_pb2.Stop(job_id="j-1", fence=1, mode="gently"))
        await far.say(file_question=work_pb2.FileQuestion(call_id=1, manifest_json=b"{"))
        await far.say(task_request=work_pb2.TaskRequest(call_id=2, task_json=b"{", deadline_s=1.0))
        assert (await far.hear("task_result")).call_id == 2
        await far.offer(replace(task("returns"), job_id=JobId("../../j-evil")))
        _, outcome = await far.report(AttemptState.FAILED)
        assert outcome is not None and outcome.fault is not None and "not the id of a job" in outcome.fault.message
        await far.offer(task("returns"))
        await far.report(AttemptState.DONE)

    run(body)


def test_results_of_an_earlier_life_are_presented_again(run: Callable[..., None], tmp_path: Path) -> None:
    async def body(made: Owner) -> None:
        far = made.coordinator
        await far.offer(task("returns"))
        await far.report(AttemptState.DONE)  # never acknowledged
        far.connected.clear()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        await made.running
        identity = Identity(Wanted(made.home / "node" / "credential.json", "box"), lambda fingerprint: asyncio.sleep(0))
        again = Daemon(NodeConfig(made.home, "box", advertise=False), made.runner, CAPACITY, identity)
        running = asyncio.create_task(again.run())
        await far.connected.wait()
        leases = documents.decode(tuple[HeldLease, ...], far.hello.leases_json)
        assert [(lease.job_id, lease.fence, lease.state) for lease in leases] == [("j-aaaaaaaa", 1, AttemptState.DONE)]
        await far.report(AttemptState.DONE)
        running.cancel()
        await asyncio.wait({running})
        await again._tools.transfers.close()

    run(body)


def test_a_second_daemon_in_the_same_home_touches_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        async def handle(command: str, arguments: Any) -> dict[str, Any]:
            return {}

        async with control.serve(tmp_path, handle):
            before = sorted(path.name for path in (tmp_path / "node").iterdir())
            with pytest.raises(Conflict, match="already runs"):
                await daemons.run(NodeConfig(tmp_path, "box", advertise=False))
            assert sorted(path.name for path in (tmp_path / "node").iterdir()) == before

    asyncio.run(body())

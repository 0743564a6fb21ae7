"""The client and the following verbs against a Jobs service on a real gRPC server: errors, restarts, exit codes."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.bundle import bundle
from coordinator.cli import ending
from coordinator.client import Client
from coordinator.follow import EventRecord, Patience, delay_s, resumed
from coordinator.jobfile import read_job
from protos import dial
from protos.errors import AccessError, ErrorCode, HiveError, NotFound, Unreachable
from protos.gen import artifacts_pb2, artifacts_pb2_grpc, jobs_pb2, jobs_pb2_grpc

DEADLINE_S = 20.0


def job_event(seq: int, state: str) -> jobs_pb2.Event:
    payload = json.dumps({"state": state, "message": f"now {state.lower()}"}).encode()
    return jobs_pb2.Event(seq=seq, time_unix_s=float(seq), kind="job", job_id="j-1", payload_json=payload)


def progress_event(seq: int, step: int) -> jobs_pb2.Event:
    payload = json.dumps({"step": step, "steps_total": 10, "epochs_total": 1, "stage": "train", "loss": 1.0 / step})
    return jobs_pb2.Event(seq=seq, time_unix_s=float(seq), kind="progress", job_id="j-1", payload_json=payload.encode())


@dataclass
class Coordinator(jobs_pb2_grpc.JobsServicer, artifacts_pb2_grpc.ArtifactsServicer):
    """Holds events, a job and blobs like the real one's database: it outlives the servers that show it."""

    log: list[jobs_pb2.Event] = field(default_factory=list)
    log_text: bytes = b""
    job: dict[str, Any] = field(default_factory=lambda: {"id": "j-1", "name": "x", "state": "RUNNING", "artifacts": []})
    submitted: dict[str, str] = field(default_factory=dict)
    refuse: HiveError | None = None
    stop_after: int = 1_000_000  # events shown by one stream before it breaks
    lose_answers: int = 0  # submits that are stored but not answered
    blobs: set[str] = field(default_factory=set)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    opened: list[int] = field(default_factory=list)

    async def add(self, *events: jobs_pb2.Event) -> None:
        async with self.changed:
            self.log += events
            self.changed.notify_all()

    async def _checked(self, context: Any) -> None:
        if self.refuse is not None:
            context.set_trailing_metadata(((dial.ERROR_KEY, json.dumps(self.refuse.document()).encode()),))
            await context.abort(grpc.StatusCode.INTERNAL, self.refuse.message)

    async def Show(self, request: jobs_pb2.JobRequest, context: Any) -> jobs_pb2.Document:
        await self._checked(context)
        return jobs_pb2.Document(json=json.dumps({"schema": "hive/v1", "job": self.job}).encode())

    async def Submit(self, request: jobs_pb2.SubmitRequest, context: Any) -> jobs_pb2.Document:
        await self._checked(context)
        self.submitted.setdefault(request.idempotency_key, f"j-{len(self.submitted) + 1}")
        if self.lose_answers > 0:
            self.lose_answers -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "going down")
        job = {**self.job, "id": self.submitted[request.idempotency_key]}
        return jobs_pb2.Document(json=json.dumps({"job": job}).encode())

    async def Events(self, request: jobs_pb2.EventsRequest, context: Any) -> AsyncIterator[jobs_pb2.Event]:
        await self._checked(context)
        self.opened.append(request.after_seq)
        shown, after = 0, request.after_seq
        while True:
            for event in [each for each in self.log if each.seq > after]:
                if shown == self.stop_after:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "going down")
                yield event
                shown, after = shown + 1, event.seq
            if not request.follow:
                return
            async with self.changed:
                if not self.log or self.log[-1].seq <= after:
                    await self.changed.wait()

    async def Logs(self, request: jobs_pb2.LogsRequest, context: Any) -> AsyncIterator[jobs_pb2.LogChunk]:
        self.opened.append(request.after_bytes)
        end = request.after_bytes
        while end < len(self.log_text):
            piece = self.log_text[end : end + 5]
            end += len(piece)
            yield jobs_pb2.LogChunk(text=piece, end_bytes=end, state="RUNNING")
            if end >= self.stop_after:
                self.stop_after = 1_000_000
                return  # a stream that just ends is not the end of the job
        yield jobs_pb2.LogChunk(end_bytes=end, finished=True, state="SUCCEEDED")

    async def Metrics(self, request: jobs_pb2.MetricsRequest, context: Any) -> jobs_pb2.Document:
        records = [{"step": step, "stage": "train"} for step in range(1, 8) if step > request.after_step]
        document = {"metrics": records[:3], "more": len(records) > 3}
        return jobs_pb2.Document(json=json.dumps(document).encode())

    async def Locate(self, request: jobs_pb2.LocateRequest, context: Any) -> jobs_pb2.LocateReply:
        wanted = [entry["digest"] for entry in json.loads(request.manifest_json)["files"]]
        return jobs_pb2.LocateReply(missing_digests=[digest for digest in wanted if digest not in self.blobs])

    async def Put(self, chunks: AsyncIterator[artifacts_pb2.PutChunk], context: Any) -> artifacts_pb2.PutReply:
        reply = artifacts_pb2.PutReply()
        async for chunk in chunks:
            reply.digest, reply.bytes = chunk.digest, chunk.offset + len(chunk.content)
        self.blobs.add(reply.digest)
        return reply


@asynccontextmanager
async def serving(coordinator: Coordinator, port: int = 0) -> AsyncIterator[int]:
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    jobs_pb2_grpc.add_JobsServicer_to_server(coordinator, server)  # type: ignore[no-untyped-call]
    artifacts_pb2_grpc.add_ArtifactsServicer_to_server(coordinator, server)  # type: ignore[no-untyped-call]
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(None)


@asynccontextmanager
async def client_of(port: int) -> AsyncIterator[Client]:
    options = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200))
    async with Client(grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options), f"127.0.0.1:{port}") as client:
        yield client


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await work()

    asyncio.run(bounded())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_error_of_the_coordinator_arrives_as_itself() -> None:
    async def work() -> None:
        coordinator = Coordinator(refuse=NotFound("no job j-9", "hive ps lists them"))
        async with serving(coordinator) as port, client_of(port) as client:
            with pytest.raises(NotFound) as caught:
                await client.show("j-9")
            assert (caught.value.message, caught.value.hint) == ("no job j-9", "hive ps lists them")

    run(work)


def test_nobody_there_is_unreachable() -> None:
    async def work() -> None:
        async with client_of(free_port()) as client:
            with pytest.raises(Unreachable) as caught:
                await client.show("j-1")
            assert caught.value.exit_code == 6

    run(work)


def test_a_verb_an_older_coordinator_does_not_know_says_who_must_upgrade() -> None:
    async def work() -> None:
        async with serving(Coordinator()) as port, client_of(port) as client:
            with pytest.raises(HiveError) as caught:
                await client.explain("j-1")
            assert caught.value.code is ErrorCode.VERSION_MISMATCH

    run(work)


def test_events_go_on_across_a_restart_without_loss_or_repetition() -> None:
    """1. the server shows events 1-2 and is killed; 2. events 3-4 happen meanwhile; 3. a new server shows the rest."""

    async def work() -> None:
        coordinator = Coordinator(log=[progress_event(1, 1), progress_event(2, 2)])
        seen: list[int] = []
        outages: list[HiveError] = []
        two_seen = asyncio.Event()

        async def follow(client: Client) -> None:
            async for event in client.events("j-1", patience=Patience(on_outage=outages.append)):
                seen.append(event.seq)
                if event.seq == 2:
                    two_seen.set()
                if event.seq == 5:
                    return

        async with serving(coordinator) as port:
            client_context = client_of(port)
            client = await client_context.__aenter__()
            following = asyncio.create_task(follow(client))
            await two_seen.wait()
        await coordinator.add(progress_event(3, 3), progress_event(4, 4))
        async with serving(coordinator, port):
            await coordinator.add(job_event(5, "SUCCEEDED"))
            await following
            await client_context.__aexit__(None, None, None)
        assert seen == [1, 2, 3, 4, 5]
        assert coordinator.opened[-1] == 2  # resumed from there, not from the start

    run(work)


def test_wait_ends_with_the_end_of_the_job_and_every_event_was_seen_once() -> None:
    async def work() -> None:
        coordinator = Coordinator(log=[progress_event(n, n) for n in range(1, 8)], stop_after=3)
        await coordinator.add(job_event(8, "SUCCEEDED"))
        seen: list[EventRecord] = []
        async with serving(coordinator) as port, client_of(port) as client:
            coordinator.job["state"] = "SUCCEEDED"
            document = await client.wait("j-1", seen.append)
        assert [event.seq for event in seen] == list(range(1, 9))
        assert document["job"]["state"] == "SUCCEEDED"

    run(work)


def test_logs_that_break_off_are_continued_until_the_job_has_ended() -> None:
    async def work() -> None:
        coordinator = Coordinator(log_text=b"epoch 1\nepoch 2\nepoch 3\n", stop_after=10)
        async with serving(coordinator) as port, client_of(port) as client:
            text = "".join([piece.text async for piece in client.logs("j-1", follow=True)])
        assert text == "epoch 1\nepoch 2\nepoch 3\n"
        assert coordinator.opened == [0, 10]

    run(work)


def test_a_submit_whose_answer_was_lost_makes_one_job(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("def build(): ...")
    (tmp_path / "job.yaml").write_text("model: {source: 'model.py:build'}\ndata: {source: 'builtin:digits'}\n")
    prepared = bundle(read_job(tmp_path / "job.yaml"), tmp_path)

    async def work() -> None:
        coordinator = Coordinator(lose_answers=2)
        async with serving(coordinator) as port, client_of(port) as client:
            document = await client.submit(prepared)
        assert document["job"]["id"] == "j-1"
        assert len(coordinator.submitted) == 1

    run(work)


def test_only_missing_files_are_sent(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("import other\ndef build(): ...")
    (tmp_path / "other.py").write_text("x = 1")
    (tmp_path / "job.yaml").write_text("model: {source: 'model.py:build'}\ndata: {source: 'builtin:digits'}\n")
    prepared = bundle(read_job(tmp_path / "job.yaml"), tmp_path)
    other = next(digest for digest, path in prepared.files.items() if path.name == "other.py")

    async def work() -> None:
        coordinator = Coordinator(blobs={other})
        said: list[tuple[int, int]] = []
        async with serving(coordinator) as port, client_of(port) as client:
            sent = await client.upload(prepared, lambda done, total: said.append((done, total)))
            assert sent == len("import other\ndef build(): ...")
            assert said == [(sent, sent)]
            assert await client.upload(prepared) == 0
        assert coordinator.blobs == set(prepared.files)

    run(work)


def test_metrics_that_take_several_messages_come_as_one_list() -> None:
    async def work() -> None:
        async with serving(Coordinator()) as port, client_of(port) as client:
            document = await client.metrics("j-1")
        assert [record["step"] for record in document["metrics"]] == [1, 2, 3, 4, 5, 6, 7]

    run(work)


def test_waiting_in_a_pipe_prints_progress_to_stderr_and_the_result_to_stdout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def work() -> None:
        coordinator = Coordinator(log=[progress_event(n, n) for n in range(1, 11)])
        await coordinator.add(job_event(11, "FAILED"))
        coordinator.job.update(state="FAILED", reason="user_code", message="ValueError: no")
        async with serving(coordinator) as port, client_of(port) as client:
            document = await ending.wait_with_progress(client, "j-1")
        assert ending.finish(document, as_json=True) == 100

    run(work)
    captured = capsys.readouterr()
    assert json.loads(captured.out)["job"]["message"] == "ValueError: no"
    assert "train epoch 1/1  step 1/10" in captured.err


# ---- the follower alone, with a clock of its own


@dataclass
class Script:
    """A stream that breaks after the given numbers of items, each time it is opened."""

    items: list[int]
    breaks: list[int]
    error: HiveError
    paused: list[float] = field(default_factory=list)
    now: float = 0.0

    async def opened(self, position: int) -> AsyncIterator[int]:
        allowed = self.breaks.pop(0) if self.breaks else len(self.items) + 1
        # a careless server sends again what was sent: the follower must not
        for count, item in enumerate([each for each in self.items if each >= position]):
            if count == allowed:
                raise self.error
            yield item
        if allowed <= len(self.items):
            raise self.error

    async def pause(self, seconds: float) -> None:
        self.paused.append(seconds)
        self.now += seconds

    def patience(self, seconds: float = 100.0) -> Patience:
        return Patience(seconds, clock=lambda: self.now, pause=self.pause, rng=random.Random(0))


async def collected(script: Script, patience: Patience) -> list[int]:
    last = script.items[-1]
    return [item async for item in resumed(script.opened, lambda x: x, 0, patience, lambda x: x == last)]


@settings(max_examples=50)
@given(st.integers(1, 20), st.lists(st.integers(0, 5), max_size=10))
def test_whatever_breaks_every_item_comes_once_and_in_order(length: int, breaks: list[int]) -> None:
    script = Script(list(range(1, length + 1)), breaks, Unreachable("away"))
    assert asyncio.run(collected(script, script.patience())) == list(range(1, length + 1))


def test_what_a_retry_cannot_mend_is_raised_at_once() -> None:
    script = Script([1, 2], [1], AccessError("revoked"))
    with pytest.raises(AccessError):
        asyncio.run(collected(script, script.patience()))
    assert script.paused == []


def test_patience_ends_and_says_how_long_it_lasted() -> None:
    script = Script([1], [0] * 1000, Unreachable("the coordinator cannot be reached"))
    with pytest.raises(Unreachable, match="has been away for"):
        asyncio.run(collected(script, script.patience(60.0)))
    assert 60.0 < script.now < 70.0


@given(st.integers(0, 10_000), st.integers(0, 2**32))
def test_delays_grow_within_bounds_and_differ(tries: int, seed: int) -> None:
    assert 0.1 <= delay_s(tries, random.Random(seed)) <= 5.0

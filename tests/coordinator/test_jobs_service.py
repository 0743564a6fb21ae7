"""What people ask of the coordinator: bounded answers, one job per key, and whose job it is. The real service over the
real control loop; only the certificate of the caller is made up."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from controller_bench import CAPACITY, Coordinator
from test_planner import DATA, LARGER_THAN_A_NODE, decide, node
from test_planner import job as spec_of

from coordinator.answers import fitting, whole_steps
from coordinator.blobs import BlobStore
from coordinator.cli import plan_view, render
from coordinator.cluster import away, nobody
from coordinator.control import events as e
from coordinator.doctor import Doctor
from coordinator.event_tail import EventTail
from coordinator.identification import Identifier
from coordinator.job_folder import JobFolders
from coordinator.jobs_service import JobsService
from coordinator.join_token import JoinToken
from coordinator.learning import Learner
from coordinator.placement import Placement
from coordinator.records import Job
from coordinator.sessions import Session, Sessions
from coordinator.store.protocol import AppendEvent, PutJob
from coordinator.submission import Submission
from coordinator.token_book import TokenBook
from protos import documents, limits
from protos.artifact import FileEntry, Manifest
from protos.capacity import FamilyRate, Rate
from protos.errors import AccessError, Conflict, NotFound, SpecError
from protos.gen import jobs_pb2
from protos.ids import Digest, Fence, JobId, NodeId
from protos.model import Complexity, Family, LayerProfile, ModelProfile, Requirements
from protos.plan import DataProfile, Identification
from protos.states import AttemptState, JobState, Reason
from protos.token import Role
from protos.work import Metrics, Outcome

CUT = decide(*(node(name) for name in "abc"), profile=LARGER_THAN_A_NODE)
SPEC = b'{"model": {"source": "transformers"}, "data": {"source": "builtin:digits"}}'


@dataclass
class Caller:
    """A gRPC context, as far as it says who calls."""

    id: str
    role: Role = Role.SUBMITTER
    name: str = ""

    def auth_context(self) -> dict[str, list[bytes]]:
        names = [f"hive:{self.role}:{self.id}".encode(), f"hive-name:{self.name}".encode()]
        return {"x509_subject_alternative_name": names}


ADA, BOB, ROOT = Caller("c-ada", name="me"), Caller("c-bob", name="me"), Caller("c-root", Role.ADMIN, "root")


@dataclass
class House:
    made: Coordinator
    service: JobsService
    machines: list[dict[str, Any]]

    async def submit(self, key: str = "", who: Caller = ADA, **parts: bytes) -> dict[str, Any]:
        request = jobs_pb2.SubmitRequest(spec_json=SPEC, idempotency_key=key, **parts)
        return job(await self.service.Submit(request, who))


def read(document: jobs_pb2.Document) -> dict[str, Any]:
    assert len(document.json) < limits.MAX_MESSAGE_BYTES

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    content: dict[str, Any] = json.loads(document.json, parse_constant=no_constant)
    return content


def job(document: jobs_pb2.Document) -> dict[str, Any]:
    shown: dict[str, Any] = read(document)["job"]
    return shown


def run(tmp_path: Path, body: Callable[[House], Awaitable[None]]) -> None:
    async def main() -> None:
        made, sessions = Coordinator(size=1), Sessions()
        blobs, tokens = BlobStore(tmp_path / "blobs"), TokenBook(made.store.real)
        learner = Learner(tmp_path / "qtable.json")
        store: Any = made.store
        nodes = lambda: made.controller.state.nodes.values()  # noqa: E731
        placement = Placement(
            sessions,
            learner,
            random.Random(0),
            lambda: nobody(nodes()),
            lambda: away(nodes(), made.controller.capacity),
        )
        doctor = Doctor(tmp_path, store, made.controller, sessions, learner, lambda: "", "127.0.0.1:7700", 0.0)
        tail = EventTail(store)
        machines: list[dict[str, Any]] = []
        service = JobsService(
            store,
            made.controller,
            sessions,
            Identifier(sessions, blobs.path),
            placement,
            JobFolders(tmp_path / "jobs"),
            blobs,
            tokens,
            doctor,
            tail,
            JoinToken(tmp_path, tokens),
            lan=lambda: machines,
            token_text=lambda secret: f"hive1.{secret}",
            join_command=lambda token, role: f"hive-node start --token {token}",
        )
        following = asyncio.create_task(tail.run())
        try:
            async with asyncio.timeout(60):
                await body(House(made, service, machines))
        finally:
            following.cancel()

    asyncio.run(main())


def test_the_same_submission_at_once_is_one_job(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        shown = await asyncio.gather(*(house.submit("key") for _ in range(8)))
        assert len({each["id"] for each in shown}) == 1
        assert len(house.made.controller.state.jobs) == 1
        assert (await house.submit("key"))["id"] == shown[0]["id"]
        assert (await house.submit(""))["id"] != (await house.submit(""))["id"]
        with pytest.raises(SpecError, match="idempotency key"):
            await house.submit("k" * 1000)

    run(tmp_path, body)


def test_a_job_is_its_owners_even_when_others_have_the_same_name(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        submitted = await house.submit(who=ADA)
        assert submitted["owner"] == "me (c-ada)"
        for action in ("cancel", "pause", "resume"):
            with pytest.raises(AccessError, match="belongs to me"):
                await house.service.Control(jobs_pb2.ControlRequest(job_id=submitted["id"], action=action), BOB)
        paused = await house.service.Control(jobs_pb2.ControlRequest(job_id=submitted["id"], action="pause"), ADA)
        assert job(paused)["state"] == "PAUSED"
        cancelled = await house.service.Control(jobs_pb2.ControlRequest(job_id=submitted["id"], action="cancel"), ROOT)
        assert job(cancelled)["state"] == "CANCELLED"
        with pytest.raises(Conflict, match="already ended"):
            await house.service.Control(jobs_pb2.ControlRequest(job_id=submitted["id"], action="cancel"), ADA)
        nameless = await house.submit(who=Caller("c-x"))
        shown = await house.service.Control(
            jobs_pb2.ControlRequest(job_id=nameless["id"], action="cancel"), Caller("c-x")
        )
        assert job(shown)["state"] == "CANCELLED"

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"spec_json": b"model: {source: a}\ndata: {source: b}"}, "not JSON"),  # YAML is for people's files
        ({"spec_json": b"[" * 100_000}, "not JSON"),
        ({"spec_json": b'{"model": {"source": "a.py:b"}, "data": {"source": "b"}, "modle": 1}'}, "modle"),
        ({"spec_json": b" " * 300_000}, "over"),
        ({"code_json": b"{"}, "Manifest"),
        ({"code_json": b'{"files": []}'}, "names none"),
        ({"code_json": b'{"files": [{"path": "../x", "digest": "' + b"a" * 64 + b'", "bytes": 1}]}'}, "unsafe path"),
        ({"data_json": b" " * 2_000_000}, "lists of its files"),
        ({"code_json": b'{"files": [{"path": "m.py", "digest": "' + b"a" * 64 + b'", "bytes": 1}]}'}, "not uploaded"),
    ],
)
def test_what_is_not_a_job_is_refused_before_anything_is_written(
    tmp_path: Path, parts: dict[str, bytes], message: str
) -> None:
    async def body(house: House) -> None:
        request = jobs_pb2.SubmitRequest(**{"spec_json": SPEC, **parts})  # type: ignore[arg-type]
        with pytest.raises(SpecError, match=message):
            await house.service.Submit(request, ADA)
        assert house.made.controller.state.jobs == {}

    run(tmp_path, body)


def test_lists_are_bounded_whatever_is_asked_for(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        for number in range(1010):
            record = Job(JobId(f"j-{number}"), "job", "me", JobState.SUBMITTED, Reason.NONE, SPEC, number, number)
            await house.made.store.commit(PutJob(record))
        listed = read(await house.service.List(jobs_pb2.ListRequest(limit=4_000_000_000), ADA))
        assert len(listed["jobs"]) == 1000 and "more" not in listed
        assert len(read(await house.service.List(jobs_pb2.ListRequest(), ADA))["jobs"]) == 100

    run(tmp_path, body)


def test_two_hundred_nodes_fit_and_of_thousands_the_connected_come_first(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        rates = {name: FamilyRate(1e9, 1e-5) for name in ("matmul", "conv", "rnn", "embedding", "tiny")}
        capacity = replace(
            CAPACITY,
            families=rates,
            flops=dict.fromkeys(("fp32", "bf16", "fp16", "fp64"), Rate(1.23456789e11, 1e11, 0.1)),
        )
        for number in range(200):
            house.service.sessions.add(Session(NodeId(f"n-{number}"), f"node-{number:03}", "s", capacity))
            await house.made.connect(f"n-{number}")
        shown = read(await house.service.Nodes(jobs_pb2.NodesRequest(), ADA))
        assert len(shown["nodes"]) == 200 and "more" not in shown
        await house.made.controller.post(e.NodeDisconnected(NodeId("n-0")))
        names = [node["name"] for node in read(await house.service.Nodes(jobs_pb2.NodesRequest(), ADA))["nodes"]]
        assert names[-1] == "n-0" and names[:-1] == sorted(names[:-1])

    run(tmp_path, body)


def test_who_cannot_be_in_one_group_is_shown_with_the_reason(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        for number, port in enumerate((4000, 4001, None)):
            capacity = replace(CAPACITY, machine_id=f"m{number}", peer_port=port)
            house.service.sessions.add(Session(NodeId(f"n-{number}"), f"n-{number}", "s", capacity, "key"))
            await house.made.connect(f"n-{number}")
        house.service.sessions.unanswered[NodeId("n-0"), NodeId("n-1")] = 2
        rows = read(await house.service.Nodes(jobs_pb2.NodesRequest(), ADA))["nodes"]
        said = {row["name"]: [(each["node"], each["why"]) for each in row["apart"]] for row in rows}
        deaf, silent = "n-2 does not listen for other nodes", "n-1 does not answer n-0"
        assert said == {
            "n-0": [("n-1", silent), ("n-2", deaf)],
            "n-1": [("n-0", silent), ("n-2", deaf)],
            "n-2": [("n-0", deaf), ("n-1", deaf)],
        }
        text = render.nodes(rows)
        assert "4000, not with n-1, n-2" in text and "relayed" in text

    run(tmp_path, body)


def test_explain_shows_what_is_planned_beforehand_for_a_running_job(tmp_path: Path) -> None:
    """As `hive plan` does: of the plan that runs, and of no other."""

    async def body(house: House) -> None:
        await house.made.connect("a", "b", "c")
        job_id = JobId((await house.submit())["id"])
        document = documents.encode(CUT)
        found = Identification(LARGER_THAN_A_NODE, DATA, {}, {})
        await house.made.controller.post(
            e.Identified(job_id),
            change=lambda record: replace(record, plan_json=document, profile_json=documents.encode(found)),
        )
        for name in "abc":
            view = node(name)
            house.service.sessions.add(Session(view.node_id, name, "s", view.capacity))
        house.service.placement.know(job_id, Submission(spec_of(), None, None, None, None), found)
        await house.service.placement.prepare(job_id, CUT, (NodeId("a"), NodeId("b"), NodeId("c")), 0.0)
        shown = read(await house.service.Explain(jobs_pb2.JobRequest(job_id=job_id), ADA))
        assert [each["strategy"] for each in shown["plan"]["spares"]][:3] == ["pipeline_parallel"] * 3
        assert "if a is lost: pipeline_parallel on b, c" in plan_view.plan(shown["plan"], None, shown["names"])

    run(tmp_path, body)


def test_an_answer_takes_as_many_rows_as_a_message_holds() -> None:
    rows = ["x" * 1000] * 5000
    answer = fitting("rows", rows, other=1)
    assert answer["more"] and 4000 < len(answer["rows"]) < 4200
    assert fitting("rows", rows[:10]) == {"rows": rows[:10]}
    assert fitting("rows", []) == {"rows": []}


def test_metrics_are_cut_between_steps_and_never_within_one() -> None:
    """A client asks on after the last step it got: a step of which half was left out would be lost."""
    lines = [{"step": n // 2, "stage": ("train", "evaluate")[n % 2], "text": "x" * 997} for n in range(2, 9001)]
    got: list[dict[str, Any]] = []
    while True:
        after = got[-1]["step"] if got else 0
        page = whole_steps([line for line in lines if line["step"] > after])
        got += page["metrics"]
        if not page["more"]:
            break
    assert got == lines


def test_a_loss_that_is_no_number_is_null_and_breaks_no_answer(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        submitted = await house.submit()
        job_id = JobId(submitted["id"])
        house.service.controller.note_progress(job_id, {"loss": float("nan"), "samples_per_s": float("inf")})
        house.service.folders.append_metrics(job_id, [Metrics(1.0, 1, 0, "train", float("nan"), 32)])
        for shown in (
            job(await house.service.Show(jobs_pb2.JobRequest(job_id=job_id), ADA)),
            read(await house.service.List(jobs_pb2.ListRequest(), ADA))["jobs"][0],
        ):
            assert shown["metrics"] == {"loss": None, "samples_per_s": None}
        metrics = read(await house.service.Metrics(jobs_pb2.MetricsRequest(job_id=job_id), ADA))
        assert metrics["metrics"][0]["loss"] is None and metrics["more"] is False

    run(tmp_path, body)


def identification(layers: int) -> Identification:
    layer = LayerProfile("transformer.layers.attention.projection", "Linear", 10**6, 1.5e9, 1.5e6, 1.5e6, (1024,))
    profile = ModelProfile(
        "pytorch",
        "source",
        Family.MLP,
        "",
        10**6,
        4 * 10**6,
        True,
        ("float32",),
        (64,),
        Complexity.MEDIUM,
        (layer,) * layers,
        Requirements(1.0, 1, 0, 1.0, "layers"),
        1.0,
    )
    return Identification(profile, DataProfile("", 100, 1000), {}, {})


def test_a_model_of_thousands_of_layers_is_explained_in_one_message(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        await house.made.connect("a")
        submitted = await house.submit()
        job_id = JobId(submitted["id"])
        document = documents.encode(identification(6000))
        await house.made.controller.post(
            e.Identified(job_id), change=lambda record: replace(record, profile_json=document)
        )
        shown = read(await house.service.Explain(jobs_pb2.JobRequest(job_id=job_id), ADA))
        assert len(shown["model"]["layers"]) == 2000 and shown["model"]["layers_left_out"] == 4000

    run(tmp_path, body)


def test_a_job_with_very_many_attempts_shows_the_newest(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        await house.made.connect("a")
        submitted = await house.submit()
        job_id = JobId(submitted["id"])
        await house.made.controller.post(e.Identified(job_id))
        outcome = Outcome(AttemptState.FAILED, document="x" * 1_300_000)
        for fence in range(1, 5):
            while house.made.controller.state.jobs[job_id].fence < fence:
                await house.made.tick(4.0, heard=["a"])
            await house.made.controller.post(
                e.AttemptReported(NodeId("a"), job_id, Fence(fence), 0, AttemptState.FAILED, outcome)
            )
        shown = read(await house.service.Show(jobs_pb2.JobRequest(job_id=job_id), ADA))
        assert [attempt["fence"] for attempt in shown["attempts"]] == [2, 3, 4] and shown["more"]

    run(tmp_path, body)


def test_events_are_followed_without_loss_or_repetition(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        mine, other = JobId((await house.submit())["id"]), JobId((await house.submit())["id"])
        seen: list[int] = []
        enough = asyncio.Event()

        async def follow() -> None:
            async for event in house.service.Events(jobs_pb2.EventsRequest(job_id=mine, follow=True), ADA):
                assert event.job_id == mine
                seen.append(event.seq)
                if event.kind == "last":
                    enough.set()

        following = asyncio.create_task(follow())
        for _ in range(100):
            await house.made.store.commit(AppendEvent("progress", mine), AppendEvent("progress", other))
        await house.made.store.commit(AppendEvent("last", mine))
        await enough.wait()
        following.cancel()
        assert seen == [event.seq for event in await house.made.store.events(job_id=mine)]
        whole = [
            event.seq
            async for event in house.service.Events(jobs_pb2.EventsRequest(after_seq=seen[3], job_id=mine), ADA)
        ]
        assert whole == seen[4:]

    run(tmp_path, body)


def test_the_command_for_machines_on_the_lan_is_one_token_however_often_it_is_asked_for(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        house.machines += [{"name": "box", "joined": False, "join": ""}, {"name": "member", "joined": True, "join": ""}]
        request = jobs_pb2.NodesRequest(lan=True)
        shown = [read(await house.service.Nodes(request, ROOT))["lan"] for _ in range(3)]
        assert shown[0] == shown[1] == shown[2]
        assert shown[0][0]["join"].startswith("hive-node start --token hive1.") and shown[0][1]["join"] == ""
        assert len(await house.service.tokens.list()) == 1
        assert read(await house.service.Nodes(request, ADA))["lan"][0]["join"] == ""

    run(tmp_path, body)


def test_what_is_not_there_is_said_with_what_to_type(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        for ask in (house.service.Show, house.service.Explain):
            with pytest.raises(NotFound, match="no job j-none"):
                await ask(jobs_pb2.JobRequest(job_id="j-none"), ADA)
        with pytest.raises(NotFound):
            await house.service.ControlNode(jobs_pb2.NodeControlRequest(node_id="box", action="drain"), ROOT)
        await house.made.connect("a", "b")
        with pytest.raises(Conflict, match="unknown action"):
            await house.service.ControlNode(jobs_pb2.NodeControlRequest(node_id="a", action="explode"), ROOT)
        with pytest.raises(SpecError, match="no role"):
            await house.service.CreateToken(jobs_pb2.TokenRequest(role="god", lifetime_s=60), ROOT)

    run(tmp_path, body)


def test_a_removed_node_is_cut_off(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        await house.made.connect("a")
        session = Session(NodeId("a"), "a", "s", CAPACITY)
        house.service.sessions.add(session)
        await house.service.ControlNode(jobs_pb2.NodeControlRequest(node_id="a", action="remove"), ROOT)
        assert session.closed and session.outgoing.get_nowait() is None
        member = await house.made.store.member(NodeId("a"))
        assert member is not None and member.left
        with pytest.raises(AccessError, match="removed"):
            await house.made.connect("a")

    run(tmp_path, body)


def test_shared_data_is_not_uploaded_when_every_node_sees_it(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        entry = FileEntry("rows.npz", Digest("d" * 64), 10, "/shared/rows.npz")
        request = jobs_pb2.LocateRequest(manifest_json=documents.encode(Manifest((entry,))))
        located = await house.service.Locate(request, ADA)
        assert (list(located.missing_digests), list(located.shared_digests)) == ([entry.digest], [])
        for name, sees in (("a", True), ("b", True), ("c", False)):
            session = Session(NodeId(name), name, "s", CAPACITY)
            house.service.sessions.add(session)

            async def answer(session: Session = session, sees: bool = sees) -> None:
                while (message := await session.outgoing.get()) is not None:
                    number = message.file_question.call_id
                    session.files[number].set_result(frozenset({entry.digest} if sees else ()))

            task = asyncio.create_task(answer())
            located = await house.service.Locate(request, ADA)
            assert list(located.shared_digests) == ([entry.digest] if sees else [])
            session.close()
            await task
            if name == "a":
                house.service.sessions.remove(session)

    run(tmp_path, body)


def test_one_rank_of_logs_at_any_position(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        job_id = JobId((await house.submit())["id"])
        house.service.folders.append_log(job_id, 0, ["one", "two"])
        for after, text in ((0, b"one\ntwo\n"), (4, b"two\n"), (8, b""), (2**63 + 5, b"")):
            request = jobs_pb2.LogsRequest(job_id=job_id, rank=0, after_bytes=after)
            chunks = [chunk async for chunk in house.service.Logs(request, ADA)]
            assert b"".join(chunk.text for chunk in chunks) == text and not chunks[-1].finished
        record = await house.made.store.job(job_id)
        assert record is not None and record.state is JobState.PLANNING

    run(tmp_path, body)

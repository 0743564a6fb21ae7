"""Who is asked what a model is, how often, and what of the answer is whose fault."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_planner import DATA, job, model

from coordinator.identification import Identifier, Refusal
from coordinator.sessions import Session, Sessions
from coordinator.submission import Submission
from protos import documents
from protos.artifact import FileEntry, Manifest, digest_bytes
from protos.capacity import Capacity
from protos.errors import Blame, ErrorCode, SpecError, Unreachable
from protos.gen import work_pb2
from protos.ids import Digest, JobId, NodeId
from protos.plan import Identification
from protos.states import AttemptState, Reason
from protos.work import Fault, Outcome, Task

CAPACITY = Capacity("host", "machine", "linux", "3.11", 1.0, 1, 1, 1, 1)
FOUND = Identification(model(), DATA, {}, {})
KNOWS = Outcome(AttemptState.DONE, document=documents.encode(FOUND).decode())
SILENT = Outcome(AttemptState.DONE, document="never said")
SUBMISSION = Submission(job(), None, None, None, None)


def failed(reason: Reason, blame: Blame, *, retryable: bool) -> Outcome:
    fault = Fault(reason, blame, "it did not work", "mend it", retryable=retryable, last_lines=("Traceback", "Error"))
    return Outcome(AttemptState.FAILED, fault=fault)


class House:
    def __init__(self, folder: Path) -> None:
        self.sessions = Sessions()
        self.folder = folder
        self.identifier = Identifier(self.sessions, lambda digest: folder / digest, build_s=7.0)
        self.asked: list[str] = []
        self.hears = asyncio.Event()  # one that does not answer was asked
        self.cancelled = asyncio.Event()
        self.deadline_s = 0.0
        self.answering: list[asyncio.Task[None]] = []

    def node(self, name: str, outcome: Outcome | None) -> NodeId:
        """A node that answers every question so, or goes away when it is asked."""
        session = Session(NodeId(name), name, "s", CAPACITY)
        self.sessions.add(session)

        async def answer() -> None:
            while (message := await session.outgoing.get()) is not None:
                if message.HasField("task_cancel"):
                    self.cancelled.set()
                    continue
                self.asked.append(name)
                self.deadline_s = documents.decode(Task, message.task_request.task_json).deadline_s
                if outcome is SILENT:
                    self.hears.set()
                    continue
                number = message.task_request.call_id
                if outcome is None:
                    session.close()
                else:
                    result = work_pb2.TaskResult(call_id=number, outcome_json=documents.encode(outcome))
                    self.sessions.answer_task(session.node_id, result)

        self.answering.append(asyncio.create_task(answer()))
        return session.node_id

    async def identify(self, *nodes: NodeId, submission: Submission = SUBMISSION) -> Identification:
        return await self.identifier.identify(submission, JobId("j-1"), nodes, "nobody is here")


def run(tmp_path: Path, body: Callable[[House], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            house = House(tmp_path)
            await body(house)
            for task in house.answering:
                task.cancel()

    asyncio.run(main())


def test_the_same_job_twenty_times_is_identified_once(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        node = house.node("a", KNOWS)
        found = await asyncio.gather(*(house.identify(node) for _ in range(20)))
        assert found == [FOUND] * 20 and house.asked == ["a"]
        named = Submission(job(name="another name"), None, None, None, None)
        assert await house.identify(node, submission=named) == FOUND and house.asked == ["a"]

    run(tmp_path, body)


def test_a_node_that_cannot_say_is_passed_over_for_the_next(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        gone = house.node("gone", None)
        broken = house.node("broken", failed(Reason.NODE_LOST, Blame.NODE, retryable=True))
        assert await house.identify(NodeId("never there"), gone, broken, house.node("good", KNOWS)) == FOUND
        assert house.asked == ["gone", "broken", "good"]

    run(tmp_path, body)


def test_what_the_user_must_change_is_refused_by_the_first_that_says_so(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        bad = house.node("a", failed(Reason.USER_CODE, Blame.USER_CODE, retryable=False))
        with pytest.raises(Refusal, match="it did not work") as refused:
            await house.identify(bad, house.node("b", KNOWS))
        assert (refused.value.reason, refused.value.code) == (Reason.MODEL_UNUSABLE, ErrorCode.MODEL_UNUSABLE)
        assert refused.value.details == ("Traceback", "Error") and house.asked == ["a"]

    run(tmp_path, body)


def test_a_node_without_the_data_is_passed_over_and_a_refusal_only_when_every_node_is(tmp_path: Path) -> None:
    lacks = failed(Reason.DATA_UNUSABLE, Blame.NODE, retryable=True)

    async def body(house: House) -> None:
        a, b = house.node("a", lacks), house.node("b", lacks)
        with pytest.raises(Refusal, match="it did not work") as refused:
            await house.identify(a, b)
        assert (refused.value.reason, refused.value.blame) == (Reason.DATA_UNUSABLE, Blame.NODE)
        assert refused.value.hint == "mend it" and house.asked == ["a", "b"]
        with pytest.raises(Unreachable):  # one that has not said may have the data
            await house.identify(a, house.node("gone", None))
        assert await house.identify(a, house.node("c", KNOWS)) == FOUND

    run(tmp_path, body)


def test_data_that_come_with_a_node_are_looked_at_again_when_that_node_is_not_there(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        a, b = house.node("a", KNOWS), house.node("b", KNOWS)
        for _ in range(2):
            await house.identify(a, b)
        await house.identify(b)
        assert house.asked == ["a", "b"]
        house.node("b", KNOWS)  # it started again, perhaps with another Python
        await house.identify(b)
        assert house.asked == ["a", "b", "b"]
        files = Submission(job(), None, Manifest((FileEntry("x.npz", digest_bytes(b"x"), 1),)), None, None)
        await house.identify(a, submission=files)
        await house.identify(b, submission=files)
        assert house.asked == ["a", "b", "b", "a"]

    run(tmp_path, body)


def test_an_answer_that_cannot_be_read_is_a_refusal_and_not_asked_for_again_and_again(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        other = house.node("a", Outcome(AttemptState.DONE, document='{"shape": "unknown"}'))
        with pytest.raises(Refusal, match="Identification") as refused:
            await house.identify(other)
        assert refused.value.blame is Blame.COORDINATOR and house.asked == ["a"]

    run(tmp_path, body)


def test_nobody_who_could_say_is_a_reason_to_wait(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        with pytest.raises(Unreachable, match="nobody is here"):
            await house.identify()
        silent = house.node("a", Outcome(AttemptState.DONE))
        with pytest.raises(Unreachable, match="answered nothing"):
            await house.identify(silent)

    run(tmp_path, body)


def test_a_model_file_that_cannot_be_trained_is_refused_at_the_door(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        content = b"\x80\x02}q\x00."  # a pickle of an empty dict: no model
        entry = FileEntry("model.pt", digest_bytes(content), len(content))
        (tmp_path / entry.digest).write_bytes(content)
        submission = Submission(job(model={"source": "model.pt"}), None, None, None, Manifest((entry,)))
        with pytest.raises(SpecError):
            await house.identifier.check_file(submission)
        await house.identifier.check_file(SUBMISSION)

    run(tmp_path, body)


@pytest.mark.parametrize("is_directory", [False, True])
def test_only_so_many_files_are_read_at_once(tmp_path: Path, is_directory: bool) -> None:
    weights = safetensors.torch.save({"weight": torch.zeros(2)})
    entry = FileEntry("w.safetensors", digest_bytes(weights), len(weights))
    (tmp_path / entry.digest).write_bytes(weights)
    submission = Submission(
        job(model={"source": "model.py:build", "weights": "w.safetensors"}), None, None, None, Manifest((entry,))
    )
    if is_directory:
        files = directory(tmp_path, {"model_type": "bert"})
        submission = Submission(job(model={"source": "bert"}), None, None, None, files)
    began, ended, most = 0, 0, 0

    def blob(digest: Digest) -> Path:
        nonlocal began, most
        began += 1
        most = max(most, began - ended)
        return tmp_path / digest

    async def check(identifier: Identifier) -> None:
        nonlocal ended
        await identifier.check_file(submission)
        ended += 1

    async def body(house: House) -> None:
        identifier = Identifier(house.sessions, blob, readers_at_once=2)
        await asyncio.gather(*(check(identifier) for _ in range(5)))
        assert (ended, most) == (5, 2)

    run(tmp_path, body)


def test_weights_that_hold_none_are_refused_at_the_door(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
        content = (tmp_path / "whole.pt").read_bytes()
        entry = FileEntry("whole.pt", digest_bytes(content), len(content))
        (tmp_path / entry.digest).write_bytes(content)
        spec = job(model={"source": "model.py:build", "weights": "whole.pt"})
        with pytest.raises(SpecError, match=r"whole\.pt is pickled_module, which holds no weights"):
            await house.identifier.check_file(Submission(spec, None, None, None, Manifest((entry,))))

    run(tmp_path, body)


def directory(folder: Path, config: dict[str, object], **files: bytes) -> Manifest:
    """The manifest of a Hugging Face directory, its files where the coordinator keeps them."""
    contents = {"config.json": json.dumps(config).encode(), **{f"{name}.safetensors": files[name] for name in files}}
    entries = []
    for name, content in contents.items():
        entries.append(FileEntry(name, digest_bytes(content), len(content)))
        (folder / entries[-1].digest).write_bytes(content)
    return Manifest(tuple(entries))


def test_a_hugging_face_directory_passes_and_what_brings_code_is_refused_at_the_door(tmp_path: Path) -> None:
    weights = safetensors.torch.save({"weight": torch.zeros(2)})

    async def body(house: House) -> None:
        def given(config: dict[str, object], **files: bytes) -> Submission:
            return Submission(job(model={"source": "bert"}), None, None, None, directory(tmp_path, config, **files))

        await house.identifier.check_file(given({"model_type": "bert"}, model=weights))
        with pytest.raises(SpecError, match="its own code") as refused:
            await house.identifier.check_file(given({"model_type": "bert", "auto_map": {"AutoModel": "x.Y"}}))
        assert refused.value.exit_code == 3
        with pytest.raises(SpecError, match="names no model_type"):
            await house.identifier.check_file(given({"hidden_size": 3}))
        with pytest.raises(SpecError, match="does not fit in a file"):
            await house.identifier.check_file(given({"model_type": "bert"}, model=weights[:20]))
        with pytest.raises(SpecError, match=r"model\.safetensors is not safetensors"):
            await house.identifier.check_file(given({"model_type": "bert"}, model=b"\x80\x02}q\x00."))

    run(tmp_path, body)


def test_a_node_without_a_package_of_the_model_is_passed_over(tmp_path: Path) -> None:
    lacks = failed(Reason.MODEL_UNUSABLE, Blame.NODE, retryable=True)

    async def body(house: House) -> None:
        a, b, c = (house.node(name, lacks) for name in "abc")
        assert await house.identify(a, b, c, house.node("d", KNOWS)) == FOUND
        assert house.asked == ["a", "b", "c", "d"]
        other = Submission(job(model={"source": "other"}), None, None, None, None)
        with pytest.raises(Refusal, match="it did not work") as refused:
            await house.identify(a, b, submission=other)
        assert (refused.value.reason, refused.value.blame) == (Reason.MODEL_UNUSABLE, Blame.NODE)

    run(tmp_path, body)


def test_who_no_longer_wants_to_know_ends_the_question_and_frees_the_next(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        silent = house.node("silent", SILENT)
        asking = asyncio.create_task(house.identify(silent))
        waiting = asyncio.create_task(house.identify(house.node("good", KNOWS)))  # the same model: not asked twice
        await house.hears.wait()
        asking.cancel()
        await house.cancelled.wait()
        assert await waiting == FOUND and house.asked == ["silent", "good"] and house.deadline_s == 7.0
        assert house.sessions.open_tasks(silent) == 0

    run(tmp_path, body)


def test_the_node_that_was_asked_least_is_asked_first(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        silent, good = house.node("silent", SILENT), house.node("good", KNOWS)
        asking = asyncio.create_task(house.identify(silent, good))
        await house.hears.wait()
        other = Submission(job(model={"source": "other.py:build"}), None, None, None, None)
        assert await house.identify(silent, good, submission=other) == FOUND
        assert house.asked == ["silent", "good"]
        asking.cancel()

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("reason", "blame"),
    [(Reason.MODEL_UNUSABLE, Blame.USER_CODE), (Reason.NODE_LOST, Blame.NODE)],
    ids=["it overruns its time", "its worker dies"],
)
def test_a_model_that_fails_twice_like_this_is_refused_as_its_own_doing(
    tmp_path: Path, reason: Reason, blame: Blame
) -> None:
    again = failed(reason, blame, retryable=True)

    async def body(house: House) -> None:
        with pytest.raises(Unreachable, match="it did not work"):
            await house.identify(house.node("a", again))
        with pytest.raises(Refusal) as refused:
            await house.identify(house.node("b", again), house.node("c", KNOWS))
        assert (refused.value.reason, refused.value.blame) == (Reason.MODEL_UNUSABLE, Blame.USER_CODE)
        assert house.asked == ["a", "b"]

    run(tmp_path, body)

"""A model whose memory did not suffice is planned with more of it, and so are others of its family of layers."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from control_bench import TIMING
from test_planner import DATA, GIB, job, model, node

from coordinator.authority import open_authority
from coordinator.blobs import BlobStore
from coordinator.cli import plan_view
from coordinator.control import events as e
from coordinator.control.state import JobView
from coordinator.controller import Controller
from coordinator.effects import Effects
from coordinator.identification import Identifier
from coordinator.job_folder import JobFolders
from coordinator.learning import KINDS, OUT_OF_MEMORY, Learner, Measured, outcome_payload
from coordinator.memory_needs import LEAST_BYTES, MARGIN, MOST, MOST_FAMILIES, MemoryNeeds, running_out
from coordinator.peers import Peers
from coordinator.placement import Placement
from coordinator.planner import plan
from coordinator.records import Job
from coordinator.rendezvous import Rendezvous
from coordinator.sessions import Session, Sessions
from coordinator.speeds import Speeds
from coordinator.store.memory import MemoryStore
from coordinator.store.protocol import AppendEvent
from coordinator.submission import Submission
from protos import documents
from protos.capacity import DeviceInfo
from protos.errors import Blame, NoPlacement
from protos.ids import JobId
from protos.model import ModelProfile
from protos.plan import ClusterView, Identification, Learned, NodeView, Plan
from protos.states import Activity, AttemptState, JobState, Reason
from protos.work import Fault, Outcome, Usage
from qtable.policy import Ledger
from qtable.prior import load_prior
from strategies.cost import COST_MODEL_VERSION
from strategies.memory import RESERVE_BYTES, expected_bytes

SAMPLE_BYTES = 20e6  # of activations


def wide() -> ModelProfile:
    """A batch of 64 samples takes 2 GiB."""
    known = model()
    layer = replace(known.layers[0], activation_bytes_per_sample=SAMPLE_BYTES)
    return replace(known, layers=(layer,))


def granting(name: str, gibibytes: float) -> NodeView:
    view = node(name)
    return replace(view, capacity=replace(view.capacity, memory_bytes=int(gibibytes * GIB)))


SMALL = granting("small", 3.0)


def decide(*nodes: NodeView, learned: Learned | None = None, **parts: Any) -> Plan:
    view = ClusterView(nodes, learned=learned or Learned())
    spec = job(**{"strategy": "single_node", **parts})
    return plan(spec, wide(), DATA, view, load_prior().table(), random.Random(0), Ledger())


def ran_out(made: Plan, limit_bytes: int = 3 * GIB) -> dict[str, Any]:
    (first, *_) = made.subtasks
    payload = running_out(made, first.node_id, limit_bytes)
    assert payload is not None
    known: dict[str, Any] = json.loads(json.dumps(payload))
    return known


def taught(*payloads: dict[str, Any]) -> Learned:
    speeds = Speeds()
    for payload in payloads:
        speeds.ran_out(payload)
    return speeds.learned()


def ended(made: Plan, times: float) -> dict[str, Any]:
    """A run to the end whose ranks took so many times the memory that the formulas predict beyond the reserve."""
    rank = made.estimate.ranks[0]
    need = (made.estimate.memory_bytes[rank.node_id] - RESERVE_BYTES) / rank.memory_factor
    usage = Usage(1, 1000, 1.0, 0.0, 0.0, 0, int(10**8 + times * need), baseline_memory_bytes=10**8, step_compute_s=0.1)
    return outcome_payload(made, Measured(True, 1, 1000, 0.1, 0.5, usages=((0, usage),)))


def test_what_ran_out_of_memory_is_expected_to_need_more_than_there_was() -> None:
    made = decide(SMALL)
    assert made.estimate.memory_bytes[SMALL.node_id] < 0.85 * 3 * GIB
    lesson = ran_out(made)
    assert (lesson["node"], lesson["family"], lesson["work"]) == ("small", "matmul", "whole")
    (factor,) = taught(lesson).memory.values()
    assert 1 < factor < MOST
    predicted = made.estimate.memory_bytes[SMALL.node_id]
    assert expected_bytes(predicted, 1, factor) == pytest.approx(MARGIN * (3 * GIB - RESERVE_BYTES) + RESERVE_BYTES)


def test_the_same_job_is_cut_into_smaller_pieces_afterwards() -> None:
    made = decide(SMALL)
    learned = taught(ran_out(made))
    again = decide(SMALL, learned=learned)
    assert made.subtasks[0].accumulate == 1 < again.subtasks[0].accumulate
    expected = again.estimate.memory_bytes[SMALL.node_id]
    assert expected <= 0.85 * 3 * GIB, "what is shown is what is expected now, and that fits"
    assert expected > expected_bytes(expected, 1, 1 / again.estimate.ranks[0].memory_factor)
    assert "times the memory of the formulas (matmul)" in plan_view.plan(documents.plain(again))


def test_it_goes_to_a_node_with_more_memory_where_it_cannot_be_cut() -> None:
    parts: dict[str, Any] = {"train": {"batch_size": 64, "accumulate": 1}, "nodes": {"max": 1}}
    nodes = (SMALL, granting("large", 32.0))
    slow = replace(nodes[1], capacity=replace(nodes[1].capacity, cores=1.0, families=slower(nodes[1])))
    made = decide(SMALL, slow, **parts)
    assert made.subtasks[0].node_id == "small"
    assert decide(SMALL, slow, learned=taught(ran_out(made)), **parts).subtasks[0].node_id == "large"


def slower(view: NodeView) -> Any:
    return {name: replace(rate, flops=rate.flops / 4) for name, rate in view.capacity.families.items()}


def test_it_is_refused_with_the_reason_where_nothing_is_large_enough() -> None:
    whole: dict[str, Any] = {
        "train": {"batch_size": 64, "accumulate": 1},
        "nodes": {"require": {"memory_bytes": 2 * GIB}},
    }
    learned = taught(ran_out(decide(SMALL, **whole)))
    with pytest.raises(
        NoPlacement, match=r"fits as predicted, but .*needed \d\.\d\d times the memory predicted for mat"
    ):
        decide(SMALL, learned=learned, **whole)
    tiny = granting("tiny", 0.5)
    with pytest.raises(NoPlacement, match=r"85 % of what tiny grants is 0\.4 GiB") as refused:
        decide(tiny, learned=learned, train={"batch_size": 64, "accumulate": 1})
    assert "ran out" not in refused.value.message, "it would fit neither way: the numbers are those of the formulas"


def test_another_family_of_layers_is_planned_as_before() -> None:
    learned = taught({**ran_out(decide(SMALL)), "family": "conv"})
    assert set(learned.memory) == {"conv"}
    assert decide(SMALL, learned=learned).subtasks == decide(SMALL).subtasks


def test_running_out_again_only_raises_what_is_expected() -> None:
    made = decide(SMALL)
    once = taught(ran_out(made)).memory["matmul"]
    assert taught(ran_out(made), ran_out(made, 2 * GIB)).memory["matmul"] == once
    assert taught(ran_out(made, 2 * GIB), ran_out(made)).memory["matmul"] == once
    again = decide(SMALL, learned=taught(ran_out(made)))
    more = taught(ran_out(made), ran_out(again)).memory["matmul"]
    assert more > once, "with the factor in the prediction it was too little all the same"
    assert taught(ran_out(made, 1000 * GIB)).memory["matmul"] == MOST


def test_jobs_that_end_well_draw_it_slowly_to_what_they_took() -> None:
    made, speeds = decide(SMALL), Speeds()
    assert speeds.apply(ended(made, 1.6))
    assert not speeds.learned().memory, "a family that never ran out is as the formulas say"
    speeds.ran_out(ran_out(made))
    before = speeds.learned().memory["matmul"]
    for _ in range(60):
        seen = decide(SMALL, learned=speeds.learned())
        speeds.apply(ended(seen, 1.2))
    assert 1.2 <= speeds.learned().memory["matmul"] < 1.21 < before
    for _ in range(60):
        speeds.apply(ended(made, 0.7))
    assert not speeds.learned().memory


def test_a_job_that_needs_little_says_nothing_of_what_large_ones_need() -> None:
    needs = MemoryNeeds({"matmul": 2.0})
    small = {"family": "matmul", "predicted_bytes": LEAST_BYTES - 1, "measured_bytes": 1000, "factor": 1.0}
    needs.ended_well(small)
    assert needs.factors == {"matmul": 2.0}
    needs.ended_well({**small, "predicted_bytes": 4 * LEAST_BYTES})
    assert needs.factors["matmul"] < 2.0


def test_of_too_many_families_the_one_not_seen_for_longest_is_forgotten() -> None:
    payload, needs = ran_out(decide(SMALL)), MemoryNeeds()
    for number in range(MOST_FAMILIES + 5):
        needs.ran_out({**payload, "family": f"f{number}"})
    assert len(needs.factors) == MOST_FAMILIES and "f0" not in needs.factors


@pytest.mark.parametrize(
    "odd",
    [
        {"limit_bytes": "many"},
        {"limit_bytes": float("inf")},
        {"predicted_bytes": -1},
        {"factor": 0.0},
        {"factor": float("nan")},
        {"predicted_bytes": None},
    ],
)
def test_an_odd_event_is_passed_over_and_a_replay_gives_the_same(tmp_path: Path, odd: dict[str, Any]) -> None:
    async def story() -> None:
        store, learner, payload = MemoryStore(), Learner(tmp_path / "qtable.json"), ran_out(decide(SMALL))
        other = {**payload, "cost_model_version": COST_MODEL_VERSION + 1, "family": "rnn"}
        payloads: list[dict[str, Any]] = [{**payload, **odd}, {}, other]
        await store.commit(*(AppendEvent(OUT_OF_MEMORY, None, None, each) for each in payloads))
        await learner.catch_up(store)
        assert not learner.speeds.learned().memory
        assert "out_of_memory 1 taught no speed" in learner.notes and "out_of_memory 2" in learner.notes
        await store.commit(AppendEvent(OUT_OF_MEMORY, None, None, payload))
        await learner.catch_up(store)
        await learner.catch_up(store)
        again = Learner(tmp_path / "qtable.json")
        await again.catch_up(store)
        assert set(again.speeds.learned().memory) == {"matmul"}
        assert again.speeds.learned() == learner.speeds.learned()

    assert OUT_OF_MEMORY not in KINDS, "the table and its snapshot do not know it"
    asyncio.run(story())


# ---- a real attempt's outcome

J = JobId("j-1")
FAULT = Fault(Reason.OUT_OF_MEMORY, Blame.NODE, "out of memory", "ask for less", retryable=True)
KILLED = replace(FAULT, blame=Blame.POLICY, retryable=False)


@dataclass
class House:
    """The real control loop, placement and effects. The model is taken to be identified, and nodes are played."""

    controller: Controller
    learner: Learner
    store: MemoryStore
    now_s: float = 1000.0

    async def submit(self, **parts: Any) -> None:
        spec = {"model": {"source": "m.py:f"}, "data": {"source": "d"}, "train": {"batch_size": 64}, **parts}
        record = Job(J, "job", "me", JobState.SUBMITTED, Reason.NONE, json.dumps(spec).encode(), self.now_s, self.now_s)
        await self.controller.submit(record)
        await self.controller.post(e.Identified(J))

    def job(self) -> JobView:
        return self.controller.state.jobs[J]

    async def fails(self, fault: Fault) -> None:
        job = self.job()
        for attempt in job.working:
            outcome = Outcome(AttemptState.FAILED, fault=fault)
            await self.controller.post(
                e.AttemptReported(attempt.node_id, J, job.fence, attempt.rank, AttemptState.FAILED, outcome)
            )

    async def written(self) -> list[dict[str, Any]]:
        return [json.loads(event.payload_json) for event in await self.store.events(job_id=J, kinds=[OUT_OF_MEMORY])]


def run(tmp_path: Path, nodes: tuple[NodeView, ...], body: Callable[[House], Awaitable[None]]) -> None:
    async def main() -> None:
        house: House
        store, learner, sessions = MemoryStore(), Learner(tmp_path / "qtable.json"), Sessions()
        blobs, folders = BlobStore(tmp_path / "blobs"), JobFolders(tmp_path / "jobs")
        placement = Placement(sessions, learner, random.Random(0), lambda: ("", ""), lambda: ())
        placement.know(
            J, Submission(job(strategy="single_node"), None, None, None, None), Identification(wide(), DATA, {}, {})
        )
        peers = Peers(
            open_authority(tmp_path / "authority"), sessions, lambda: house.controller.state, lambda job_id, fence: True
        )
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            effects = Effects(
                store,
                sessions,
                Rendezvous(lambda job_id, fence: True),
                Identifier(sessions, blobs.path),
                placement,
                learner,
                folders,
                blobs,
                peers,
                tasks,
            )

            def perform(effect: e.Effect) -> None:
                if not isinstance(effect, e.Identify):
                    effects.perform(effect)

            controller = Controller(store, placement.plan_for, perform, effects.supplement, lambda: house.now_s, TIMING)
            effects.controller = controller
            house = House(controller, learner, store)
            for view in nodes:
                sessions.add(Session(view.node_id, view.name, "s", view.capacity))
                await controller.describe_node(view.node_id, view.name, view.capacity)
                await controller.post(e.NodeConnected(view.node_id, view.name, Activity.IDLE, "", ()))
            await body(house)

    asyncio.run(main())


async def settled() -> None:
    """What runs in the background has ended."""
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others, timeout=10)


def test_the_next_group_of_the_job_is_planned_with_what_the_first_one_needed(tmp_path: Path) -> None:
    """1. the worker fails for want of memory 2. that is written with the attempt 3. the job goes to the other node,
    which grants as much, in smaller pieces."""

    async def body(house: House) -> None:
        await house.submit()
        first = house.job().plan
        assert first is not None and first.subtasks[0].accumulate == 1
        await house.fails(FAULT)
        assert house.job().state is JobState.QUEUED and house.job().reason is Reason.BACKING_OFF
        (lesson,) = await house.written()
        assert (lesson["plan_id"], lesson["node"]) == (first.id, first.subtasks[0].node_id)
        assert lesson["limit_bytes"] == 3 * GIB
        assert lesson["predicted_bytes"] == first.estimate.memory_bytes[first.subtasks[0].node_id]
        await settled()
        house.now_s += 2.0
        for view in nodes:
            house.controller.heard(view.node_id)
        await house.controller.post(e.Ticked())
        second = house.job().plan
        assert second is not None and second.id != first.id
        assert second.subtasks[0].node_id != first.subtasks[0].node_id
        assert second.subtasks[0].accumulate > 1
        assert len(await house.written()) == 1, "said once"
        await house.fails(FAULT)
        assert len(await house.written()) == 2
        await settled()
        assert house.learner.speeds.learned().memory["matmul"] > second.estimate.ranks[0].memory_factor

    nodes = (SMALL, granting("other", 3.0))
    run(tmp_path, nodes, body)


def test_a_job_that_its_node_ended_for_its_memory_teaches_the_next_one(tmp_path: Path) -> None:
    async def body(house: House) -> None:
        await house.submit()
        await house.fails(KILLED)
        (event,) = await house.store.events(job_id=J, kinds=[OUT_OF_MEMORY])
        assert event.node_id == SMALL.node_id
        record = await house.store.job(J)
        assert record is not None and record.state is JobState.FAILED
        await settled()
        assert house.learner.speeds.learned().memory

    run(tmp_path, (SMALL,), body)


def test_another_fault_says_nothing_of_memory_and_neither_does_the_main_memory_beside_a_gpu(tmp_path: Path) -> None:
    gpu = DeviceInfo("cuda", 0, "T4", 3 * GIB, 3 * GIB, 0.0)
    beside = replace(SMALL, capacity=replace(SMALL.capacity, gpus=(gpu,)))

    async def full_disk(house: House) -> None:
        await house.submit()
        await house.fails(replace(FAULT, reason=Reason.DISK_FULL))
        assert await house.written() == []

    async def main_memory(house: House) -> None:
        await house.submit()
        await house.fails(KILLED)
        assert await house.written() == []

    run(tmp_path / "disk", (SMALL,), full_disk)
    run(tmp_path / "gpu", (beside,), main_memory)

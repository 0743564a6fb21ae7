"""A job without a plan says what stands against each strategy, while it waits and after it has ended. The real control
loop, placement, effects and service; the model is taken to be identified, and nodes are played."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from control_bench import TIMING
from test_jobs_service import ADA, SPEC, job, read
from test_planner import DATA, model, node
from test_planner import job as spec_of

from coordinator.authority import open_authority
from coordinator.blobs import BlobStore
from coordinator.cli import plan_view
from coordinator.cluster import away, nobody
from coordinator.control import events as e
from coordinator.controller import Controller
from coordinator.doctor import Doctor
from coordinator.effects import Effects
from coordinator.event_tail import EventTail
from coordinator.hindsight import hindsight
from coordinator.identification import Identifier
from coordinator.job_folder import JobFolders
from coordinator.jobs_service import JobsService
from coordinator.join_token import JoinToken
from coordinator.learning import Learner
from coordinator.peers import Peers
from coordinator.placement import Placement
from coordinator.rendezvous import Rendezvous
from coordinator.sessions import Session, Sessions
from coordinator.store.memory import MemoryStore
from coordinator.submission import Submission
from coordinator.token_book import TokenBook
from coordinator.unplaced import UNPLACED
from protos import documents
from protos.gen import jobs_pb2
from protos.ids import JobId
from protos.jobspec import StrategyName
from protos.plan import Identification
from protos.states import Activity

JSON_MD = Path(__file__).parents[2] / "docs" / "json.md"


@dataclass
class House:
    controller: Controller
    placement: Placement
    sessions: Sessions
    service: JobsService

    async def join(self, name: str, **parts: Any) -> None:
        view = node(name, **parts)
        self.sessions.add(Session(view.node_id, name, "s", view.capacity))
        await self.controller.describe_node(view.node_id, name, view.capacity)
        await self.controller.post(e.NodeConnected(view.node_id, name, Activity.IDLE, "", ()))

    async def submit(self, **parts: Any) -> JobId:
        """`parts` of the job file; it is identified at once."""
        made = job(await self.service.Submit(jobs_pb2.SubmitRequest(spec_json=SPEC), ADA))
        job_id, found = JobId(made["id"]), Identification(model(), DATA, {}, {})
        self.placement.know(job_id, Submission(spec_of(**parts), None, None, None, None), found)
        document = documents.encode(found)
        await self.controller.post(e.Identified(job_id), change=lambda record: replace(record, profile_json=document))
        return job_id

    async def explain(self, job_id: JobId) -> dict[str, Any]:
        return read(await self.service.Explain(jobs_pb2.JobRequest(job_id=job_id), ADA))


def run(folder: Path, body: Callable[[House], Awaitable[None]]) -> None:
    async def main() -> None:
        controller: Controller
        store, learner, sessions = MemoryStore(), Learner(folder / "qtable.json"), Sessions()
        blobs, folders, tokens = BlobStore(folder / "blobs"), JobFolders(folder / "jobs"), TokenBook(store)
        placement = Placement(
            sessions,
            learner,
            random.Random(0),
            lambda: nobody(controller.state.nodes.values()),
            lambda: away(controller.state.nodes.values(), controller.capacity),
        )
        identifier = Identifier(sessions, blobs.path)
        peers = Peers(
            open_authority(folder / "authority"), sessions, lambda: controller.state, lambda job_id, fence: True
        )
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            rendezvous = Rendezvous(lambda job_id, fence: True)
            effects = Effects(store, sessions, rendezvous, identifier, placement, learner, folders, blobs, peers, tasks)

            def perform(effect: e.Effect) -> None:
                if not isinstance(effect, e.Identify):
                    effects.perform(effect)

            controller = Controller(store, placement.plan_for, perform, effects.supplement, lambda: 1000.0, TIMING)
            effects.controller = controller
            doctor = Doctor(folder, store, controller, sessions, learner, lambda: "", "127.0.0.1:7700", 0.0)
            service = JobsService(
                store,
                controller,
                sessions,
                identifier,
                placement,
                folders,
                blobs,
                tokens,
                doctor,
                EventTail(store),
                JoinToken(folder, tokens),
                lan=list,
                token_text=lambda secret: secret,
                join_command=lambda token, role: "",
            )
            await body(House(controller, placement, sessions, service))

    asyncio.run(main())


def reasons(shown: dict[str, Any]) -> dict[str, str]:
    return {each["strategy"]: "; ".join(each["reasons"]) for each in shown["candidates"]}


def test_a_job_that_waits_says_what_stands_against_each_strategy(tmp_path: Path) -> None:
    """1. It needs two nodes and one is there. 2. The other comes: then there is a plan, with candidates of its own."""

    async def body(house: House) -> None:
        await house.join("a")
        job_id = await house.submit(strategy="data_parallel")
        shown = await house.explain(job_id)
        assert (shown["plan"], shown["job"]["state"], shown["job"]["reason"]) == (None, "QUEUED", "waiting_for_nodes")
        assert list(reasons(shown)) == [name.value for name in StrategyName]
        assert "2" in reasons(shown)["data_parallel"]
        alone = shown["candidates"][list(reasons(shown)).index("single_node")]
        assert (alone["feasible"], alone["nodes"]) == (True, ["a"]) and alone["seconds"] > 0
        assert (shown["names"], shown["model"]["parameters"]) == ({"a": "a"}, model().parameters)
        text = plan_view.unplanned(shown)
        assert text.startswith("no plan   needs 2 nodes, 1 take work\nhint      ")
        assert re.search(r"^CANDIDATE .* WHY \(NOT\)$", text, re.M)
        assert re.search(rf"^data_parallel .*{re.escape(reasons(shown)['data_parallel'])}$", text, re.M)
        await house.join("b")
        shown = await house.explain(job_id)
        assert shown["plan"]["strategy"] == "data_parallel" and "candidates" not in shown

    run(tmp_path, body)


def test_a_job_that_was_refused_keeps_the_reasons_it_was_refused_for(tmp_path: Path) -> None:
    """1. The only node it may have is no member: it fails. 2. The placement forgets it. 3. That one comes: too late."""

    async def body(house: House) -> None:
        await house.join("a")
        job_id = await house.submit(nodes={"require": {"names": ["b"]}})
        assert (await house.service.store.events(job_id=job_id, kinds=[UNPLACED]))[0].job_id == job_id
        assert house.placement.known(job_id) is None and not house.placement.refused(job_id)
        await house.join("b")
        shown = await house.explain(job_id)
        assert (shown["plan"], shown["job"]["state"], shown["job"]["reason"]) == (None, "FAILED", "no_placement")
        assert not any(each["feasible"] for each in shown["candidates"])
        for name, why in reasons(shown).items():
            assert why and f"{name}: {why}." in shown["job"]["message"]
        assert (shown["measured"], shown["ranks"], shown["hindsight"]) == (None, [], hindsight([]))
        assert "no plan fits the cluster" in plan_view.unplanned(shown)

    run(tmp_path, body)


def test_one_that_was_cancelled_while_it_waited_keeps_them_too_and_one_for_which_nothing_was_asked_has_none(
    tmp_path: Path,
) -> None:
    async def body(house: House) -> None:
        early = await house.submit()
        shown = await house.explain(early)
        assert (shown["plan"], shown["candidates"]) == (None, [])
        assert plan_view.unplanned(shown).startswith("no plan   no node has joined\nhint      ")
        await house.controller.post(e.UserAsked(early, "cancel"))
        await house.join("a")
        waiting = await house.submit(strategy="data_parallel")
        before = await house.explain(waiting)
        await house.controller.post(e.UserAsked(waiting, "cancel"))
        shown = await house.explain(waiting)
        assert shown["job"]["state"] == "CANCELLED"
        assert shown["candidates"] == before["candidates"] != []

    run(tmp_path, body)


def test_every_field_of_the_answer_is_in_the_documentation(tmp_path: Path) -> None:
    section = JSON_MD.read_text().split("\n## explain\n")[1].split("\n## ")[0]

    async def body(house: House) -> None:
        await house.join("a")
        unplaced = await house.explain(await house.submit(strategy="data_parallel"))
        planned = await house.explain(await house.submit())
        assert planned["plan"] is not None and unplaced["plan"] is None
        (decision,) = planned["hindsight"]["decisions"]
        assert decision["propensity"] == 1.0 and decision["state"] == planned["plan"]["state"]
        for name in {*planned, *unplaced, *planned["hindsight"], *decision}:
            assert f'"{name}"' in section, name

    run(tmp_path, body)

"""Errands end: by themselves, when their time is up, when nobody wants the answer; and what was printed comes along."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from node_bench import Bench, MakeBench, make_task, run_async

from node.cache import BlobCache
from node.errands import Errands
from node.workspace import Workspaces
from protos.ids import Digest
from protos.states import AttemptState, Reason
from protos.work import Fault, Outcome, Task, TaskKind


async def no_files(digest: Digest, destination: Path, n_bytes: int) -> None:
    raise AssertionError("the tasks here have no files")


def errands(bench: Bench, folder: Path) -> Errands:
    return Errands(bench.runner, Workspaces(folder / "jobs", BlobCache(folder / "cache"), no_files), "box")


def identify(what: str, deadline_s: float = 60.0) -> Task:
    return replace(make_task(what), kind=TaskKind.IDENTIFY, deadline_s=deadline_s)


def fault_of(outcome: Outcome) -> Fault:
    assert outcome.state is AttemptState.FAILED and outcome.fault is not None
    return outcome.fault


async def started(bench: Bench, count: int) -> None:
    async with asyncio.timeout(20):
        while len(bench.runner.workers) < count:  # noqa: ASYNC110 - a runner tells nobody what it starts
            await asyncio.sleep(0.01)


def test_one_that_does_not_end_is_ended_and_it_is_the_codes_doing(bench: MakeBench, tmp_path: Path) -> None:
    async def body() -> None:
        async with bench() as made:
            fault = fault_of(await errands(made, tmp_path).run(identify("prints_and_hangs", 0.5), 1, "cpu"))
            assert (fault.reason, fault.blame.value, fault.retryable) == (Reason.MODEL_UNUSABLE, "user_code", False)
            assert fault.message.startswith("prints_and_hangs.py:build (or the data function) did not finish within")
            assert fault.message.endswith("on box") and "endless loop" in fault.hint
            assert fault.last_lines == ("downloading forever",) and made.runner.workers == []

    run_async(body())


def test_on_a_machine_that_does_other_work_too_it_may_be_asked_again(bench: MakeBench, tmp_path: Path) -> None:
    async def body() -> None:
        async with bench() as made:
            errand = errands(made, tmp_path)
            other = asyncio.create_task(errand.run(identify("ignores_stop"), 1, "cpu"))
            await started(made, 1)
            assert fault_of(await errand.run(identify("prints_and_hangs", 0.5), 1, "cpu")).retryable
            other.cancel()
            await asyncio.wait({other})

    run_async(body())


def test_hanging_ones_that_are_cancelled_make_room(bench: MakeBench, tmp_path: Path) -> None:
    async def body() -> None:
        async with bench() as made:
            errand = errands(made, tmp_path)

            async def ask() -> None:
                await errand.run(identify("ignores_stop"), 1, "cpu")

            hanging = [asyncio.create_task(ask()) for _ in range(3)]  # two run, one waits for its turn
            for number, task in enumerate(hanging):
                errand.asked(number, task)
            await started(made, 2)
            good = asyncio.create_task(errand.run(identify("returns"), 1, "cpu"))
            errand.cancel(0)
            errand.cancel(99)  # of an errand that is over, or never was
            errand.cancel(2)
            assert (await good).state is AttemptState.DONE
            errand.cancel_all()
            await asyncio.wait(hanging)
            assert all(task.cancelled() for task in hanging) and made.runner.workers == []

    run_async(body())


def test_what_was_printed_comes_with_the_fault(bench: MakeBench, tmp_path: Path) -> None:
    async def body() -> None:
        async with bench() as made:
            errand = errands(made, tmp_path)
            assert fault_of(await errand.run(identify("exits"), 1, "cpu")).last_lines == ("about to leave",)
            lines = fault_of(await errand.run(identify("prints_and_fails"), 1, "cpu")).last_lines
            assert lines == (*(f"line {number}" for number in range(10, 30)), "Traceback of the user")

    run_async(body())

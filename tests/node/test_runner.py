"""Workers in real processes: what they say arrives, and however they end it is reported once and nothing survives."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
from node_bench import MakeBench, run_async, wait_until_gone

from node import worker_handle
from node.exit_report import ExitKind
from node.limits import Caps
from protos.errors import Blame, Conflict, HiveError
from protos.states import AttemptState, Reason, StopMode


async def gone(*pids: int) -> None:
    """Returns when none of the processes runs any more."""
    assert await asyncio.to_thread(wait_until_gone, pids, 10.0) == []


def test_everything_a_task_says_reaches_the_handler_in_order(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench() as b:
            report, recorder = await b.finish("says_everything")
            assert [call[0] for call in recorder.calls] == ["ready", "progress", "checkpoint", "artifact"]
            assert recorder.calls[1][1].samples == 96
            assert recorder.calls[2][2:] == (3, 96)
            assert recorder.calls[3][1] == "model.safetensors"
            assert recorder.calls[3][2].read_bytes() == b"weights"
            assert recorder.lines == ["a line on stdout", "a line on stderr"]
            assert report.kind is ExitKind.OK
            assert report.outcome is not None and report.outcome.state is AttemptState.DONE
            assert report.last_lines == ("a line on stdout", "a line on stderr")
            assert report.peak_memory_bytes > 2**20

    run_async(scenario())


def test_the_store_answers_every_operation_and_keeps_deadlines(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench() as b:
            report, _ = await b.finish("uses_the_store")
            assert report.outcome is not None
            expected = [b"\x00\xff", 2, 5, True, False, b"new", True, 1, "late"]
            assert report.outcome.document == repr(expected)

    run_async(scenario())


def test_a_worker_sees_no_secret_and_only_its_own_device(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIVE_TOKEN", "hive1.secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")

    async def scenario() -> None:
        async with bench() as b:
            for device, visible, inner in (("cpu", "", "cpu"), ("cuda:3", "3", "cuda:0")):
                report, _ = await b.finish("looks_around", device)
                assert report.outcome is not None
                words = report.outcome.document.split(" ")
                assert words[:4] == ["-", "-", visible, inner]
                assert words[4:8] == ["True", "True", "node-a", "2"]
                assert int(words[8]) <= 8, "the worker inherited file descriptors"

    run_async(scenario())


def test_a_worker_is_told_what_it_may_send(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench() as b:
            for upload in (None, 2.5e6):
                report, _ = await b.finish("tells_its_upload", upload=upload)
                assert report.outcome is not None and report.outcome.document == repr(upload)

    run_async(scenario())


def test_a_stop_reaches_the_task_from_another_thread(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench() as b:
            handle, recorder = await b.start("waits_for_stop")
            await recorder.ready.wait()
            await handle.stop(StopMode.HOLD)
            report = await handle.wait()
            assert report.outcome is not None
            assert report.outcome.document == "['hold'] hold"

    run_async(scenario())


def test_a_task_that_ignores_a_stop_is_ended_after_the_grace(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench() as b:
            handle, recorder = await b.start("ignores_stop")
            await recorder.ready.wait()
            await handle.stop(StopMode.CANCEL, grace_s=0.1)
            report = await handle.wait()
            assert report.kind is ExitKind.KILLED
            assert "did not end within" in report.message
            assert recorder.report is report

    run_async(scenario())


def test_killing_a_worker_ends_everything_it_started(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench() as b:
            handle, recorder = await b.start("starts_processes")
            pids = [int(pid) for pid in (await recorder.line("pids")).split()[1:]]
            assert len(pids) == 3
            await handle.kill(ExitKind.TIME, "over its time")
            await gone(*pids)
            assert recorder.report is not None and recorder.report.kind is ExitKind.TIME
            report, _ = await b.finish("returns")  # the parent is well
            assert report.kind is ExitKind.OK

    run_async(scenario())


def test_an_entry_that_raises_is_a_failed_outcome_with_the_traceback_in_the_log(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench() as b:
            report, recorder = await b.finish("raises")
            assert report.kind is ExitKind.OK and report.outcome is not None
            assert report.outcome.state is AttemptState.FAILED and report.outcome.fault is not None
            assert report.outcome.fault.message == "RuntimeError: the entry is broken"
            assert recorder.lines[-1] == "RuntimeError: the entry is broken"

    run_async(scenario())


def test_a_process_that_leaves_without_an_outcome_is_the_users_and_final(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench() as b:
            report, _ = await b.finish("exits")
            assert (report.kind, report.exit_code, report.last_lines) == (ExitKind.CRASH, 3, ("about to leave",))
            fault = report.final_outcome().fault
            assert fault is not None and (fault.blame, fault.retryable) == (Blame.USER_CODE, False)

    run_async(scenario())


def test_a_process_ended_by_a_signal_may_be_tried_again(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench() as b:
            report, _ = await b.finish("is_killed")
            assert (report.kind, report.signal) == (ExitKind.CRASH, "SIGSEGV")
            fault = report.final_outcome().fault
            assert fault is not None and fault.retryable and fault.reason is Reason.NODE_LOST

    run_async(scenario())


def test_a_worker_over_the_memory_cap_is_ended_with_the_bytes_it_used(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench(Caps(memory_bytes=300 * 2**20)) as b:
            report, _ = await b.finish("grows")
            assert report.kind is ExitKind.MEMORY
            assert report.peak_memory_bytes > 200 * 2**20
            assert "over the granted 300.0 MiB" in report.message
            fault = report.final_outcome().fault
            assert fault is not None and fault.reason is Reason.OUT_OF_MEMORY and "--memory" in fault.hint

    run_async(scenario())


@pytest.mark.slow
def test_a_frozen_worker_is_ended_within_seconds(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench() as b:
            before = time.monotonic()
            report, _ = await b.finish("freezes")
            assert report.kind is ExitKind.CRASH
            assert report.message.startswith("worker stopped answering")
            assert time.monotonic() - before < worker_handle.SILENCE_S + 3

    run_async(scenario())


def test_a_file_outside_the_tasks_folders_ends_the_worker(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench() as b:
            report, recorder = await b.finish("names_a_file_of_the_owner")
            assert report.kind is ExitKind.POLICY
            assert "/etc/passwd" in report.message
            assert recorder.calls == []

    run_async(scenario())


def test_garbage_on_the_channel_ends_the_worker(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench() as b:
            report, _ = await b.finish("sends_garbage")
            assert report.kind is ExitKind.POLICY

    run_async(scenario())


def test_long_lines_and_progress_bars_stay_bounded(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench() as b:
            _, recorder = await b.finish("prints_much")
            assert len(recorder.lines[0]) < 8300 and "bytes cut" in recorder.lines[0]
            assert recorder.lines[1:] == ["99 %", "no newline at the end"]

    run_async(scenario())


def test_close_ends_running_workers_and_the_parent(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench() as b:
            handle, recorder = await b.start("starts_processes")
            pids = [int(pid) for pid in (await recorder.line("pids")).split()[1:]]
            parent = b.runner.warm_pid
            assert parent is not None
            await b.runner.close()
            assert recorder.report is not None and recorder.report.kind is ExitKind.KILLED
            await gone(parent, handle.pid, *pids)
            with pytest.raises(Conflict):
                await b.start("returns")

    run_async(scenario())


def test_a_killed_parent_takes_its_workers_along_and_is_replaced(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench() as b:
            handle, recorder = await b.start("starts_processes")
            pids = [int(pid) for pid in (await recorder.line("pids")).split()[1:]]
            first = b.runner.warm_pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            report = await handle.wait()
            assert report.kind is ExitKind.CRASH
            await gone(*pids[:2])
            os.kill(pids[2], signal.SIGKILL)  # left the session: only the parent that was killed could have known it
            again, _ = await b.finish("returns")
            assert again.kind is ExitKind.OK
            assert b.runner.warm_pid != first

    run_async(scenario())


def test_an_idle_parent_ends_and_comes_back_on_demand(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench(idle_s=0.2) as b:
            await b.finish("returns")
            parent = b.runner.warm_pid
            assert parent is not None
            await gone(parent)
            report, _ = await b.finish("returns")
            assert report.kind is ExitKind.OK

    run_async(scenario())


def test_close_does_not_wait_for_a_parent_that_is_still_importing(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench(entry="never_imported:run") as b:
            starting = asyncio.create_task(b.start("returns"))
            async with asyncio.timeout(5):
                while b.runner.warm_pid is None:  # noqa: ASYNC110 - the process is there some turns of the loop later
                    await asyncio.sleep(0)
                await b.runner.close()
                with pytest.raises(HiveError):
                    await starting

    run_async(scenario())


def test_an_entry_that_cannot_be_imported_is_said_at_start(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench(entry="no_such_module:run") as b:
            with pytest.raises(HiveError, match="no_such_module"):
                await b.start("returns")

    run_async(scenario())


def test_two_workers_run_at_once_and_end_apart(bench: MakeBench) -> None:
    async def scenario() -> None:
        async with bench() as b:
            first, first_recorder = await b.start("waits_for_stop")
            second, second_recorder = await b.start("waits_for_stop")
            await first_recorder.ready.wait()
            await second_recorder.ready.wait()
            await first.kill()
            assert second.running
            await second.stop(StopMode.CANCEL)
            assert (await second.wait()).kind is ExitKind.OK

    run_async(scenario())

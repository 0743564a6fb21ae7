"""The life of a job, told in small scenarios over the pure control loop."""

from __future__ import annotations

import pytest
from control_bench import TIMING, USER_CODE, Bench, stops

from coordinator.control import events as e
from protos.errors import Blame
from protos.ids import Fence, JobId, NodeId
from protos.states import Activity, AttemptState, JobState, NodeLink, Reason
from protos.work import Fault, Outcome

JOB = JobId("j-1")


# ---- from submission to result


def test_a_job_goes_from_submission_to_its_result() -> None:
    bench = Bench(size=2)
    bench.connect("a", "b")
    assert bench.do(e.Submitted(JOB, 1)) == (e.Identify(JOB),)
    assert bench.job().state is JobState.PLANNING
    bench.do(e.Identified(JOB))
    assert bench.offers() == [("a", 1, 0), ("b", 1, 1)]
    assert bench.job().state is JobState.STARTING
    bench.ready()
    assert (bench.job().state, bench.job().reason) == (JobState.RUNNING, Reason.TRAINING)
    bench.progress(7)
    assert (bench.job().step, bench.job().samples) == (7, 224)
    assert bench.finish(0) == ()  # the other rank may still say what it did
    effects = bench.finish(1)
    assert bench.job().state is JobState.SUCCEEDED
    assert (bench.job().step, bench.job().samples) == (10, 320)
    assert effects == (e.CloseRendezvous(JOB, Fence(1)), e.Finish(JOB))


def test_a_delivered_result_waits_for_the_other_ranks_only_so_long() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.finish(0)
    bench.wait(TIMING.stop_s + 1.0, heard=("a", "b"))
    assert bench.job().state is JobState.SUCCEEDED


def test_a_rank_that_fails_after_the_result_was_delivered_changes_nothing() -> None:
    bench = Bench()
    bench.running("a", "b", "c")
    bench.finish(0)
    bench.fail(1, held=9)
    assert bench.job().state is JobState.RUNNING
    bench.fail(2, fault=USER_CODE)
    assert bench.job().state is JobState.SUCCEEDED


def test_a_result_that_arrives_while_the_group_recovers_is_taken() -> None:
    bench = Bench()
    bench.running("a", "b", "c")
    bench.fail(2, held=9)
    assert bench.job().state is JobState.RECOVERING
    bench.finish(1)
    bench.finish(0)
    assert bench.job().state is JobState.SUCCEEDED


def test_user_code_that_raises_fails_the_job_at_once_and_stops_the_others() -> None:
    bench = Bench()
    bench.running("a", "b")
    effects = bench.fail(1, fault=USER_CODE)
    job = bench.job()
    assert (job.state, job.reason, job.blame) == (JobState.FAILED, Reason.USER_CODE, Blame.USER_CODE)
    assert stops(effects) == [("a", 1, "cancel")]
    assert effects[-1] == e.Finish(JOB)


# ---- losing members of the group


def test_a_lost_peer_makes_the_others_hold_and_a_new_group_form_after_the_back_off() -> None:
    bench = Bench()
    bench.running("a", "b", "c")
    bench.size = 2
    effects = bench.fail(2, held=5)
    assert stops(effects) == [("a", 1, "hold"), ("b", 1, "hold")]
    bench.fail(0, held=5)
    bench.fail(1, held=4)
    assert (bench.job().state, bench.job().reason) == (JobState.QUEUED, Reason.BACKING_OFF)
    bench.wait(0.9)
    assert bench.job().state is JobState.QUEUED
    bench.wait(0.2)
    assert bench.job().state is JobState.STARTING
    assert bench.job().fence == 2
    assert set(bench.holders) == {"a", "c"}


def test_the_newest_state_among_those_that_are_here_leads() -> None:
    bench = Bench()
    bench.running("a", "b", "c")
    bench.size = 2
    bench.fail(2, held=6)
    bench.fail(0, held=5)
    bench.fail(1, held=5)
    bench.do(e.NodeLeft(NodeId("c"), False, "lid closed"))
    bench.wait(2.0, heard=("a", "b"))
    assert bench.job().state is JobState.STARTING
    assert set(bench.holders) == {"a", "b"}


def test_a_silent_node_is_cut_off_then_lost_and_its_work_given_to_others() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.wait(TIMING.lease_ttl_s + 1.0, heard=("a",))
    assert bench.state.nodes[NodeId("b")].link is NodeLink.DISCONNECTED
    effects = bench.wait(1.0, heard=("a",))
    assert bench.state.nodes[NodeId("b")].link is NodeLink.LOST
    assert bench.job().state is JobState.RECOVERING
    assert sorted(stops(effects)) == [("a", 1, "hold"), ("b", 1, "hold")]  # b reads it when it thaws


def test_a_frozen_node_that_speaks_again_on_its_open_stream_is_a_member_again() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.wait(TIMING.lease_ttl_s + 3.0, heard=("a",))
    bench.do(e.NodeHeard(NodeId("b"), Activity.BUSY, "works on j-1"))
    assert bench.state.nodes[NodeId("b")].link is NodeLink.CONNECTED
    assert "b" not in bench.state.idle()  # its old worker is still ending
    bench.do(e.NodeHeard(NodeId("b"), Activity.IDLE, ""))
    assert "b" in bench.state.idle()


def test_a_removed_node_does_not_come_back_by_a_heartbeat_that_was_on_its_way() -> None:
    bench = Bench()
    bench.connect("a")
    bench.do(e.NodeControlled(NodeId("a"), "remove"))
    bench.do(e.NodeHeard(NodeId("a"), Activity.IDLE, ""))
    node = bench.state.nodes[NodeId("a")]
    assert (node.link, node.reason) == (NodeLink.LEFT, "removed")


def test_a_short_disconnection_changes_nothing() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.do(e.NodeDisconnected(NodeId("b")))
    bench.wait(3.0, heard=("a",))
    assert bench.connect("b", leases=[("j-1", 1, 1)]) == []
    assert bench.job().state is JobState.RUNNING


def test_a_daemon_that_restarted_without_its_lease_has_lost_it() -> None:
    bench = Bench()
    bench.running("a", "b")
    effects = bench.connect("b")
    assert bench.job().state is JobState.RECOVERING
    assert stops(effects) == [("a", 1, "hold")]


def test_an_offer_that_was_lost_is_offered_again() -> None:
    bench = Bench()
    bench.connect("a", "b")
    bench.submit()
    bench.report(0, AttemptState.ACCEPTED)
    bench.do(e.NodeDisconnected(NodeId("b")))
    assert bench.connect("b") == [e.Offer(NodeId("b"), JOB, Fence(1), 1)]
    assert bench.job().state is JobState.STARTING


def test_an_offer_of_a_group_that_is_dissolving_is_not_offered_again() -> None:
    bench = Bench()
    bench.connect("a", "b")
    bench.submit()
    bench.do(e.NodeDisconnected(NodeId("b")))
    bench.fail(0)
    assert bench.job().state is JobState.RECOVERING
    assert bench.connect("b") == [e.CloseRendezvous(JOB, Fence(1))]
    assert (bench.job().state, bench.job().reason) == (JobState.QUEUED, Reason.BACKING_OFF)


def test_a_lease_of_an_older_group_is_told_to_hold() -> None:
    bench = Bench()
    bench.running("a", "b")
    assert stops(bench.connect("c", leases=[("j-1", 7, 0), ("j-gone", 2, 0)])) == [("c", 7, "hold"), ("c", 2, "hold")]


@pytest.mark.parametrize(("action", "mode"), [("cancel", "cancel"), ("pause", "pause")])
def test_what_the_user_wanted_while_a_node_was_away_is_said_when_it_is_back(action: str, mode: str) -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.do(e.NodeDisconnected(NodeId("b")))
    bench.do(e.UserAsked(JOB, action))
    assert stops(bench.connect("b", leases=[("j-1", 1, 1)])) == [("b", 1, mode)]


def test_a_hold_is_said_again_to_a_node_that_was_away() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.do(e.NodeDisconnected(NodeId("b")))
    bench.fail(0, held=3)
    assert stops(bench.connect("b", leases=[("j-1", 1, 1)])) == [("b", 1, "hold")]


def test_a_cut_off_node_does_not_keep_the_others_waiting() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.do(e.NodeDisconnected(NodeId("b")))
    bench.fail(0, held=3)
    bench.wait(TIMING.cut_off_grace_s + 1.0, heard=("a",))
    assert (bench.job().state, bench.job().reason) == (JobState.QUEUED, Reason.BACKING_OFF)


def test_a_group_that_falls_silent_as_a_whole_is_waited_for_and_goes_on_under_its_fence() -> None:
    bench = Bench()
    bench.running("a", "b")
    for name in ("a", "b"):
        bench.do(e.NodeDisconnected(NodeId(name)))
    bench.wait(TIMING.lease_ttl_s + 3.0)
    assert bench.job().state is JobState.RUNNING
    assert stops(bench.connect("a", leases=[("j-1", 1, 0)])) == []
    assert stops(bench.connect("b", leases=[("j-1", 1, 1)])) == []
    assert (bench.job().state, bench.job().fence) == (JobState.RUNNING, 1)


def test_of_a_silent_group_the_first_that_is_back_and_done_does_not_cost_the_others_their_time() -> None:
    bench = Bench()
    bench.running("a", "b")
    for name in ("a", "b"):
        bench.do(e.NodeDisconnected(NodeId(name)))
    bench.wait(TIMING.lease_ttl_s + 3.0)
    bench.connect("a", leases=[("j-1", 1, 0)])
    bench.finish(0)
    bench.wait(TIMING.lease_ttl_s - 2.0, heard=("a",))
    assert bench.job().state is JobState.RUNNING
    bench.connect("b", leases=[("j-1", 1, 1)])
    bench.finish(1)
    assert (bench.job().state, bench.job().fence) == (JobState.SUCCEEDED, 1)


def test_of_a_silent_group_one_that_stays_away_is_lost_after_the_others_are_back() -> None:
    bench = Bench()
    bench.running("a", "b")
    for name in ("a", "b"):
        bench.do(e.NodeDisconnected(NodeId(name)))
    bench.wait(TIMING.lease_ttl_s + 1.0)
    bench.connect("a", leases=[("j-1", 1, 0)])
    bench.wait(TIMING.lease_ttl_s + 2.0, heard=("a",))
    assert bench.job().state is JobState.RECOVERING


def test_a_group_that_stays_silent_is_lost_in_the_end() -> None:
    bench = Bench()
    bench.running("a", "b")
    for name in ("a", "b"):
        bench.do(e.NodeDisconnected(NodeId(name)))
    bench.wait(TIMING.reconnect_grace_s + 3.0)
    assert bench.job().state is not JobState.RUNNING


def test_one_silent_node_of_a_group_is_lost_after_its_lease() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.do(e.NodeDisconnected(NodeId("b")))
    bench.wait(TIMING.lease_ttl_s + 2.0, heard=("a",))
    assert bench.job().state is JobState.RECOVERING


def test_a_node_whose_disk_was_full_is_avoided_while_another_is_free() -> None:
    bench = Bench()
    bench.running("a")
    full = Fault(Reason.DISK_FULL, Blame.NODE, "no space left", "free some space", retryable=True)
    bench.fail(0, fault=full)
    bench.connect("b")
    bench.wait(TIMING.backoff_s(0) + 1.0, heard=("a", "b"))
    assert [attempt.node_id for attempt in bench.job().attempts] == ["b"]


def test_a_node_without_a_package_of_the_model_is_avoided() -> None:
    bench = Bench()
    bench.running("a")
    lacks = Fault(Reason.MODEL_UNUSABLE, Blame.NODE, "no transformers", "pip install 'hive[hf]'", retryable=True)
    bench.fail(0, fault=lacks)
    bench.connect("b")
    bench.wait(TIMING.backoff_s(0) + 1.0, heard=("a", "b"))
    assert [attempt.node_id for attempt in bench.job().attempts] == ["b"]


NO_DATA = Fault(Reason.DATA_UNUSABLE, Blame.NODE, "x.npz is not at /share/x.npz", "mount it", retryable=True)


def test_a_node_that_does_not_see_the_data_is_avoided_and_the_job_goes_on_where_they_are() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.progress(5)
    bench.connect("c")
    bench.do(e.NodeLeft(NodeId("b"), False, "killed"))
    bench.fail(0, held=5)
    bench.wait(TIMING.backoff_s(0) + 1.0, heard=("a", "c"))
    assert [attempt.node_id for attempt in bench.job().attempts] == ["a", "c"]
    bench.size = 1
    assert stops(bench.fail(1, fault=NO_DATA)) == [("a", 2, "hold")]
    bench.fail(0, held=5)
    assert NO_DATA.message in bench.job().message
    bench.wait(TIMING.backoff_s(1) + 1.0, heard=("a", "c"))
    bench.ready()
    assert (bench.job().state, [attempt.node_id for attempt in bench.job().attempts]) == (JobState.RUNNING, ["a"])


def test_data_that_no_node_sees_end_the_job_with_what_is_missing() -> None:
    bench = Bench()
    bench.running("a", "b")
    for tries in range(TIMING.retries + 1):
        bench.fail(1, fault=NO_DATA)
        bench.fail(0)  # it was asked to hold
        bench.wait(TIMING.backoff_s(tries) + 1.0, heard=("a", "b"))
    job = bench.job()
    assert (job.state, job.reason, job.blame) == (JobState.FAILED, Reason.RETRIES_EXHAUSTED, Blame.NODE)
    assert NO_DATA.message in job.message and job.hint == "mount it"


def test_a_node_that_could_not_have_it_is_not_taken_while_a_better_one_is_only_busy() -> None:
    bench = Bench()
    bench.running("a")
    lacking = Fault(Reason.DATA_UNUSABLE, Blame.NODE, "no such path here", "mount it", retryable=True)
    bench.connect("b")
    bench.submit("j-2")  # takes b
    bench.ready("j-2")
    bench.fail(0, fault=lacking)
    bench.wait(TIMING.backoff_s(0) + 1.0, heard=("a", "b"))
    assert (bench.job().state, bench.job().reason) == (JobState.QUEUED, Reason.WAITING_FOR_BUSY_NODES)
    bench.do(e.UserAsked(JobId("j-2"), "cancel"))
    bench.wait(TIMING.stop_s + 1.0, heard=("a", "b"))
    assert [attempt.node_id for attempt in bench.job().attempts] == ["b"]


def test_what_used_up_the_retries_keeps_its_advice() -> None:
    bench = Bench()
    bench.running("a")
    full = Fault(Reason.DISK_FULL, Blame.NODE, "no space left", "free some space", retryable=True)
    for tries in range(TIMING.retries + 1):
        bench.fail(0, fault=full)
        bench.wait(TIMING.backoff_s(tries) + 1.0, heard=("a",))
    assert (bench.job().state, bench.job().reason) == (JobState.FAILED, Reason.RETRIES_EXHAUSTED)
    assert bench.job().hint == "free some space"


# ---- fences


def test_a_report_of_an_older_fence_changes_nothing_and_its_worker_is_stopped() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.fail(1)
    bench.fail(0)
    bench.wait(2.0, heard=("a", "b"))
    before = bench.job()
    assert before.fence == 2
    assert stops(bench.report(0, AttemptState.RUNNING, fence=1)) == [("a", 1, "cancel")]
    assert bench.report(0, AttemptState.DONE, Outcome(AttemptState.DONE, 10, 320), fence=1) == ()
    assert bench.job() == before


def test_a_report_from_a_node_that_was_not_planned_changes_nothing() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.connect("c")
    before = bench.job()
    bench.report(0, AttemptState.DONE, Outcome(AttemptState.DONE, 10, 320), node="c")
    assert bench.job() == before


def test_a_report_that_comes_twice_counts_once() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.finish(1)
    before = bench.job()
    assert bench.finish(1) == ()
    assert bench.fail(1) == ()
    assert bench.job() == before


def test_progress_never_falls() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.progress(5)
    bench.progress(3)
    bench.do(e.Progressed(NodeId("a"), JOB, Fence(0), 99, 99))
    assert bench.job().step == 5


# ---- retries


def retry(bench: Bench) -> None:
    bench.fail(1)
    bench.fail(0)
    bench.wait(10.0, heard=("a", "b"))


def test_three_tries_without_a_step_in_between_are_enough() -> None:
    bench = Bench()
    bench.running("a", "b")
    for fence in (2, 3, 4):
        retry(bench)
        assert (bench.job().fence, bench.job().state) == (fence, JobState.STARTING)
    retry(bench)
    job = bench.job()
    assert (job.state, job.reason) == (JobState.FAILED, Reason.RETRIES_EXHAUSTED)
    assert "3 tries" in job.message
    assert job.hint


def test_the_back_off_doubles() -> None:
    bench = Bench()
    bench.running("a", "b")
    for wait_s in (1.0, 2.0, 4.0):
        bench.fail(1)
        bench.fail(0)
        assert bench.job().not_before_s == bench.now_s + wait_s
        bench.wait(10.0, heard=("a", "b"))


def test_a_committed_step_makes_all_tries_new() -> None:
    bench = Bench()
    bench.running("a", "b")
    for step in range(1, 8):
        bench.ready() if bench.job().state is JobState.STARTING else None
        bench.progress(step)
        retry(bench)
        assert bench.job().state is JobState.STARTING
        assert bench.job().retries == 1


# ---- deadlines


def test_a_rank_that_never_gets_ready_is_given_up_and_told_so() -> None:
    bench = Bench()
    bench.connect("a", "b")
    bench.submit()
    bench.report(0, AttemptState.ACCEPTED)
    bench.report(0, AttemptState.READY)
    effects = bench.wait(TIMING.start_s + 1.0, heard=("a", "b"), every_s=1.0)
    assert stops(effects) == [("b", 1, "cancel"), ("a", 1, "hold")]
    assert bench.job().state is JobState.RECOVERING


def test_a_rank_that_does_not_hold_in_time_is_given_up() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.fail(0, held=3)
    effects = bench.wait(TIMING.hold_s + 1.0, heard=("a", "b"))
    assert stops(effects) == [("b", 1, "cancel")]
    assert bench.job().fence == 1
    assert bench.job().reason is Reason.BACKING_OFF


def test_a_cancelled_job_ends_even_when_nobody_answers() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.do(e.UserAsked(JOB, "cancel"))
    bench.wait(TIMING.stop_s + 1.0, heard=("a", "b"))
    assert bench.job().state is JobState.CANCELLED


def test_a_pausing_job_pauses_even_when_nobody_answers() -> None:
    bench = Bench()
    bench.running("a", "b")
    bench.do(e.UserAsked(JOB, "pause"))
    bench.wait(TIMING.hand_over_s - 1.0, heard=("a", "b"))
    assert bench.job().state is JobState.RUNNING  # what they hold may still be on its way
    bench.wait(2.0, heard=("a", "b"))
    assert bench.job().state is JobState.PAUSED

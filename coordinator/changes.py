"""The difference between two control states as writes: jobs, attempts, members, and an event for each transition.

Owns what a record takes over from a view, and that every state a job passed through is written, in order: the store
refuses a skipped one. Nothing is remembered as written before `keep` is called, which is after the commit.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from coordinator.control.state import AttemptView, JobView, NodeStatus
from coordinator.records import Attempt, Job, Member
from coordinator.store.protocol import AppendEvent, PutAttempt, PutJob, PutMember, Write
from coordinator.views import sentence
from protos import documents
from protos.errors import TABLE, ErrorCode
from protos.ids import Fence, JobId, NodeId
from protos.states import ACTIVE_JOB_STATES, JobState, Reason

Supplement = Callable[[JobView | None, JobView, Job, Sequence[Attempt]], Awaitable[tuple[Job, Sequence[Write]]]]
"""What belongs into the transaction of a change beside the states: a decision when there is a new plan, the result when
the job ends. Given (before, after, record, all attempts); returns the completed record and further writes."""

Extra = Callable[[Job], Job]
"""A change to a job's record that is not the control loop's business (profile, checkpoint, result)."""

_EXIT_CODES = {
    Reason.MODEL_UNUSABLE: ErrorCode.MODEL_UNUSABLE,
    Reason.DATA_UNUSABLE: ErrorCode.DATA_UNUSABLE,
    Reason.NO_PLACEMENT: ErrorCode.NO_PLACEMENT,
}


class Changes:
    """Collects the writes for the difference between two states, and what to remember once they are durable."""

    def __init__(
        self,
        records: dict[JobId, Job],
        attempts: dict[tuple[JobId, Fence, int], Attempt],
        members: dict[NodeId, Member],
        supplement: Supplement,
        now_s: float,
    ) -> None:
        self._records, self._attempts, self._members, self._now_s = records, attempts, members, now_s
        self._supplement = supplement
        self._new_records: dict[JobId, Job] = {}
        self._new_attempts: dict[tuple[JobId, Fence, int], Attempt] = {}
        self._new_members: dict[NodeId, Member] = {}
        self.writes: list[Write] = []

    async def job(self, before: JobView | None, after: JobView, change: Extra | None) -> None:
        record = self._records[after.job_id]
        if before is None:
            record = replace(record, version=1)  # PutJob of the submission is in this transaction
        merged = self._merged(record, before, after)
        if change is not None:
            merged = change(merged)
        of_attempts = [write for attempt in after.attempts for write in self._attempt(after, attempt)]
        known = {**self._attempts, **self._new_attempts}
        mine = [row for key, row in sorted(known.items()) if key[0] == after.job_id]
        merged, further = await self._supplement(before, after, merged, mine)
        self.writes += further
        for passed in after.trail[:-1]:
            entered = replace(
                merged,
                state=passed.state,
                reason=passed.reason,
                message=passed.message,
                hint=passed.hint,
                exit_code=None,
                finished_s=None,
                result_json=None,
                version=record.version,
            )
            self.writes.append(PutJob(entered, record.version))
            self.writes.append(AppendEvent("job", after.job_id, None, _job_payload(entered)))
            record = replace(entered, version=record.version + 1)
        merged = replace(merged, version=record.version)
        if _without_times(merged) != _without_times(record):
            self.writes.append(PutJob(merged, record.version))
            if after.trail or before is None or (before.reason, before.message) != (after.reason, after.message):
                self.writes.append(AppendEvent("job", after.job_id, None, _job_payload(merged)))
            record = replace(merged, version=record.version + 1)
        self._new_records[after.job_id] = record
        self.writes += of_attempts

    def _merged(self, record: Job, before: JobView | None, after: JobView) -> Job:
        started = record.started_s
        if started is None and after.state in ACTIVE_JOB_STATES:
            started = self._now_s
        plan_json = record.plan_json
        if after.plan is not None and (before is None or before.plan is not after.plan):
            plan_json = documents.encode(after.plan)
        return replace(
            record,
            state=after.state,
            reason=after.reason,
            message=after.message,
            hint=after.hint,
            blame=after.blame,
            exit_code=_exit_code(after),
            fence=after.fence,
            retries=after.retries,
            step=after.step,
            samples=after.samples,
            strategy=after.plan.strategy if after.plan else record.strategy,
            plan_json=plan_json,
            started_s=started,
            finished_s=self._now_s if after.ended else None,
            updated_s=self._now_s,
        )

    def _attempt(self, job: JobView, view: AttemptView) -> list[Write]:
        key = (job.job_id, job.fence, view.rank)
        known = self._new_attempts.get(key) or self._attempts.get(key)
        outcome_json = documents.encode(view.outcome) if view.outcome is not None else None
        if known is not None and known.state is view.state and known.outcome_json == outcome_json:
            return []
        version = known.version if known else None
        made = Attempt(
            job.job_id,
            job.fence,
            view.rank,
            view.node_id,
            view.state,
            known.created_s if known else self._now_s,
            self._now_s,
            outcome_json,
            version or 0,
        )
        fault = view.outcome.fault if view.outcome else None
        payload = {
            "fence": job.fence,
            "rank": view.rank,
            "node_id": view.node_id,
            "state": view.state.value,
            "reason": fault.message if fault else "",
        }
        self._new_attempts[key] = replace(made, version=(version or 0) + 1)
        return [PutAttempt(made, version), AppendEvent("attempt", job.job_id, view.node_id, payload)]

    def node(self, before: NodeStatus | None, after: NodeStatus) -> None:
        same = before is not None and (
            before.link,
            before.eligibility,
            before.activity,
            before.reason,
            before.name,
        ) == (
            after.link,
            after.eligibility,
            after.activity,
            after.reason,
            after.name,
        )
        if same:
            return
        payload = {
            "node_id": after.node_id,
            "name": after.name,
            "link": after.link.value,
            "eligibility": after.eligibility.value,
            "activity": after.activity.value,
            "reason": after.reason,
        }
        known = self._members.get(after.node_id)
        made = Member(
            after.node_id,
            after.name,
            "node",
            after.link,
            after.eligibility,
            after.last_seen_s,
            after.reason,
            known.capacity_json if known else None,
            after.reason == "removed",
            known.version if known else 0,
        )
        self.writes += [
            PutMember(made, known.version if known else None),
            AppendEvent("node", None, after.node_id, payload),
        ]
        self._new_members[after.node_id] = replace(made, version=made.version + 1)

    def keep(self) -> None:
        self._records.update(self._new_records)
        self._attempts.update(self._new_attempts)
        self._members.update(self._new_members)


def _without_times(record: Job) -> Job:
    return replace(record, updated_s=0.0, version=0)


def _exit_code(job: JobView) -> int | None:
    match job.state:
        case JobState.SUCCEEDED:
            return 0
        case JobState.CANCELLED:
            return TABLE[ErrorCode.CANCELLED].exit_code
        case JobState.FAILED:
            return TABLE[_EXIT_CODES.get(job.reason, ErrorCode.JOB_FAILED)].exit_code
        case _:
            return None


def submitted_event(record: Job) -> AppendEvent:
    """The first event of a job."""
    return AppendEvent("job", record.job_id, None, _job_payload(record))


def _job_payload(record: Job) -> dict[str, object]:
    return {
        "state": record.state.value,
        "reason": record.reason.value,
        "message": sentence(record),
        "hint": record.hint,
        "blame": record.blame.value if record.blame else None,
        "exit_code": record.exit_code,
        "fence": record.fence,
        "step": record.step,
        "samples": record.samples,
    }

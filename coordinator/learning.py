"""What is written down of each choice and what came of it, and the learner that reads it.

The `decision` and `outcome` events in the log are the source of truth, appended in the same transaction as the job; the
learner applies each once, in the order of seq, and keeps a snapshot that only spares a replay.

T_meas = startup + transfer + evaluation + planned steps * usual step. It is scaled to the planned steps, so pauses,
checkpoints and lost steps do not count. Every group that gave way to another plan is a `trial` event of the same form,
the last one of a job its `outcome`. It teaches nothing (`counted` false, with the reason) when it was lost, or made
too few steps for one that began in the middle of a job. The ledger is credited with its time all the same. A rank that
ran out of memory is an `out_of_memory` event.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from coordinator import qtable_events
from coordinator.speeds import Speeds, lesson
from coordinator.store.protocol import Store
from protos.jobspec import JobSpec
from protos.log import Log
from protos.model import ModelProfile
from protos.plan import DataProfile, Plan
from protos.work import Metrics, Usage
from qtable import snapshot
from qtable.policy import Ledger
from qtable.prior import Prior, load_prior
from qtable.replay import OutcomeRecord, apply, key_of
from qtable.reward import reward
from qtable.table import QTable
from strategies.cost import COST_MODEL_VERSION
from strategies.usual_step import usual

DECISION = "decision"
OUTCOME = "outcome"
TRIAL = "trial"
OUT_OF_MEMORY = "out_of_memory"  # of a rank: for the speeds alone, the table and its snapshot do not know it
LESSONS = (OUTCOME, TRIAL)
KINDS = (DECISION, *LESSONS, qtable_events.IMPORT, qtable_events.RESET)
KINDS_OF_A_JOB = (DECISION, *LESSONS)
KINDS_OF_SPEEDS = (*LESSONS, OUT_OF_MEMORY, qtable_events.RESET)
LEAST_STEPS = 10  # of a group that took over from another one
_PAGE = 1000
_AROUND = ("startup", "transfer", "evaluation")

log = Log("hive.coordinator.learning")


@dataclass(frozen=True, slots=True)
class Measured:
    """What a job that ended really took. `step_s` is usual; `generations` how many groups were formed for it."""

    finished: bool
    generations: int
    steps: int
    step_s: float
    startup_s: float
    evaluation_included: bool = False  # in step_s, because it was taken from the whole loop
    usages: tuple[tuple[int, Usage], ...] = ()  # by rank


def usual_step_s(metrics: Sequence[Metrics]) -> float | None:
    """Of the training records of one rank, in order; None when there are fewer than two. Evaluations do not count."""
    seconds = [
        (after.time - before.time) / (after.step - before.step)
        for before, after in pairwise(metrics)
        if before.stage == after.stage == "train" and after.step > before.step and after.time > before.time
    ]
    return usual(seconds) if seconds else None


def measure(
    usages: Sequence[Usage],
    metrics: Sequence[Metrics] = (),
    *,
    finished: bool = True,
    generations: int = 1,
    ranks: Sequence[int] = (),
) -> Measured:
    """From the last generation's usages, one per rank, and rank 0's records when there are any: the slowest counts.
    `ranks`: whose the usages are."""
    by_records = usual_step_s(metrics)
    by_loop = max((usage.seconds / usage.steps for usage in usages if usage.steps), default=0.0)
    return Measured(
        finished,
        generations,
        max((usage.steps for usage in usages), default=0),
        by_loop if by_records is None else by_records,
        max((usage.startup_s for usage in usages), default=0.0),
        evaluation_included=by_records is None,
        usages=tuple(zip(ranks, usages, strict=True)) if ranks else (),
    )


def decision_payload(
    plan: Plan, spec: JobSpec, profile: ModelProfile, data: DataProfile, *, replanned: bool = False
) -> dict[str, Any]:
    """Features, mask, predictions and propensity of a choice. A choice that was forced has nothing to explore."""
    free = spec.strategy == "auto" and not replanned
    explored = free and plan.explored_loss_s > 0
    return {
        "plan_id": plan.id,
        "strategy": plan.strategy,
        "reason": plan.reason,
        "state": list(plan.state),
        "features": {
            "parameters": profile.parameters,
            "family": profile.family.value,
            "flops_per_sample": profile.flops_per_sample,
            "rows": data.rows,
            "data_bytes": data.bytes,
            "batch_size": spec.train.batch_size,
            "steps": plan.steps,
            "precision": spec.train.precision,
        },
        "candidates": [
            {
                "strategy": candidate.strategy,
                "feasible": candidate.feasible,
                "reasons": list(candidate.reasons),
                "nodes": list(candidate.nodes),
                "seconds": candidate.seconds,
                "step_s": candidate.step_s,
                "bytes": candidate.bytes,
                "memory_bytes": candidate.memory_bytes,
                "q": candidate.q,
                "residual": candidate.residual,
                "visits": candidate.visits,
                "deviation": candidate.deviation,
                "survival": candidate.survival,
                "measured": candidate.measured,
            }
            for candidate in plan.candidates
        ],
        "predicted_s": plan.estimate.seconds,
        "propensity": plan.propensity,
        "forced": not free,
        "explored": explored,
        "expected_loss_s": plan.explored_loss_s if explored else 0.0,
        "loss_if_wrong_s": plan.expected_loss_s,
        "trials": list(plan.trials),
        "trial_steps": plan.trial_steps,
        "cost_model_version": COST_MODEL_VERSION,
    }


def outcome_payload(plan: Plan, measured: Measured) -> dict[str, Any]:
    """What a choice led to, beside its prediction. `reward` is None when the job teaches nothing; `why` says why."""
    steps = plan.steps or measured.steps
    around = {name: plan.estimate.terms.get(name, 0.0) for name in _AROUND}
    predicted_s = sum(around.values()) + steps * plan.estimate.step_s
    if measured.startup_s > 0:
        around["startup"] = measured.startup_s
    if measured.evaluation_included:
        around["evaluation"] = 0.0
    measured_s = sum(around.values()) + steps * measured.step_s
    why = ""
    if not measured.finished:
        why = "the job did not run to its end"
    elif measured.generations > 1 and measured.steps < LEAST_STEPS:
        why = f"its last group made {measured.steps} steps only"
    elif measured.steps < 1 or not measured.step_s > 0:
        why = "no step was measured"
    return {
        "plan_id": plan.id,
        "strategy": plan.strategy,
        "state": list(plan.state),
        "predicted_s": predicted_s,
        "measured_s": measured_s,
        "predicted_step_s": plan.estimate.step_s,
        "measured_step_s": measured.step_s,
        "steps": measured.steps,
        "ran_s": measured.steps * measured.step_s,
        "reward": None if why else reward(predicted_s, measured_s),
        "counted": not why,
        "why": why,
        "cost_model_version": plan.cost_model_version,
        **({} if why else lesson(plan, measured.usages, measured.step_s)),
    }


def of_remembered(payload: Mapping[str, Any]) -> bool:
    """Whether an outcome is of a plan whose step was not predicted but measured before.

    Such a job teaches the table nothing: that the same takes the same again says nothing of how far off a prediction
    is, and only predictions are corrected with residuals. Nor do the formulas' seconds beside it: by then this model's
    own factor is in them, learned from the very same job. Speeds and steps learn from every run.
    """
    return bool(payload.get("basis", {}).get("remembered", False))


class Learner:
    """Holds the table, the exploration ledger and the learned speeds; one per coordinator. The speeds have no snapshot:
    they are read from the log's outcomes when it starts. `notes` says where it started from, `problem`
    why the last snapshot is not on the disk."""

    def __init__(self, path: Path, prior: Prior | None = None, origin: str = "") -> None:
        """`origin`: the name of the log, under which others know what was learned here."""
        self._path = path
        self._prior = prior or load_prior()
        self._origin = origin
        self._lock = asyncio.Lock()
        self.table: QTable = self._prior.table(origin)
        self.ledger = Ledger()
        self.speeds = Speeds()
        self._speeds_seq = 0  # of the last outcome that the speeds have seen
        self.problem = ""
        loaded = snapshot.load(path)
        self.notes = loaded.reason
        if loaded.table is not None and loaded.table.cost_model_version != self._prior.cost_model_version:
            self.notes += ", of another cost model: the log is read again"
        elif loaded.table is not None and loaded.table.origin != origin:
            self.notes += ", of another log: this one's is read again"
        elif loaded.table is not None:
            self.table, self.ledger = loaded.table, loaded.ledger

    def apply(self, seq: int, kind: str, payload: Mapping[str, Any]) -> bool:
        """One event of KINDS, in the order of seq; True when it changed the table or the ledger.

        An event at or below the last one applied is passed over, and so is one that this version cannot read (a later
        version wrote it), which `notes` then says: one odd event must not stop the coordinator from planning.
        """
        if seq <= self.table.last_seq:
            return False
        try:
            changed = self._change(seq, kind, payload)
        except Exception as error:  # whatever a later version means by it
            self._passed_over(f"event {seq} was passed over", error)
            changed = False
        self.table.last_seq = seq
        return changed

    def _passed_over(self, what: str, error: Exception) -> None:
        self.notes += f"; {what}: {type(error).__name__}: {error}"
        log.warning(what, reason=f"{type(error).__name__}: {error}")

    def _change(self, seq: int, kind: str, payload: Mapping[str, Any]) -> bool:
        if kind == qtable_events.IMPORT:
            return qtable_events.take(self.table, payload) > 0
        if kind == qtable_events.RESET:
            self.rebuild()
            return True
        return self._decision(payload) if kind == DECISION else self._outcome(seq, payload)

    def _decision(self, payload: Mapping[str, Any]) -> bool:
        loss_s = float(payload["expected_loss_s"]) if payload["explored"] else 0.0
        self.ledger = self.ledger.charged(loss_s)
        return loss_s > 0

    def _outcome(self, seq: int, payload: Mapping[str, Any]) -> bool:
        """The ledger is credited with all the time that a job ran, of whatever cost model, also of one that teaches
        nothing. Decisions are charged just so: a log read again must not hold losses without the time beside them."""
        ran_s = float(payload["ran_s"])
        if not 0 <= ran_s < math.inf:
            raise ValueError(f"a job cannot have run for {ran_s} s")
        self.ledger = self.ledger.credited(ran_s)
        if not payload["counted"] or of_remembered(payload):
            return ran_s > 0
        record = OutcomeRecord(
            seq,
            key_of(payload["state"]),
            str(payload["strategy"]),
            float(payload["predicted_s"]),
            float(payload["measured_s"]),
            int(payload["cost_model_version"]),
        )
        return apply(self.table, record) or ran_s > 0

    def rebuild(self) -> None:
        """Forget everything: the next catch_up reads the log from its beginning."""
        self.table, self.ledger = self._prior.table(self._origin), Ledger()

    def save(self) -> None:
        """Blocks for two fsyncs. Raises OSError; nothing learned is lost by that, the log has it."""
        snapshot.save(self._path, self.table, self.ledger)

    async def catch_up(self, store: Store) -> int:
        """Apply what the log holds beyond the last event applied, then save; the number of events read.

        Called at start and after every commit that appended an event of KINDS: reading the log rather than being handed
        the event keeps the order of seq whoever commits first. A snapshot whose last event is not in this log is of
        another database, and the log wins. A full disk does not raise: `problem` says so, and the log has it all.
        """
        async with self._lock:
            await self._catch_up_speeds(store)
            if last_seq := self.table.last_seq:
                found = await store.events(last_seq - 1, None, KINDS, 1)
                if not found or found[0].seq != last_seq:
                    self.notes += f"; event {last_seq} is not in this log, which is read again"
                    self.rebuild()
            if read := await self._catch_up_table(store):
                await self._saved()
            return read

    async def _catch_up_table(self, store: Store) -> int:
        read = 0
        while page := await store.events(self.table.last_seq, None, KINDS, _PAGE):
            for event in page:
                self.apply(event.seq, event.kind, json.loads(event.payload_json))
            read += len(page)
        return read

    async def _catch_up_speeds(self, store: Store) -> None:
        while page := await store.events(self._speeds_seq, None, KINDS_OF_SPEEDS, _PAGE):
            for event in page:
                self.apply_speed(event.seq, event.kind, json.loads(event.payload_json))

    def apply_speed(self, seq: int, kind: str, payload: Mapping[str, Any]) -> None:
        """What an event of KINDS_OF_SPEEDS says, in the order of seq; others say nothing."""
        self._speeds_seq = seq
        if kind == qtable_events.RESET:
            self.speeds = Speeds()
        elif kind in KINDS_OF_SPEEDS:
            try:
                teach = self.speeds.ran_out if kind == OUT_OF_MEMORY else self.speeds.apply
                teach(payload)
            except Exception as error:  # as in `apply`
                self._passed_over(f"{kind} {seq} taught no speed", error)

    def blank(self) -> Learner:
        """One of the same log and prior that has learned nothing and has no snapshot: for reading the log beside
        this one. It is never saved."""
        return Learner(Path("/dev/null/qtable.json"), self._prior, self._origin)

    async def adopt(self, made: Learner, store: Store) -> None:
        """Go on with what another one has read in the log, and with what the log has got since; then save."""
        async with self._lock:
            await made._catch_up_speeds(store)
            await made._catch_up_table(store)
            self.table, self.ledger = made.table, made.ledger
            self.speeds, self._speeds_seq = made.speeds, made._speeds_seq
            await self._saved()

    async def _saved(self) -> None:
        try:
            await asyncio.to_thread(self.save)
            self.problem = ""
        except OSError as error:
            self.problem = f"the snapshot could not be written: {error}"


__all__ = [
    "DECISION",
    "KINDS",
    "KINDS_OF_SPEEDS",
    "OUTCOME",
    "OUT_OF_MEMORY",
    "TRIAL",
    "Learner",
    "Measured",
    "decision_payload",
    "measure",
    "outcome_payload",
]

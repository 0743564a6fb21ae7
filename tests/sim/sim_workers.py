"""Fake workers with the semantics of a process group: a step is committed only when every rank of the generation lives.

Peers of a lost rank report PEER_LOST with the step they hold; some may have committed one step more than the others.
A user's mistake ends the job's attempts for good. The rendezvous lives in the coordinator and dies with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from node import agent
from protos import documents
from protos.artifact import Manifest
from protos.errors import Blame
from protos.gen import membership_pb2 as pb
from protos.ids import Fence, JobId
from protos.states import AttemptState, Reason, StopMode
from protos.work import Artifact, Checkpoint, Fault, Outcome, Progress, Task

if TYPE_CHECKING:
    from sim_node import SimNode
    from sim_world import World

COLLECTIVE_TIMEOUT_S = 6.0
_PEER_LOST = Fault(Reason.PEER_LOST, Blame.NETWORK, "lost a peer", retryable=True)
_HELD = Fault(Reason.PEER_LOST, Blame.NETWORK, "held on request", retryable=True)
_UNREACHABLE = Fault(Reason.NODE_LOST, Blame.NETWORK, "the model was not delivered", retryable=True)
_USER_CODE = Fault(Reason.USER_CODE, Blame.USER_CODE, "ValueError: shapes", "fix the code")


@dataclass(eq=False)
class Worker:
    """One process of one attempt. Everything it does waits while its machine is frozen."""

    world: World
    node: SimNode
    task: Task
    life: int
    step: int = 0
    joined: bool = False
    group: Group | None = None
    stop_mode: StopMode | None = None
    delivering: bool = False
    alive: bool = True

    @property
    def key(self) -> agent.Key:
        return agent.key_of(self.task)

    @property
    def generation(self) -> tuple[JobId, Fence]:
        return self.task.job_id, self.task.fence

    def begin(self) -> None:
        self._later(self.world.random.uniform(0.1, 2.0), self._meet)
        self._later(self.task.deadline_s, self._give_up)

    def _later(self, delay_s: float, action) -> None:  # type: ignore[no-untyped-def]
        def run() -> None:
            if self.alive and self.node.life == self.life:
                self.node.when_awake(lambda: action() if self.alive and self.node.life == self.life else None)

        self.world.clock.after(delay_s, run)

    def _meet(self) -> None:
        if self.stop_mode is not None or self.group is not None:
            return
        if self.task.world_size == 1:
            Group(self.world, [self]).form()
            return
        if self.joined:
            return
        coordinator = self.world.coordinator
        if coordinator is None or self.node.wire is None or not coordinator.controller.is_current(*self.generation):
            self._later(0.4, self._meet)
            return
        self.joined = True
        ranks = coordinator.rendezvous.setdefault(self.generation, {})
        ranks[self.task.rank] = self
        if len(ranks) == self.task.world_size:
            Group(self.world, [ranks[rank] for rank in sorted(ranks)]).form()

    def _give_up(self) -> None:
        if self.group is None and self.stop_mode is None:
            self.end(Outcome(AttemptState.FAILED, fault=_PEER_LOST))

    def stop(self, mode: StopMode) -> None:
        if not self.alive or self.delivering:
            return
        first = self.stop_mode is None
        self.stop_mode = mode
        if first:
            slow = self.world.random.random() < 0.1
            self._later(
                self.world.random.uniform(3.0, 9.0) if slow else self.world.random.uniform(0.02, 0.6), self._leave
            )

    def _leave(self) -> None:
        if self.delivering:
            return
        if self.group is None:
            fault = Fault(Reason.INTERNAL, Blame.POLICY, "stopped before it began", retryable=True)
            self.end(Outcome(AttemptState.FAILED, fault=fault))
        elif self.stop_mode is StopMode.CANCEL:
            fault = Fault(Reason.CANCELLED_BY_USER, Blame.POLICY, "cancelled on request")
            self.end(self._outcome(AttemptState.FAILED, fault, held=False))
        else:
            self.end(self._outcome(AttemptState.FAILED, _HELD, held=True))

    def lose_peers(self) -> None:
        """The group is broken: this rank finds out, writes what it holds and ends."""
        self._later(self.world.random.uniform(0.05, 0.5), self._report_loss)

    def _report_loss(self) -> None:
        if not self.delivering and self.stop_mode is None:
            self.end(self._outcome(AttemptState.FAILED, _PEER_LOST, held=True))

    def fail(self) -> None:
        self.end(self._outcome(AttemptState.FAILED, _USER_CODE, held=False))

    def deliver(self) -> None:
        """All steps are done: rank 0 uploads the model before it says so."""
        self.delivering = True
        self._later(self.world.random.uniform(0.05, 1.5 if self.task.rank == 0 else 0.4), self._done)

    def _done(self) -> None:
        if self.task.rank == 0 and (self.world.coordinator is None or self.world.faulty(0.05)):
            self.end(Outcome(AttemptState.FAILED, fault=_UNREACHABLE))
            return
        self.end(self._outcome(AttemptState.DONE, None, held=False))

    def _outcome(self, state: AttemptState, fault: Fault | None, held: bool) -> Outcome:
        keep = held and self.step > 0
        if keep:
            self.node.disk[self.task.job_id] = max(self.step, self.node.disk.get(self.task.job_id, 0))
        artifacts = ()
        if state is AttemptState.DONE and self.task.rank == 0:
            artifacts = (Artifact("model.safetensors", self.world.digest, 1),)
        samples = self.step * self.world.batch
        return Outcome(
            state, self.step, samples, artifacts=artifacts, fault=fault, held_step=self.step if keep else None
        )

    def end(self, outcome: Outcome) -> None:
        if self.alive:
            self.alive = False
            self.node.workers.pop(self.key, None)
            self.node.apply(agent.WorkerEnded(*self.key, outcome))

    def say(self, **body: object) -> None:
        message = pb.Durable(job_id=self.task.job_id, fence=self.task.fence, rank=self.task.rank, **body)  # type: ignore[arg-type]
        self.node.send_durable(message)


@dataclass(eq=False)
class Group:
    world: World
    ranks: list[Worker]
    broken: bool = False
    waiting_since_s: float | None = None
    done: bool = field(default=False)

    def form(self) -> None:
        if not all(rank.alive for rank in self.ranks):  # an address of a process that is gone
            for rank in self.ranks:
                if rank.alive:
                    rank._later(1.0, rank._give_up)
            return
        held = [rank.node.disk.get(rank.task.job_id, 0) for rank in self.ranks]
        uploaded = [rank.task.resume.step for rank in self.ranks if rank.task.resume is not None]
        step = max([*held, *uploaded])
        for rank in self.ranks:
            rank.group, rank.step = self, step
            rank._later(self.world.random.uniform(0.0, 0.3), lambda rank=rank: self._ready(rank))
        self.world.clock.after(0.4, self.tick)

    def _ready(self, rank: Worker) -> None:
        rank.node.apply(agent.WorkerReady(*rank.key))

    def tick(self) -> None:
        """A few steps, or the discovery that they cannot be taken together any more."""
        if self.broken or self.done:
            return
        world, first = self.world, self.ranks[0]
        if any(not rank.alive or rank.stop_mode is not None for rank in self.ranks):
            self._break()
            return
        if any(rank.node.frozen for rank in self.ranks):
            if self.waiting_since_s is None:
                self.waiting_since_s = world.clock.now_s
            if world.clock.now_s - self.waiting_since_s > COLLECTIVE_TIMEOUT_S:
                self._break()
                return
            world.clock.after(0.4, self.tick)
            return
        self.waiting_since_s = None
        job = world.jobs[first.task.job_id]
        if first.step < job.total:
            step = min(first.step + world.random.randint(1, 4), job.total)
            world.committed(first.task.job_id, step)
            for rank in self.ranks:
                rank.step = step
                rank.node.apply(agent.WorkerProgressed(*rank.key, step))
                if rank.task.rank == 0 or world.random.random() < 0.3:
                    report = Progress((), step, job.total, 0, None, "train", step * world.batch)
                    rank.say(progress_json=documents.encode(report))
            if world.random.random() < 0.1:
                first.node.disk[first.task.job_id] = step
                checkpoint = Checkpoint(step, step * world.batch, Manifest(()))
                first.say(checkpoint_json=documents.encode(checkpoint))
        if job.fails_at is not None and first.step >= job.fails_at:
            world.random.choice(self.ranks).fail()
            self._break()
        elif first.step >= job.total:
            self.done = True
            for rank in self.ranks:
                rank.deliver()
        else:
            world.clock.after(world.random.uniform(0.2, 0.9), self.tick)

    def _break(self) -> None:
        """Whoever had received every rank's part of the step under way has committed it; the others have not."""
        self.broken = True
        job_id = self.ranks[0].task.job_id
        contributed = self.world.random.random() < 0.5 and self.ranks[0].step + 1 < self.world.jobs[job_id].total
        for rank in self.ranks:
            if contributed and rank.alive and self.world.random.random() < 0.5:
                rank.step += 1
                self.world.committed(job_id, rank.step)
            rank.lose_peers()

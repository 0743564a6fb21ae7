"""The training loop: one rank's whole attempt at a job, the same code for every strategy.

A step is committed when the optimizer has applied it; nothing that can fail for lack of a peer happens after that, so
the last committed step is always a consistent state to hold. Counts are of committed steps only. How the ranks make a
step together is the engine's (strategies/engine_torch.py).
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from protos.artifact import Artifact, digest_file
from protos.errors import Blame, ErrorCode, SpecError
from protos.jobspec import JobSpec
from protos.states import AttemptState, StopMode
from protos.work import Metrics, Outcome, Usage
from strategies import checkpoint_torch, memory_use_torch, model_torch, sampling_torch
from strategies.batches_torch import BatchSource, Slicing, read
from strategies.checkpoint_pace_torch import CheckpointPace
from strategies.checkpoint_writer_torch import CheckpointWriter
from strategies.collective_deadline import StepTimes, patience_s
from strategies.context import TaskContext
from strategies.data.dataset import Dataset, Indices
from strategies.data.finite import not_finite
from strategies.data.opening import open_splits
from strategies.engine_torch import Engine
from strategies.engines_torch import make_engine
from strategies.evaluate_torch import Score
from strategies.faults_torch import DataUnusable, NotANumber, PeerLost, Stopped, fault_of
from strategies.group_torch import Group
from strategies.loss_torch import Loss
from strategies.optimizer_torch import learning_rate, set_learning_rate
from strategies.reporter_torch import Reporter, Totals
from strategies.sample_order import steps as steps_per
from strategies.state_sync_torch import agree_on_data, check_identified, synchronise
from strategies.step_record import StepRecord
from strategies.stuck_wait import LastWord
from strategies.whole_model_torch import WholeModel

COPY_SHARE = 0.9  # of the granted memory, that a copy of the state may fill
STOP_GRACE_S = 0.3  # a broken collective may be the first sign of a stop request that is still on its way


@dataclass(slots=True)
class Run:
    """Everything of one attempt. `step` and `samples` are committed, of the job; `own_*` are of this attempt.

    `patience_s`: of collectives to which another rank may come from a file it writes or an evaluation.
    """

    context: TaskContext
    spec: JobSpec
    group: Group
    device: torch.device
    engine: Engine
    loss: Loss
    train_data: Dataset
    test_data: Dataset | None
    reporter: Reporter
    writer: CheckpointWriter
    steps_per_epoch: int
    steps_total: int
    step: int
    samples: int
    first_step: int
    pace: CheckpointPace
    baseline_memory_bytes: int
    steps: StepRecord
    patience_s: float
    checkpointed_at: int = -1  # the last step of which some rank wrote a checkpoint
    own_samples: int = 0
    evaluated_at: int = -1
    score: Score | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the last committed step, counted from 0."""
        return max(self.step - 1, 0) // self.steps_per_epoch


def train(context: TaskContext) -> Outcome:
    """DONE with the model, or FAILED with a held checkpoint; every other end is an exception (see faults_torch)."""
    began = time.perf_counter()
    group = Group(context.task.rank, context.task.world_size, torch.device("cpu"))
    stopping = threading.Event()

    def stop(_: StopMode) -> None:
        stopping.set()
        group.break_group()

    context.channel.on_stop(stop)
    try:
        run = prepare(context, group)
    except (PeerLost, Stopped) as error:
        return held_before(context, _really(error, context, stopping))
    started, last_word = time.perf_counter(), LastWord(group)

    def held(error: PeerLost | Stopped) -> Outcome:
        return hold(run, error, usage(run, started, started - began))

    context.channel.on_stop(lambda mode: last_word.say_if_stuck(lambda: held(Stopped(mode)), context.channel.leave))
    try:
        loop(run)
        run.group.set_deadline(run.patience_s)  # files are all that is left to wait for
        run.group.close()
        last_word.over()
        return finish(run, usage(run, started, started - began))
    except (PeerLost, Stopped) as error:
        really = _really(error, context, stopping)
        return last_word.say(lambda: held(really))
    finally:
        last_word.over()
        run.writer.close()


def prepare(context: TaskContext, group: Group) -> Run:
    """From the spec to a group of ranks with one state, ready for the next step."""
    task, workspace, spec = context.task, context.workspace, context.task.spec
    torch.set_num_threads(max(context.threads, 1))
    device = torch.device(context.device)
    train_data, test_data = open_data(context)
    check_identified(context, train_data.digest)
    loss = Loss(spec.train.loss, workspace.code_dir)
    model_torch.prepare(spec.model, workspace.code_dir, workspace.weights_path)  # libraries belong to the baseline
    baseline_bytes = memory_use_torch.now_bytes(device)
    engine = make_engine(context, group, loss, train_data)
    digest = checkpoint_torch.spec_digest(spec)
    with group.patient(task.deadline_s):  # until others have checked and read what lies on their disks
        agree_on_data(group, train_data.digest, train_data.rows)
        start = synchronise(group, engine, workspace.checkpoint_dir, digest)
    per_epoch = steps_per(train_data.rows, spec.train.batch_size)
    total = spec.train.steps or (spec.train.epochs or 1) * per_epoch
    channel, kept = context.channel, spec.checkpoint
    totals, record = Totals(total, spec.train.epochs), StepRecord(group)
    times = record.lately if task.world_size > 1 else lambda: None  # of one rank the records say it
    reporter = Reporter(channel.progress, totals, task.rank, context.node_name, start.samples, times)

    def announce(folder: Path, step: int, samples: int) -> None:
        if engine.part[1] == 1 or pace.uploads(step):
            channel.checkpoint(folder, step, samples)

    writer = CheckpointWriter(workspace.checkpoint_dir, digest, kept.keep, kept.every_s, announce)
    pace = CheckpointPace(group, start.step, kept.every_s, lambda: writer.busy or channel.uploading())
    channel.ready()
    return Run(
        context=context,
        spec=spec,
        group=group,
        device=device,
        engine=engine,
        loss=loss,
        train_data=train_data,
        test_data=test_data,
        reporter=reporter,
        writer=writer,
        steps_per_epoch=per_epoch,
        steps_total=total,
        step=start.step,
        samples=start.samples,
        first_step=start.step,
        pace=pace,
        baseline_memory_bytes=baseline_bytes,
        steps=record,
        patience_s=patience_s(sum(tensor.nbytes for tensor in engine.state().values()) * engine.part[1]),
    )


def loop(run: Run) -> None:
    """From the first step that is not committed to the last, with evaluations and checkpoints between."""
    train, task = run.spec.train, run.context.task
    slicing = Slicing.of(task)
    batches = BatchSource(run.train_data, slicing, run.loss, run.device, run.steps_total)
    engine, times = run.engine, StepTimes()
    try:
        while run.step < run.steps_total:
            check_stop(run.context)
            batch = batches.next(run.step)
            rate = learning_rate(train.schedule, train.optimizer.lr, run.step, run.steps_total)
            seed_step(run)
            run.steps.begin()
            with run.group.patient(run.patience_s if run.step == run.checkpointed_at else 0.0):
                loss = engine.gradients(batch)
                if run.group.world_size > 1 and not torch.isfinite(loss):
                    run.reporter.flush()
                    raise NotANumber(run.step + 1, rate, float(loss))
                if train.clip_norm is not None:
                    engine.clip(train.clip_norm)
            set_learning_rate(engine.optimizer, rate)
            engine.optimizer.step()
            run.steps.end()

            run.step += 1
            run.samples += batch.global_rows
            run.own_samples += batch.rows
            run.reporter.step(run.step, batch.epoch, loss, rate, run.samples, run.group.bytes_sent)
            if evaluation_due(run):
                evaluate_now(run)
            checkpoint_if_due(run)
            if (deadline_s := times.step_ended(time.monotonic())) is not None:
                run.group.set_deadline(deadline_s)
        run.reporter.flush()
        if run.evaluated_at != run.step and train.evaluate_every != "never":
            evaluate_now(run)
    except NotANumber as error:
        batches.close(wait=True)
        refuse_bad_rows(run, batches.global_rows(error.step - 1), error)
        raise
    finally:
        batches.close()


def refuse_bad_rows(run: Run, rows: Indices, error: NotANumber) -> None:
    """A loss that is not a number is the data's fault when the batch it came from holds no numbers either."""
    names = run.spec.data.features
    found = not_finite(read(run.train_data, rows), rows, names if isinstance(names, list) else ())
    if found is not None:
        raise DataUnusable("reading rows") from SpecError(
            f"{run.spec.data.source}: {found} of the training data (seen at step {error.step})",
            "replace or remove these values before training",
            code=ErrorCode.DATA_UNUSABLE,
        )


def seed_step(run: Run) -> None:
    """Dropout of a step depends on (seed, step, rank) only, so a resumed run draws what an uninterrupted one would."""
    seed = ((run.spec.train.seed * 1_000_003 + run.step) * 65_537 + run.group.rank) % (1 << 63)
    torch.default_generator.manual_seed(seed)
    if run.device.type == "cuda":
        torch.cuda.default_generators[run.device.index or 0].manual_seed(seed)


def evaluation_due(run: Run) -> bool:
    match run.spec.train.evaluate_every:
        case "epoch":
            return run.step % run.steps_per_epoch == 0
        case int(steps):
            return run.step % steps == 0
    return False


def evaluate_now(run: Run) -> None:
    run.evaluated_at = run.step
    if run.test_data is None or not run.test_data.rows:
        return
    started = time.perf_counter()
    task = run.context.task
    with run.group.patient(run.patience_s):
        run.score = run.engine.evaluate(run.test_data)
    metrics = Metrics(
        time.time(),
        run.step,
        run.epoch,
        "evaluate",
        run.score.loss,
        run.samples,
        accuracy=run.score.accuracy,
        bytes_sent=run.group.bytes_sent,
        node=run.context.node_name,
        rank=task.rank,
    )
    run.reporter.evaluated(metrics, started)


def checkpoint_if_due(run: Run) -> None:
    """One rank per part writes: the node uploads what it announces. Every rank hears at which step: parts of one step
    only are a state, and at the next step those who do not write wait for those who do."""
    alone, whole = run.group.world_size == 1, run.engine.part[1] == 1
    run.writer.poll()  # what has been written by now keeps no rank from the next one
    due = run.writer.due() if alone else run.pace.due(run.step)
    if due:
        run.checkpointed_at = run.step
    if due and run.engine.keeps and not (whole and run.writer.busy):
        run.reporter.flush()  # never checkpoint a state whose loss is not a number
        if has_room_for_copy(run):
            run.writer.start(capture(run, copy=True))
        else:
            run.writer.write_announced(capture(run, copy=False))


def has_room_for_copy(run: Run) -> bool:
    """Training goes on beside a checkpoint when a second copy of the state fits; else it waits for the disk."""
    granted = run.context.memory_bytes
    if granted is None or run.device.type != "cpu":
        return True
    state = run.engine.capture(run.step, run.samples, run.epoch, copy=False)
    size = sum(tensor.nbytes for tensor in (*state.model.values(), *state.optimizer.values()))
    return memory_use_torch.now_bytes(run.device) + size < COPY_SHARE * granted


def hold(run: Run, error: PeerLost | Stopped, used: Usage) -> Outcome:
    """The last committed step on this node's disk, for the next generation of the group. A cancelled job needs none."""
    run.engine.undo()
    held: int | None = None
    if not (isinstance(error, Stopped) and error.mode is StopMode.CANCEL):
        run.reporter.flush()
        if run.step > 0:
            run.writer.write_now(capture(run, copy=False))
            held = run.step if run.engine.part[1] == 1 else None
    fault = fault_of(error, run.context.workspace.code_dir)
    return Outcome(AttemptState.FAILED, run.step, run.samples, metrics_of(run), usage=used, fault=fault, held_step=held)


def held_before(context: TaskContext, error: PeerLost | Stopped) -> Outcome:
    """The group never formed: what earlier attempts left on this node's disk is still what it holds."""
    found = checkpoint_torch.newest(context.workspace.checkpoint_dir, checkpoint_torch.spec_digest(context.task.spec))
    fault = fault_of(error, context.workspace.code_dir)
    samples = checkpoint_torch.samples_of(found.folder) if found.folder is not None else 0
    return Outcome(AttemptState.FAILED, found.step, samples, fault=fault, held_step=found.step or None)


def finish(run: Run, used: Usage) -> Outcome:
    """Rank 0 hands over the model; every rank says what it did."""
    run.reporter.flush()
    run.writer.finish()
    artifacts: tuple[Artifact, ...] = ()
    path = run.context.workspace.output_dir / checkpoint_torch.MODEL_FILE
    if run.engine.write_model(path):
        run.context.channel.artifact(path.name, path)
        artifacts = (Artifact(path.name, digest_file(path), path.stat().st_size),)
        if isinstance(run.engine, WholeModel):
            sampling_torch.show_sample(run.spec.model, run.engine.model, run.context.workspace.code_dir)
    used = replace(used, peak_memory_bytes=memory_use_torch.peak_bytes(run.device))
    return Outcome(AttemptState.DONE, run.step, run.samples, metrics_of(run), artifacts, used)


def capture(run: Run, copy: bool) -> checkpoint_torch.TrainingState:
    return run.engine.capture(run.step, run.samples, run.epoch, copy)


def usage(run: Run, started: float, startup_s: float) -> Usage:
    seconds = time.perf_counter() - started
    return Usage(
        samples=run.own_samples,
        steps=run.step - run.first_step,
        seconds=seconds,
        compute_s=max(seconds - run.group.sync_s, 0.0),
        sync_s=run.group.sync_s,
        bytes_sent=run.group.bytes_sent,
        peak_memory_bytes=memory_use_torch.peak_bytes(run.device),
        startup_s=startup_s,
        baseline_memory_bytes=run.baseline_memory_bytes,
        holds=run.engine.holds,
        step_compute_s=run.steps.compute_s,
        step_sync_s=run.steps.sync_s,
        step_cpu_s=run.steps.cpu_s,
        step_carrying_s=run.steps.carrying_s,
        step_bytes_sent=run.steps.bytes_sent,
    )


def metrics_of(run: Run) -> dict[str, float]:
    """`loss` is that of the last step; `test_loss` and `accuracy` of the last evaluation, when there was one."""
    values = {"loss": run.reporter.last_loss, "samples_per_s": run.reporter.mean_rate}
    if run.score is not None:
        values |= {"test_loss": run.score.loss, "accuracy": run.score.accuracy}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def open_data(context: TaskContext) -> tuple[Dataset, Dataset | None]:
    workspace, spec, data = context.workspace, context.task.spec, context.task.data
    try:
        splits = open_splits(
            spec.data,
            workspace.data_path,
            workspace.code_dir,
            test_path=workspace.test_path,
            digest=str(data.digest) if data is not None else None,
            loss=spec.train.loss,
        )
    except SpecError as error:
        if isinstance(error.__context__, ImportError):  # a package that other nodes may have
            error.blame = Blame.NODE
            error.hint = f"{error.hint} (a package may be missing on {context.node_name} only)"
        raise DataUnusable("opening the data") from error
    return splits.train, splits.test


def check_stop(context: TaskContext) -> None:
    mode = context.channel.stop_requested()
    if mode is not None:
        raise Stopped(mode)


def _really(error: PeerLost | Stopped, context: TaskContext, stopping: threading.Event) -> PeerLost | Stopped:
    """A group broken by our own stop request is no lost peer."""
    if isinstance(error, PeerLost):
        stopping.wait(STOP_GRACE_S)
        mode = context.channel.stop_requested()
        if mode is not None:
            return Stopped(mode)
    return error

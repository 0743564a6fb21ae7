"""Runs one rank of a group whose ranks cut a model, through many cases, in a process of its own (warm_ranks.py).

Connecting is dear, so one group runs all cases of a file one after the other; what a rank found out about a case is
written to `CASE/rank-N/` below the folder of the group, what it printed to `process-N/`.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine_harness import Job, RecordingChannel, TestStore
from warm_ranks import STDERR, WarmProcess

from protos import documents
from protos.plan import Layout
from protos.work import Task
from strategies.context import TaskContext, Workspace

DEADLINE_S = 240.0


@dataclass(frozen=True)
class Case:
    """Train `job` for `steps` (from the state in `resume`, if any), then evaluate, checkpoint and write the model."""

    name: str
    job: Job
    samples: tuple[int, ...]
    steps: int
    accumulate: tuple[int, ...] = ()
    layout: Layout = field(default_factory=lambda: Layout(((0, 1),), sharded=True))
    resume: Path | None = None
    first: int = 0  # the step of that state
    end: str = ""  # "die": the last rank is killed in its second step


class CutGroup:
    """The ranks of one group and what they found."""

    def __init__(self, folder: Path, port: int, ranks: int, cases: list[Case]) -> None:
        self.folder = folder
        self.ranks = ranks
        self.processes = []
        for rank in range(ranks):
            document = []
            for case in cases:
                values = {"accumulate": case.accumulate[rank] if case.accumulate else 1, "layout": case.layout}
                task = replace(case.job.task(rank, case.samples, ranks, **values), world_size=ranks)
                document.append(
                    {
                        "name": case.name,
                        "task": json.loads(documents.encode(task)),
                        "workspace": documents.plain(case.job.workspace(f"{folder.name}-node{rank}", case.name)),
                        "steps": case.steps,
                        "resume": str(case.resume) if case.resume else None,
                        "end": case.end,
                    }
                )
            config = self._process(rank) / "config.json"
            config.parent.mkdir(parents=True)
            config.write_text(json.dumps({"port": port, "folder": str(folder), "cases": document}))
            self.processes.append(WarmProcess(config, "cut_model_harness"))

    def wait(self) -> None:
        for process in self.processes:
            process.wait(DEADLINE_S)

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(10)
            process.stdin.close()

    def _process(self, rank: int) -> Path:
        return self.folder / f"process-{rank}"

    def found(self, name: str, rank: int = 0) -> dict[str, Any]:
        """What a rank reports of a case; fails with its traceback when it got no further."""
        path = self.folder / name / f"rank-{rank}" / "found.json"
        assert path.exists(), (self._process(rank) / STDERR).read_text()[-4000:]
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def model(self, name: str) -> dict[str, Any]:
        import safetensors.torch

        loaded: dict[str, Any] = safetensors.torch.load_file(self.folder / name / "rank-0" / "model.safetensors")
        return loaded

    def checkpoint(self, name: str) -> Path:
        """The folder with the parts of all ranks."""
        return self.folder / name / "checkpoint"


def whole_state(folder: Path, digest: str) -> Any:
    """The parts of a checkpoint put together."""
    import torch

    from strategies import checkpoint_torch
    from strategies.checkpoint_torch import TrainingState
    from strategies.extent import Extent

    parts = [checkpoint_torch.load(each.folder) for each in checkpoint_torch.stored(folder, digest)[0]]
    assert parts
    assert len(parts) == parts[0].parts
    whole: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
    scalars: dict[str, Any] = {}
    for part in parts:
        scalars.update(part.scalars)
        for kind, tensors in (("model", part.model), ("optimizer", part.optimizer)):
            for name, tensor in tensors.items():
                extent = part.extents.get(name, Extent.whole(tuple(tensor.shape)))
                target = whole[kind].setdefault(name, torch.full(extent.shape, -1, dtype=tensor.dtype))
                target[extent.inside(Extent.whole(extent.shape))] = tensor
    first = parts[0]
    return TrainingState(
        first.step, first.samples, first.epoch, whole["model"], first.aliases, whole["optimizer"], scalars
    )


def run_case(context: TaskContext, group: Any, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    import torch

    from strategies import checkpoint_torch
    from strategies.batches_torch import BatchSource, Slicing
    from strategies.loss_torch import Loss
    from strategies.memory_use_torch import now_bytes, peak_bytes
    from strategies.optimizer_torch import learning_rate, set_learning_rate
    from strategies.sharded_torch import Sharded
    from strategies.train_loop_torch import open_data

    task, workspace, spec = context.task, context.workspace, context.task.spec
    train_data, test_data = open_data(context)
    loss = Loss(spec.train.loss, workspace.code_dir)
    assert task.layout is not None
    gc.collect()
    before = now_bytes(torch.device("cpu"))
    if task.layout.tensor > 1:
        from strategies.tensor_parallel_torch import TensorParallel

        engine: Any = TensorParallel(context, loss, train_data, torch.device("cpu"))
    else:
        engine = Sharded(context, loss, train_data, torch.device("cpu"))
    engine.connected(context, group)
    gc.collect()
    built = now_bytes(torch.device("cpu")) - before
    sent, kernel = group.bytes_sent, group.sent_by_kernel()
    step = 0
    digest = checkpoint_torch.spec_digest(spec)
    if case["resume"]:
        state = whole_state(Path(case["resume"]), digest)
        engine.restore(state)
        step = state.step
    total = spec.train.steps or 0
    batches = BatchSource(train_data, Slicing.of(task), loss, torch.device("cpu"), total)
    losses: list[float] = []
    while len(losses) < case["steps"]:
        if case["end"] == "die" and task.rank == task.world_size - 1 and len(losses) == 1:
            os._exit(9)
        torch.manual_seed(1000 * step + task.rank)
        losses.append(float(engine.gradients(batches.next(step))))
        if spec.train.clip_norm is not None:
            engine.clip(spec.train.clip_norm)
        set_learning_rate(engine.optimizer, learning_rate(spec.train.schedule, spec.train.optimizer.lr, step, total))
        engine.optimizer.step()
        step += 1
    grown = peak_bytes(torch.device("cpu")) - before
    sent, kernel = group.bytes_sent - sent, group.sent_by_kernel() - kernel
    state = engine.capture(step, 0, 0, copy=True)
    checkpoint_torch.write(folder.parent / "checkpoint", state, digest, 5)
    engine.restore(state)  # its own parts fit
    again = engine.capture(step, 0, 0, copy=False)
    assert again.model.keys() == state.model.keys()
    assert all(torch.equal(again.model[name], state.model[name]) for name in state.model)
    assert again.optimizer.keys() == state.optimizer.keys()
    assert all(torch.equal(again.optimizer[name], state.optimizer[name]) for name in state.optimizer)
    score = engine.evaluate(test_data) if test_data is not None and test_data.rows else None
    wrote = engine.write_model(folder / "model.safetensors")
    assert wrote == (task.rank == 0)
    batches.close()
    return {
        "losses": losses,
        "score": [score.loss, score.accuracy] if score else None,
        "parameter_bytes": engine.parameter_bytes,
        "built_bytes": built,
        "grown_bytes": grown,
        "sent_bytes": sent,
        "sent_by_kernel_bytes": kernel,
    }


def run_rank(path: Path) -> None:
    """Ends the process."""
    import torch

    from strategies.group_torch import Group, connect

    torch.set_num_threads(1)
    config = json.loads(path.read_text())
    channel = RecordingChannel(TestStore(config["port"]))
    group: Any = None
    for case in config["cases"]:
        task = documents.decode(Task, json.dumps(case["task"]))
        workspace = Workspace(**{name: Path(value) if value else None for name, value in case["workspace"].items()})
        context = TaskContext(task, workspace, channel, "lo", 1, "cpu", f"node{task.rank}")
        if group is None:
            group = connect(context, Group(task.rank, task.world_size, torch.device("cpu")))
        folder = Path(config["folder"]) / case["name"] / f"rank-{task.rank}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in Path(workspace.code_dir or ".").iterdir():
            sys.modules.pop(path.stem, None)  # every case brings its own model.py
        try:
            found = run_case(context, group, case, folder)
        except Exception as error:
            traceback.print_exc()
            found = {"error": type(error).__name__, "message": str(error)}
        (folder / "found.json").write_text(json.dumps(found))
        if group.broken.is_set():
            break
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

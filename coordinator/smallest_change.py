"""For a job that fits nowhere: the smallest changes that would make it fit, each one tried out before it is said.

Pure. Owns what is tried and in which order: another strategy, fewer options, accumulation, a smaller batch, an
optimizer with less state, more memory on one node. A change that does not help is not named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from protos.jobspec import BUILT_STRATEGIES, JobSpec, StrategyName, TrainSpec
from protos.plan import NodeView
from strategies.base import Inputs
from strategies.registry import BUILT

_DOUBLINGS = 16  # of the memory of a node, or halvings of a batch
_GIB = 1024**3
_STEP_BYTES = _GIB // 10


def smallest_changes(inputs: Inputs, fitting: Iterable[str]) -> tuple[str, ...]:
    """`fitting`: strategies that would do, although the job file names another one."""
    if not inputs.profile.trainable or not inputs.eligible:
        return ()
    return tuple(_changes(inputs, tuple(fitting)))


def _changes(inputs: Inputs, fitting: tuple[str, ...]) -> Iterator[str]:
    spec, train = inputs.spec, inputs.spec.train
    if spec.strategy != "auto" and fitting:
        yield f"strategy: {' or '.join(fitting)}"
    if spec.strategy_options is not None and _fits(inputs, spec.model_copy(update={"strategy_options": None})):
        yield f"strategy: {spec.strategy} without options"
    if train.accumulate != "auto" and _fits(inputs, _with(spec, accumulate="auto")):
        yield "train.accumulate: auto"
    elif (batch := _smaller_batch(inputs)) is not None:
        yield f"train.batch_size: {batch}"
    if train.optimizer.name != "sgd":
        plain = type(train.optimizer)(name="sgd", lr=train.optimizer.lr)
        if _fits(inputs, _with(spec, optimizer=plain)):
            yield "train.optimizer: sgd, which keeps no state"
    if (more := _more_memory(inputs)) is not None:
        yield more


def _with(spec: JobSpec, **changes: object) -> JobSpec:
    train: TrainSpec = spec.train.model_copy(update=changes)
    return spec.model_copy(update={"train": train})


def _fits(inputs: Inputs, spec: JobSpec) -> bool:
    asked = replace(inputs, spec=spec)
    return any(not BUILT[name].feasible(asked) for name in _wanted(spec))


def _wanted(spec: JobSpec) -> tuple[StrategyName, ...]:
    """Those that are quick to ask stand for all of them where the job file names none."""
    if spec.strategy != "auto":
        return (StrategyName(spec.strategy),)
    return tuple(name for name in BUILT_STRATEGIES if name is not StrategyName.PIPELINE_PARALLEL)


def _smaller_batch(inputs: Inputs) -> int | None:
    batch = inputs.spec.train.batch_size
    for _ in range(_DOUBLINGS):
        batch //= 2
        if batch < 1:
            return None
        if _fits(inputs, _with(inputs.spec, batch_size=batch)):
            return batch
    return None


def _more_memory(inputs: Inputs) -> str | None:
    """On the node that grants the most; memory of a GPU cannot be granted."""
    nodes = [node for node in inputs.eligible if not node.capacity.gpus]
    if not nodes:
        return None
    roomiest = max(nodes, key=lambda node: node.capacity.memory_bytes)
    granted = roomiest.capacity.memory_bytes
    enough = next((granted << k for k in range(1, _DOUBLINGS) if _fits_with(inputs, roomiest, granted << k)), None)
    if enough is None:
        return None
    short = enough // 2
    while enough - short > _STEP_BYTES:
        middle = (short + enough) // 2
        if _fits_with(inputs, roomiest, middle):
            enough = middle
        else:
            short = middle
    more = math.ceil((enough - granted) / _STEP_BYTES) / 10
    return f"{more:.1f} GiB more memory on {roomiest.name} (it grants {granted / _GIB:.1f} GiB)"


def _fits_with(inputs: Inputs, node: NodeView, memory_bytes: int) -> bool:
    roomy = replace(node, capacity=replace(node.capacity, memory_bytes=memory_bytes))
    nodes = tuple(roomy if each is node else each for each in inputs.cluster.nodes)
    return _fits(replace(inputs, cluster=replace(inputs.cluster, nodes=nodes)), inputs.spec)

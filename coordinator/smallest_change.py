"""For a job that fits nowhere: the smallest changes that would make it fit, each one tried out before it is said.

Pure. Owns what is tried and in which order: another strategy, fewer options, accumulation, a smaller batch, an
optimizer with less state, more memory on one node. A change that does not help is not named. Invariant: at most
MOST_TRIES questions to the strategies, as the control loop waits for the answer; what they do not suffice for is said
less exactly, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from protos.jobspec import BUILT_STRATEGIES, JobSpec, StrategyName, StrategyOptions, TrainSpec
from protos.plan import NodeView
from strategies.base import Inputs
from strategies.registry import BUILT

MOST_TRIES = 28
_HALVINGS = 8  # of a batch
_DOUBLINGS = 15  # of the memory of a node
_GIB = 1024**3
_STEP_BYTES = _GIB // 10


def smallest_changes(inputs: Inputs, fitting: Iterable[str]) -> tuple[str, ...]:
    """`fitting`: strategies that would do, although the job file names another one."""
    if not inputs.profile.trainable or not inputs.eligible:
        return ()
    return tuple(_changes(inputs, tuple(fitting), Trials()))


@dataclass(slots=True)
class Trials:
    """Counts what is asked: a bounded number of questions, each answered in milliseconds."""

    left: int = MOST_TRIES

    def fits(self, inputs: Inputs, spec: JobSpec | None = None) -> bool:
        """False also when there are no tries left."""
        if self.left <= 0:
            return False
        self.left -= 1
        asked = replace(inputs, spec=spec or inputs.spec)
        return any(not BUILT[name].feasible(_quick(asked, name)) for name in _wanted(asked.spec))


def _changes(inputs: Inputs, fitting: tuple[str, ...], trials: Trials) -> Iterator[str]:
    spec, train = inputs.spec, inputs.spec.train
    if spec.strategy != "auto" and fitting:
        yield f"strategy: {' or '.join(fitting)}"
    if spec.strategy_options is not None:
        plain = spec.model_copy(update={"strategy_options": None})
        if trials.fits(inputs, plain):
            yield f"strategy: {spec.strategy} without options"
    if train.accumulate != "auto" and trials.fits(inputs, _with(spec, accumulate="auto")):
        yield "train.accumulate: auto"
    elif (batch := _smaller_batch(inputs, trials)) is not None:
        yield f"train.batch_size: {batch}"
    if train.optimizer.name != "sgd":
        stateless = type(train.optimizer)(name="sgd", lr=train.optimizer.lr)
        if trials.fits(inputs, _with(spec, optimizer=stateless)):
            yield "train.optimizer: sgd, which keeps no state"
    if (more := _more_memory(inputs, trials)) is not None:
        yield more


def _with(spec: JobSpec, **changes: object) -> JobSpec:
    train: TrainSpec = spec.train.model_copy(update=changes)
    return spec.model_copy(update={"train": train})


def _wanted(spec: JobSpec) -> tuple[StrategyName, ...]:
    """Those that are quick to ask stand for all of them where the job file names none."""
    if spec.strategy != "auto":
        return (StrategyName(spec.strategy),)
    return tuple(name for name in BUILT_STRATEGIES if name is not StrategyName.PIPELINE_PARALLEL)


def _quick(inputs: Inputs, strategy: StrategyName) -> Inputs:
    """A pipeline is asked about one shape instead of all of them: one chain and micro-batches of a single sample, which
    take the least memory. What fits so fits."""
    spec = inputs.spec
    if strategy is not StrategyName.PIPELINE_PARALLEL or spec.train.accumulate != "auto":
        return inputs
    asked = spec.strategy_options or StrategyOptions()
    replicas = asked.replicas or 1
    smallest = {"replicas": replicas, "microbatches": asked.microbatches or max(1, spec.train.batch_size // replicas)}
    options = asked.model_copy(update=smallest)
    return replace(inputs, spec=spec.model_copy(update={"strategy": strategy, "strategy_options": options}))


def _smaller_batch(inputs: Inputs, trials: Trials) -> int | None:
    batch = inputs.spec.train.batch_size
    halves = [batch >> k for k in range(1, _HALVINGS + 1) if batch >> k]
    return next((half for half in halves if trials.fits(inputs, _with(inputs.spec, batch_size=half))), None)


def _more_memory(inputs: Inputs, trials: Trials) -> str | None:
    """On the node that grants the most; memory of a GPU cannot be granted."""
    nodes = [node for node in inputs.eligible if not node.capacity.gpus]
    if not nodes:
        return None
    roomiest = max(nodes, key=lambda node: node.capacity.memory_bytes)
    granted = roomiest.capacity.memory_bytes

    def fits(memory_bytes: int) -> bool:
        return trials.fits(_granting(inputs, roomiest, memory_bytes))

    if not fits(granted << _DOUBLINGS):
        return None
    short, enough = 0, _DOUBLINGS  # doublings: more memory never hurts, so halve the range
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (short, middle) if fits(granted << middle) else (middle, enough)
    too_little, suffices = granted << short, granted << enough
    while suffices - too_little > _STEP_BYTES and trials.left:
        half_way = (too_little + suffices) // 2
        too_little, suffices = (too_little, half_way) if fits(half_way) else (half_way, suffices)
    more = math.ceil((suffices - granted) / _STEP_BYTES) / 10
    return f"{more:.1f} GiB more memory on {roomiest.name} (it grants {granted / _GIB:.1f} GiB)"


def _granting(inputs: Inputs, node: NodeView, memory_bytes: int) -> Inputs:
    roomy = replace(node, capacity=replace(node.capacity, memory_bytes=memory_bytes))
    nodes = tuple(roomy if each is node else each for each in inputs.cluster.nodes)
    return replace(inputs, cluster=replace(inputs.cluster, nodes=nodes))

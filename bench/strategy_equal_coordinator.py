"""A coordinator that can be made to cut evenly: `python -m bench.strategy_equal_coordinator coordinator start ...`.

It is the real one. Only when the name of a job ends with EQUAL are the strategies told that every node computes as fast
as the fastest, and are not told what finished jobs taught about them, so that they give equal slices and equal stages;
what they then plan is run by the same engines, on the same nodes, under the same caps. Memory and links stay what they
are, and every other job is planned as always.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from coordinator.cli.main import main
from protos.jobspec import StrategyName
from protos.plan import Learned, NodeView, PlannedSubtask
from strategies.base import Inputs, PlacedEstimate, Strategy
from strategies.registry import BUILT

EQUAL = "equal"


@dataclass(frozen=True, slots=True)
class AsIfEqual:
    """A Strategy around another one."""

    inner: Strategy

    @property
    def name(self) -> StrategyName:
        return self.inner.name

    def feasible(self, inputs: Inputs) -> tuple[str, ...]:
        return self.inner.feasible(as_if_equal(inputs))

    def estimate(self, inputs: Inputs) -> PlacedEstimate:
        return self.inner.estimate(as_if_equal(inputs))

    def decompose(self, inputs: Inputs, placed: PlacedEstimate) -> tuple[PlannedSubtask, ...]:
        return self.inner.decompose(as_if_equal(inputs), placed)


def as_if_equal(inputs: Inputs) -> Inputs:
    """The same question about nodes that are all as fast as the fastest; of other jobs the question itself."""
    nodes = inputs.cluster.nodes
    if not inputs.spec.name.endswith(EQUAL) or not nodes:
        return inputs
    fastest = max(nodes, key=lambda node: node.capacity.cores)
    alike = tuple(_as_fast(node, fastest) for node in nodes)
    return replace(inputs, cluster=replace(inputs.cluster, nodes=alike, learned=Learned()))


def _as_fast(node: NodeView, fastest: NodeView) -> NodeView:
    model = fastest.capacity
    capacity = replace(
        node.capacity,
        cores=model.cores,
        flops=model.flops,
        memory_bandwidth=model.memory_bandwidth,
        families=model.families,
    )
    return replace(node, capacity=capacity)


def install() -> None:
    """From here on this process plans so."""
    assert isinstance(BUILT, dict)  # the registry every room looks into
    for name, strategy in BUILT.items():
        BUILT[name] = AsIfEqual(strategy)


if __name__ == "__main__":
    install()
    main()

"""A traced graph run once with fake tensors, to know what only a run tells: the type of each value under the job's
precision, and whether a gradient flows to it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily


@dataclass(frozen=True, slots=True)
class Facts:
    """Of the value of one node when it runs: its type under the job's precision, and whether a gradient flows."""

    dtype: torch.dtype
    requires_grad: bool


class _Watch(fx.Interpreter):
    """Runs the graph with fake tensors and writes down what came out of each node."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.seen: dict[fx.Node, Facts] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.seen[n] = Facts(result.dtype, result.requires_grad)
        return result


def watched(
    graph: fx.Graph,
    branches: Mapping[str, fx.GraphModule],
    trainable: Collection[fx.Node],
    rows: int,
    precision: str,
) -> dict[fx.Node, Facts]:
    """Facts of every node whose value is a tensor. Raises what an operation raises."""
    root = nn.Module()
    for name, branch in branches.items():
        root.add_module(name, branch)
    half = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
    with unset_fake_temporarily(), FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad(), half:
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        watch = _Watch(root, graph)
        watch.run(*(_stand_in(node, rows, node in trainable) for node in placeholders))
    return watch.seen


def _stand_in(node: fx.Node, rows: int, trainable: bool) -> Tensor:
    value = node.meta["val"]
    sizes = [rows if isinstance(size, torch.SymInt) else size for size in value.shape]
    return torch.zeros(sizes, dtype=value.dtype, requires_grad=trainable)

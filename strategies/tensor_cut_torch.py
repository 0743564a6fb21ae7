"""What the plan of a tensor-parallel run comes to: how much of the model is cut, and which collectives its layers need.

Says of the plan that `derive` makes (strategies/tensor_plan_torch.py) what strategies/tensor_layers_torch.py then does:
a pair adds up its output, and in the backward pass the gradient of its input; a layer beside pairs gathers its output
and adds up the gradient of its input; a table of embeddings adds up its output. Nothing is added up for an input of
which no gradient is wanted. Shapes are those of a traced forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from protos.errors import SpecError
from protos.model import LayerProfile, TensorCut
from strategies.tensor_plan_torch import TensorPlan, derive


def tensor_cuts(
    model: nn.Module, ranks: Iterable[int], layers: Iterable[LayerProfile], wanted_bytes: Mapping[str, float]
) -> tuple[tuple[TensorCut, ...], str]:
    """One for each possible number of ranks, and why there is none or "". `wanted_bytes`: per sample, of the inputs of
    each module of which a gradient is wanted."""
    known = {layer.name: layer for layer in layers}
    found, why = [], ""
    for count in ranks:
        try:
            plan = derive(model, count)
        except SpecError as error:
            why = why or error.message
        else:
            found.append(_cut(model, count, plan, known, wanted_bytes))
    return tuple(found), "" if found else why


def _cut(
    model: nn.Module, ranks: int, plan: TensorPlan, layers: Mapping[str, LayerProfile], wanted: Mapping[str, float]
) -> TensorCut:
    columns = [name for pair in plan.pairs for name in pair.columns]
    rows = [pair.row for pair in plan.pairs]
    summed = [_output(layers, name) for name in (*rows, *plan.embeddings)]
    summed += [max(wanted.get(name, 0.0) for name in pair.columns) for pair in plan.pairs]  # the same input
    summed += [wanted.get(name, 0.0) for name in plan.gathered]
    gathered = [_output(layers, name) for name in plan.gathered]
    around = {name.rpartition(".")[0] for name in rows} - {""}  # attention between its projections: each its heads
    computed = {*columns, *rows, *plan.gathered, *around}
    dimensions = plan.dimensions()
    return TensorCut(
        ranks=ranks,
        layers=len(columns) + len(rows) + len(plan.gathered) + len(plan.embeddings),
        parameters=sum(value.numel() for name, value in model.named_parameters() if name in dimensions),
        flops_per_sample=sum(layer.flops_per_sample for name, layer in layers.items() if name in computed),
        sums=sum(size > 0 for size in summed),
        summed_bytes_per_sample=sum(summed),
        gathers=sum(size > 0 for size in gathered),
        gathered_bytes_per_sample=sum(gathered),
    )


def _output(layers: Mapping[str, LayerProfile], name: str) -> float:
    return layers[name].output_bytes_per_sample if name in layers else 0.0

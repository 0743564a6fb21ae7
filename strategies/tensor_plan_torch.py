"""How single layers are cut over ranks, derived from the modules of a model: which weights by columns, which by rows.

A pair is one or more linear layers cut by output (query, key and value; the first of a feed-forward) and the one cut by
input that follows (strategies/layer_pairs_torch.py): between them each rank has its part of the features. A layer
beside such pairs is cut by output and its output gathered; an embedding is cut by rows. A matrix that gives query, key
and value at once is of the second kind: its columns are not grouped by head. The plan decides about speed only: what is
computed is the same for any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from protos.errors import ErrorCode, SpecError
from strategies.layer_pairs_torch import layer_pairs

SMALL_SHARE = 0.02  # of the parameters: a single layer with less is held whole by every rank
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")  # what models call their number


@dataclass(frozen=True, slots=True)
class Pair:
    """Names of the layers cut by output, and of the one cut by input."""

    columns: tuple[str, ...]
    row: str


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """`left`: layers that every rank holds whole, and why."""

    pairs: tuple[Pair, ...]
    gathered: tuple[str, ...]
    embeddings: tuple[str, ...]
    left: Mapping[str, str]

    def dimensions(self) -> dict[str, int]:
        """Which dimension of a parameter is cut, by its name."""
        columns = [*self.gathered, *(name for pair in self.pairs for name in pair.columns)]
        cut = {f"{layer}.{leaf}": 0 for layer in columns for leaf in ("weight", "bias")}
        cut |= {f"{layer}.weight": 0 for layer in self.embeddings}
        return cut | {f"{pair.row}.weight": 1 for pair in self.pairs}


def derive(model: nn.Module, ranks: int) -> TensorPlan:
    """Raises SpecError, saying which layers were looked at, when nothing can be cut."""
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    closed = {id(each) for module in model.modules() if _is_closed(module) for each in module.modules()}
    left: dict[str, str] = {}
    pairs: list[Pair] = []
    taken: set[int] = set()
    for columns, row in layer_pairs(model):
        members = [*columns, row]
        if any(id(member) in taken or id(member) in closed for member in members):
            continue
        unit = ranks * _head_width(model, names[id(columns[0])], columns)
        if any(column.out_features % unit for column in columns):
            left |= {names[id(each)]: f"its width or heads are no multiple of {ranks}" for each in members}
            continue
        taken |= {id(member) for member in members}
        pairs.append(Pair(tuple(names[id(column)] for column in columns), names[id(row)]))
    tied = _tied(model)
    least = SMALL_SHARE * sum(parameter.numel() for parameter in model.parameters())
    gathered: list[str] = []
    embeddings: list[str] = []
    for name, module in model.named_modules():
        if id(module) in taken or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        why = _why_whole(module, ranks, least, id(module) in closed)
        if why:
            left.setdefault(name, why)
        else:
            (embeddings if isinstance(module, nn.Embedding) else gathered).append(name)
    left = {name: why for name, why in left.items() if name not in gathered}
    plan = TensorPlan(tuple(pairs), tuple(gathered), tuple(embeddings), left)
    plan = _without_conflicts(model, plan, tied)
    if not plan.dimensions():
        looked_at = ", ".join(f"{name} ({why})" for name, why in list(plan.left.items())[:6])
        raise SpecError(
            f"no layer of the model can be cut over {ranks} ranks; looked at: {looked_at or 'no Linear, no Embedding'}",
            "use a strategy that holds whole layers: pipeline_parallel, data_parallel, or model_parallel with sharding",
            code=ErrorCode.UNSUPPORTED,
        )
    return plan


def _is_closed(module: nn.Module) -> bool:
    """Computes with the weights of its layers without calling them."""
    return isinstance(module, nn.MultiheadAttention)


def _head_width(model: nn.Module, name: str, columns: list[nn.Linear]) -> int:
    """Of layers that make query, key and value, where their module says how many heads it has; else 1. Heads that are
    not shared out evenly would be put together again between the layers of the pair."""
    if len(columns) < 3:
        return 1
    module = model.get_submodule(name.rpartition(".")[0])
    heads = next((found for each in HEADS if type(found := getattr(module, each, None)) is int and found > 0), 1)
    width = max(column.out_features for column in columns)
    return width // heads if heads > 1 and width % heads == 0 else 1


def _why_whole(module: nn.Linear | nn.Embedding, ranks: int, least: float, closed: bool) -> str:
    if closed or type(module) not in (nn.Linear, nn.Embedding):
        return "its weights are used without calling it"
    if module.weight.numel() < least:
        return "it is small"
    if len(module.weight) < ranks:
        return f"it has fewer rows than there are ranks ({ranks})"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.padding_idx is not None):
        return "it has max_norm or padding_idx"
    return ""


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(every) for every in names.values() if len(every) > 1 for name in every}


def _without_conflicts(model: nn.Module, plan: TensorPlan, tied: Mapping[str, tuple[str, ...]]) -> TensorPlan:
    """A parameter under two names is cut alike under both, or not at all."""
    cut = plan.dimensions()
    bad = {
        each.rpartition(".")[0]
        for name, dimension in cut.items()
        for each in tied.get(name, ())
        if any(cut.get(other) != dimension for other in tied[name])
    }
    if not bad:
        return plan
    pairs = tuple(pair for pair in plan.pairs if not bad & {*pair.columns, pair.row})
    left = {**plan.left, **dict.fromkeys(sorted(bad), "its weight is tied to one that is used otherwise")}
    for pair in plan.pairs:
        if pair not in pairs:
            left |= {name: left.get(name, "the layer beside it is held whole") for name in (*pair.columns, pair.row)}
    return TensorPlan(
        pairs,
        tuple(name for name in plan.gathered if name not in bad),
        tuple(name for name in plan.embeddings if name not in bad),
        left,
    )

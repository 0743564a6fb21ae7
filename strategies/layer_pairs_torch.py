"""Linear layers of a model that follow each other with nothing but arithmetic by feature between them: one or more that
take the same input (query, key and value; the first of a feed-forward), and the one that takes what comes of them.

Found by names, shapes and the order in which a model defines its layers, not by running it: who takes two layers for
such a pair that are none computes the same, only slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import nn

LayerPair = tuple[list[nn.Linear], nn.Linear]


def layer_pairs(model: nn.Module) -> Iterator[LayerPair]:
    """Those within one module first; a layer may be in several."""
    asking = {id(module) for module in model.modules() if _asks(module)}
    for module in model.modules():
        if id(module) not in asking:
            yield from _within(module)
    yield from _across(model)


def _asks(module: nn.Module) -> bool:
    """Whether it makes query, key and value, and leaves it to another module to put heads together."""
    linears = [(name, child) for name, child in module.named_children() if type(child) is nn.Linear]
    names = sorted(name[:1].lower() for name, _ in linears)
    return names == ["k", "q", "v"] and len({child.in_features for _, child in linears}) == 1


def _across(model: nn.Module) -> Iterator[LayerPair]:
    """Layers of different modules, by the order in which those are defined: query, key and value with the next layer,
    and one that widens with the next one that is as much narrower again."""
    ordered = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    places = {id(module): place for place, module in enumerate(ordered)}
    for module in model.modules():
        if _asks(module):
            columns = [child for child in module.children() if type(child) is nn.Linear]
            after = max(places[id(column)] for column in columns) + 1
            row = ordered[after] if after < len(ordered) else None
            if type(row) is nn.Linear and row.in_features == max(column.out_features for column in columns):
                yield columns, row
    for first, then in pairwise(ordered):
        if (
            type(first) is nn.Linear
            and type(then) is nn.Linear
            and then.in_features == first.out_features > first.in_features == then.out_features
        ):
            yield [first], then


def _within(parent: nn.Module) -> list[LayerPair]:
    if isinstance(parent, nn.Sequential):
        return _in_sequence(list(parent.children()))
    return _among([child for child in parent.children() if type(child) is nn.Linear])


def _in_sequence(children: Sequence[nn.Module]) -> list[LayerPair]:
    """A linear layer and the next one, with nothing that has parameters between them."""
    found: list[LayerPair] = []
    first: nn.Linear | None = None
    for child in children:
        if type(child) is nn.Linear:
            if first is not None and first.out_features == child.in_features:
                found.append(([first], child))
                first = None
            else:
                first = child
        elif any(True for _ in child.parameters()) or isinstance(child, nn.Flatten | nn.Unflatten):
            first = None
    return found


def _among(linears: list[nn.Linear]) -> list[LayerPair]:
    """Of the layers of a module that is no sequence, by their shapes: those from the width d to h, with one back from h
    to d. The one with the most others comes first, of equals the one defined last. Narrower keys and values count when
    they are defined between the query and the layer back."""
    found: list[LayerPair] = []
    free = list(linears)
    while True:
        best: LayerPair | None = None
        for row in free:
            columns = [
                each
                for each in free
                if each is not row and each.in_features == row.out_features and each.out_features == row.in_features
            ]
            if columns and (best is None or len(columns) >= len(best[0])):
                best = columns, row
        if best is None:
            return found
        columns, row = best
        start, stop = linears.index(columns[0]), linears.index(row)
        columns += [
            each
            for each in linears[start:stop]
            if each in free
            and each.in_features == row.out_features
            and each.out_features < row.in_features
            and row.in_features % each.out_features == 0
        ]
        found.append((columns, row))
        free = [each for each in free if each is not row and all(each is not column for column in columns)]

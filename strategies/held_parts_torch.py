"""The parts of a model that one rank holds when single tensors are cut: what its optimizer works on and what it writes
to a checkpoint.

Owns the state of a rank by name and box (strategies/extent.py). Every optimizer that can be chosen works element by
element, so it is given the local parts as plain parameters. Invariant: `local` shares its memory with what the engine
computes with; a tensor that is not cut is held whole by every rank, equal on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from protos.errors import SpecError
from protos.jobspec import OptimizerSpec
from strategies.checkpoint_torch import TrainingState
from strategies.extent import Extent
from strategies.optimizer_torch import build_optimizer


def chunk_of(shape: tuple[int, ...], dimension: int, rank: int, ranks: int) -> Extent:
    """The part of a rank when a dimension is cut as torch.chunk does: equal parts, the last smaller or empty."""
    length = shape[dimension]
    size = -(-length // ranks)
    start = min(rank * size, length)
    stop = min(start + size, length)
    starts, sizes = [0] * len(shape), list(shape)
    starts[dimension], sizes[dimension] = start, stop - start
    return Extent(shape, tuple(starts), tuple(sizes))


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the state dict."""

    local: Tensor  # a Parameter when it is one of the model's
    extent: Extent

    @property
    def trainable(self) -> bool:
        return isinstance(self.local, nn.Parameter) and self.local.requires_grad


class HeldParts:
    """All of them, by name in the order of the state dict; `aliases` are other names of tied tensors."""

    def __init__(self, parts: Mapping[str, Part], aliases: Mapping[str, str], optimizer: OptimizerSpec) -> None:
        self.parts = parts
        self.aliases = aliases
        self.trainable = {name: part.local for name, part in parts.items() if part.trainable}
        self.optimizer = build_optimizer(optimizer, nn.ParameterList(self.trainable.values()))
        self._index = {name: number for number, name in enumerate(self.trainable)}

    @property
    def parameter_bytes(self) -> int:
        """Of what this rank holds."""
        return sum(part.local.numel() * part.local.element_size() for part in self.parts.values())

    def state(self) -> dict[str, Tensor]:
        return {name: part.local.detach() for name, part in self._present().items()}

    def extents(self) -> dict[str, Extent]:
        return {name: part.extent for name, part in self._present().items() if not part.extent.is_whole}

    def capture(self, place: TrainingState, copy: bool) -> TrainingState:
        """`place` says which step and part it is; its tensors are replaced by those held here."""
        present, extents = self._present(), self.extents()
        named: dict[str, Tensor] = {}
        scalars: dict[str, float | int | bool | None] = {}
        for name, parameter in self.trainable.items():
            for key, value in self.optimizer.state.get(parameter, {}).items() if name in present else ():
                if isinstance(value, Tensor):
                    named[f"{name}/{key}"] = value
                    if name in extents and value.shape == parameter.shape:
                        extents[f"{name}/{key}"] = present[name].extent
                elif value is None or isinstance(value, (bool, int, float)):
                    scalars[f"{name}/{key}"] = value
        return TrainingState(
            place.step,
            place.samples,
            place.epoch,
            {name: _on_cpu(part.local, copy) for name, part in present.items()},
            self.aliases,
            {name: _on_cpu(value, copy) for name, value in named.items()},
            scalars,
            extents,
            place.fence,
            place.part,
            place.parts,
        )

    def restore(self, state: TrainingState) -> None:
        """From whole tensors or any boxes that cover the own ones. Raises SpecError when it is of another model."""
        stored = {**{other: name for name, other in state.aliases.items()}, **state.aliases}
        with torch.no_grad():
            for name, part in self._present().items():
                known = name if name in state.model else stored.get(name, name)
                if known not in state.model:
                    raise _another_model(f"it has no {name}")
                part.local.copy_(_box(state.model[known], state.extents.get(known), part.extent, name))
        slots = {
            number: values
            for number, values in self.optimizer.state_dict()["state"].items()
            if not list(self.trainable.values())[number].numel()  # no checkpoint has anything for an empty part
        }
        for source in (state.optimizer, state.scalars):
            for full_name, value in source.items():
                name, _, key = full_name.rpartition("/")
                name = name if name in self._index else stored.get(name, name)
                if name not in self._index or not self.parts[name].extent.elements:
                    continue
                if isinstance(value, Tensor):
                    value = self._own_box(name, value, state.extents.get(full_name))
                slots.setdefault(self._index[name], {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})

    def _own_box(self, name: str, value: Tensor, extent: Extent | None) -> Tensor:
        need = self.parts[name].extent
        shape = extent.shape if extent is not None else tuple(value.shape)
        if shape != need.shape:
            return value.clone()  # a number of the whole tensor: the step
        return _box(value, extent, need, name)

    def _present(self) -> dict[str, Part]:
        """Without the tensors that have fewer rows than there are ranks, of which this one holds nothing."""
        return {name: part for name, part in self.parts.items() if part.extent.elements or part.extent.is_whole}


def squared_norm(gradients: list[Tensor]) -> Tensor:
    """Sum of squares over all of them, in double precision."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    norms: Any = torch._foreach_norm(gradients)
    total: Tensor = torch.stack([norm.to("cpu", torch.float64) for norm in norms]).square().sum()
    return total


def scale_to(gradients: list[Tensor], total: float, norm: float) -> None:
    """As torch.nn.utils.clip_grad_norm_ with a total norm that is known."""
    factor = norm / (total + 1e-6)
    if factor < 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)


def _box(source: Tensor, extent: Extent | None, need: Extent, name: str) -> Tensor:
    have = extent if extent is not None else Extent.whole(tuple(source.shape))
    if have.shape != need.shape:
        raise _another_model(f"{name} is {list(have.shape)} there and {list(need.shape)} here")
    if have.overlap(need) != need and need.elements:
        raise SpecError(f"the checkpoint lacks a part of {name}", "parts of other ranks are missing")
    return source[need.inside(have)].clone(memory_format=torch.contiguous_format)  # fused optimizers want it dense


def _another_model(why: str) -> SpecError:
    return SpecError(f"the checkpoint is of another model: {why}", "the job's code changed: submit it as a new job")


def _on_cpu(tensor: Tensor, copy: bool) -> Tensor:
    """Contiguous, on the CPU, in a storage of its own."""
    held = tensor.detach()
    if held.device.type != "cpu":
        return held.cpu().contiguous()
    if copy or not held.is_contiguous() or held.untyped_storage().nbytes() != held.numel() * held.element_size():
        return held.clone(memory_format=torch.contiguous_format)
    return held

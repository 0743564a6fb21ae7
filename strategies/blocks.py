"""The blocks of a model as a run handles them: what is gathered at once when parameters are sharded, and what is
computed again when activations are not kept.

A block is a member of a list of modules, known by the first number in a layer's name (`h.3` of `h.3.attn.q`); in a
model without any, each child of the model. What is outside of all blocks (embedding, head) is the root.
"""

from __future__ import annotations

from dataclasses import dataclass

from protos.model import LayerProfile, ModelProfile

SMALL_SHARE = 0.01  # of the parameters: a layer beside the blocks with less is not worth gathering on its own


@dataclass(frozen=True, slots=True)
class Block:
    name: str
    layers: tuple[LayerProfile, ...]

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def activation_bytes(self) -> float:
        return sum(layer.activation_bytes_per_sample for layer in self.layers)

    @property
    def output_bytes(self) -> float:
        """What it hands on: the tensors that would cross a cut after it, else the output of its last layer."""
        last = self.layers[-1]
        return max(last.output_bytes_per_sample, last.cut_bytes_per_sample or 0.0)


def blocks_of(profile: ModelProfile) -> tuple[tuple[Block, ...], tuple[LayerProfile, ...]]:
    """The blocks in the order they first run, and the layers of the root."""
    names = [_numbered(layer.name) for layer in profile.layers]
    if not any(names):
        names = [layer.name.split(".")[0] for layer in profile.layers]
    found: dict[str, list[LayerProfile]] = {}
    root = []
    for name, layer in zip(names, profile.layers, strict=True):
        if name:
            found.setdefault(name, []).append(layer)
        else:
            root.append(layer)
    return tuple(Block(name, tuple(layers)) for name, layers in found.items()), tuple(root)


def _numbered(name: str) -> str:
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ""


def gathered_parameters(profile: ModelProfile) -> int:
    """Whole on a rank at the same time when parameters are sharded: what is never cut off, a unit and the next one.

    Units are the blocks and, beside them, layers with a noticeable part of the parameters; tied ones are no units.
    """
    blocks, root = blocks_of(profile)
    tied = {layer.borrowed_parameters for layer in profile.layers} - {0}
    noticeable = SMALL_SHARE * profile.parameters
    apart = [layer for layer in root if layer.parameters >= noticeable and layer.parameters not in tied]
    always = sum(layer.parameters for layer in root) - sum(layer.parameters for layer in apart)
    units = sorted([*(block.parameters for block in blocks), *(layer.parameters for layer in apart)], reverse=True)
    return always + sum(units[:2]) if profile.layers else profile.parameters

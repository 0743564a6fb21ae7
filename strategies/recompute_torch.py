"""Activation checkpointing: blocks run again in the backward pass instead of keeping what they computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a stack (members of a list of modules with parameters of their own), outermost first;
    without any, the direct children that have parameters."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        members = [child for child in module.children() if any(True for _ in child.parameters())]
        if len(members) > 1:
            found += members
            inside |= {id(each) for member in members for each in member.modules()}
    return found or [child for child in model.children() if any(True for _ in child.parameters())]


def recompute_blocks(model: nn.Module) -> int:
    """Makes every block keep its input only; how many there are. Dropout draws the same numbers again."""
    blocks = blocks_of(model)
    for block in blocks:
        block.forward = _recomputed(block)
    return len(blocks)


def _recomputed(block: nn.Module) -> Any:
    forward = block.forward
    norms = [module for module in block.modules() if isinstance(module, _NormBase) and module.track_running_stats]

    def run(*args: Any, **kwargs: Any) -> Any:
        if not block.training:
            return forward(*args, **kwargs)
        return checkpoint(
            forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _counted_once(norms)), **kwargs
        )

    return run


@contextmanager
def _counted_once(norms: list[_NormBase]) -> Iterator[None]:
    """The second pass over the same rows must not move the running statistics again."""
    before = [[buffer.clone() for buffer in norm.buffers(recurse=False)] for norm in norms]
    try:
        yield
    finally:
        for norm, kept in zip(norms, before, strict=True):
            for buffer, value in zip(norm.buffers(recurse=False), kept, strict=True):
                buffer.copy_(value)

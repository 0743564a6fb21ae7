"""Stages of a model run one after the other in one process and compared with the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from strategies.loss_torch import logits_of
from strategies.split_torch import Cuttable, StageSpec, cut, stage_module, trace_model

TOLERANCE = 1e-6
CPU = torch.device("cpu")


class Chain:
    """The stages of one model, with its initial values."""

    def __init__(
        self, build: Callable[[], nn.Module], features: Any, cut_after: Sequence[str], known: Cuttable | None = None
    ) -> None:
        torch.manual_seed(0)
        self.whole = build()
        self.stages = cut(known or traced(build, features), cut_after)
        self.modules = [stage_module(stage, initial(self.whole, stage.names), CPU) for stage in self.stages]

    def check(self, features: Any) -> None:
        """Output, loss, gradients and buffers in training, then the output in evaluation."""
        for training in (True, False):
            for module in (self.whole, *self.modules):
                module.train(training)
                module.zero_grad()
            expected = logits_of(self.whole(**features) if isinstance(features, Mapping) else self.whole(features))
            rows = len(expected)
            steps = self.forward(features, rows, training)
            output = steps[-1][1]
            assert isinstance(output, Tensor)
            close(output, expected, "output")
            if training:
                expected.square().mean().backward()
                output.square().mean().backward()
                self._backward(steps)
                self._compare_gradients()
            self._compare_state()

    def forward(self, features: Any, rows: int, training: bool) -> list[tuple[tuple[Tensor, ...], Any]]:
        current = tuple(features.values()) if isinstance(features, Mapping) else (features,)
        steps: list[tuple[tuple[Tensor, ...], Any]] = []
        for stage, module in zip(self.stages, self.modules, strict=True):
            declared = stage.inputs if training else stage.evaluation_inputs
            if steps:
                current = tuple(
                    value.detach().clone().requires_grad_(crossing.requires_grad and training)
                    for value, crossing in zip(current, declared, strict=True)
                )
            for value, crossing in zip(current, declared, strict=True):
                assert (tuple(value.shape), value.dtype) == (crossing.shape(rows), crossing.dtype), crossing
            output = module(*current)
            steps.append((current, output))
            current = output
        return steps

    def _backward(self, steps: list[tuple[tuple[Tensor, ...], Any]]) -> None:
        for (received, _), (_, sent), stage in reversed(
            list(zip(steps[1:], steps[:-1], self.stages[:-1], strict=True))
        ):
            flows = [crossing.requires_grad for crossing in stage.outputs]
            assert [value.requires_grad for value in sent] == flows
            pairs = [(out, given.grad) for out, given, flow in zip(sent, received, flows, strict=True) if flow]
            pairs = [(out, grad if grad is not None else torch.zeros_like(out)) for out, grad in pairs]
            torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])

    def _compare_gradients(self) -> None:
        found: dict[str, Tensor] = {}
        for module in self.modules:
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    found[name] = found.get(name, torch.zeros_like(parameter)) + parameter.grad
        expected = {name: value.grad for name, value in self.whole.named_parameters() if value.grad is not None}
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            close(found[name], gradient, name)

    def _compare_state(self) -> None:
        whole = self.whole.state_dict()
        union: set[str] = set()
        for module in self.modules:
            for name, value in module.state_dict().items():
                close(value, whole[name], name)
                union.add(name)
        assert union == set(whole)


def traced(build: Callable[[], nn.Module], features: Any) -> Cuttable:
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = build()
    return trace_model(fake, features)


def initial(whole: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        found[name] = getattr(whole.get_submodule(owner), leaf).detach().clone()
    return found


def close(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    error = (found.double() - expected.double()).abs().max().item() if found.numel() else 0.0
    assert error <= TOLERANCE, f"{what} differs by {error}"


def names_of(stages: Sequence[StageSpec]) -> list[tuple[str, ...]]:
    return [stage.names for stage in stages]

"""One stage of a pipeline at work: micro-batches through torch.distributed.pipelining, for any number of rows.

A schedule of that library is made for one shape of micro-batch, so a slice of rows runs as full micro-batches and, when
rows are left over, one smaller one after them. Shapes are declared on both sides of every cut: the library would
otherwise pickle them from rank to rank. Exceptions of the user's model and of a dead group are told apart here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from protos.errors import HiveError
from protos.plan import Schedule
from strategies.faults_torch import PeerLost, UserCodeError, is_memory
from strategies.group_torch import Group
from strategies.split_torch import Crossing, StageSpec

Loss = Callable[[Any, Tensor], Tensor]
T = TypeVar("T")


class StageForward(nn.Module):
    """The stage as the library calls it: in the job's precision, outputs as they were declared."""

    def __init__(self, stage: nn.Module, outputs: Sequence[Crossing], half: bool, device: torch.device) -> None:
        super().__init__()
        self.stage = stage
        self._dtypes = [crossing.dtype for crossing in outputs]
        self._half = half
        self._device = device

    def forward(self, *inputs: Tensor) -> Any:
        try:
            with torch.autocast(self._device.type, dtype=torch.bfloat16) if self._half else nullcontext():
                result = self.stage(*inputs)
        except Exception as error:
            raise UserCodeError("in the model's forward pass") from error
        if not self._dtypes:
            return result
        # sent as one block of memory: a recurrent layer, for one, returns a transposed view
        return tuple(tensor.to(dtype).contiguous() for tensor, dtype in zip(result, self._dtypes, strict=True))


class StageRunner:
    """Runs slices of rows through this rank's stage; `pipe` is the group of the stages of its replica."""

    def __init__(
        self, spec: StageSpec, module: nn.Module, pipe: dist.ProcessGroup, group: Group, half: bool, kind: Schedule
    ) -> None:
        self._spec = spec
        self._module = module
        self._pipe = pipe
        self._group = group
        self._half = half
        self._kind = kind
        self._made: dict[tuple[int, int, bool], Any] = {}
        self._loss: Loss = _no_loss
        self._computed_s = 0.0  # inside of passes, since the schedule was started

    @property
    def is_last(self) -> bool:
        return self._spec.index == self._spec.count - 1

    def train(self, rows: int, micro_rows: int, inputs: Sequence[Tensor], target: Tensor | None, loss: Loss) -> None:
        """Forward and backward; gradients are added up. `inputs` on the first stage, `target` on the last.

        `loss(output, target)` is called for each micro-batch on the last stage. Raises UserCodeError, PeerLost.
        """
        self._run(rows, micro_rows, inputs, target, loss, training=True)

    def evaluate(self, rows: int, micro_rows: int, inputs: Sequence[Tensor], target: Tensor | None, loss: Loss) -> None:
        """Forward only."""
        self._run(rows, micro_rows, inputs, target, loss, training=False)

    def _run(
        self,
        rows: int,
        micro_rows: int,
        inputs: Sequence[Tensor],
        target: Tensor | None,
        loss: Loss,
        training: bool,
    ) -> None:
        self._loss = loss
        for start, size, count in pieces_of(rows, micro_rows):
            stop = start + size * count
            schedule = self._schedule(size, count, training)
            given = [tensor[start:stop] for tensor in inputs] if self._spec.index == 0 else []
            aim = target[start:stop] if target is not None and self.is_last else None
            run = schedule.step if training else schedule.eval
            started, self._computed_s = time.perf_counter(), 0.0
            self._group.waits_since = started
            try:
                run(*given, target=aim, losses=[] if self.is_last else None, return_outputs=False)
            except Exception as error:
                raise self._cause(error) from error
            finally:  # all else that a schedule does is to wait for its neighbours
                self._group.waits_since = None
                self._group.sync_s += max(0.0, time.perf_counter() - started - self._computed_s)

    def _schedule(self, rows: int, count: int, training: bool) -> Any:
        key = (rows, count, training)
        if key not in self._made:
            spec = self._spec
            incoming = spec.inputs if training else spec.evaluation_inputs
            outgoing = spec.outputs if training else spec.evaluation_outputs
            last = spec.index == spec.count - 1
            stage = PipelineStage(
                StageForward(self._module, outgoing, self._half, self._group.device),
                spec.index,
                spec.count,
                self._group.device,
                input_args=_declared(incoming, rows, training and spec.index > 0),
                output_args=_declared(outgoing, rows, training) if not last else (torch.empty(0, device="meta"),),
                group=self._pipe,
            )
            stage.forward_one_chunk = self._timed(stage.forward_one_chunk)  # type: ignore[method-assign]
            stage.backward_one_chunk = self._timed(stage.backward_one_chunk)  # type: ignore[method-assign]
            # one forward, one backward needs a micro-batch for every stage
            kind = Schedule1F1B if self._kind is Schedule.ONE_F_ONE_B and count >= spec.count else ScheduleGPipe
            self._made[key] = kind(stage, count, loss_fn=self._called, scale_grads=False)
        return self._made[key]

    def _called(self, output: Any, target: Tensor) -> Tensor:
        return self._timed(self._loss)(output, target)

    def _timed(self, call: Callable[..., T]) -> Callable[..., T]:
        def timed(*args: Any, **kwargs: Any) -> T:
            started, self._group.waits_since = time.perf_counter(), None
            try:
                return call(*args, **kwargs)
            finally:
                ended = self._group.waits_since = time.perf_counter()
                self._computed_s += ended - started

        return timed

    def _cause(self, error: BaseException) -> BaseException:
        """What really happened, inside the sentences that the library wraps around it."""
        chain: list[BaseException] = []
        link: BaseException | None = error
        while link is not None and link not in chain:
            chain.append(link)
            link = link.__cause__
        for each in chain:
            if isinstance(each, UserCodeError | PeerLost | HiveError) or is_memory(each):
                return each
        if any(self._group.broke(each) for each in chain):
            return self._group.lost(chain[-1])
        return UserCodeError("in the backward pass")


def pieces_of(rows: int, micro_rows: int) -> Iterator[tuple[int, int, int]]:
    """(first row, rows of a micro-batch, how many of them): the full micro-batches, then what is left."""
    full, rest = divmod(rows, micro_rows)
    if full:
        yield 0, micro_rows, full
    if rest:
        yield full * micro_rows, rest, 1


def _declared(crossings: Sequence[Crossing], rows: int, training: bool) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty(each.shape(rows), dtype=each.dtype, device="meta", requires_grad=training and each.requires_grad)
        for each in crossings
    )


def _no_loss(output: Any, target: Tensor) -> Tensor:
    raise RuntimeError("no loss was given")

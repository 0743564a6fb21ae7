"""Which engine runs a task: a plan's layout decides."""

from __future__ import annotations

import torch

from protos.states import StopMode
from strategies.context import TaskContext
from strategies.cut_model_torch import CutModel
from strategies.data.dataset import Dataset
from strategies.engine_torch import Engine
from strategies.faults_torch import Stopped
from strategies.group_torch import Group, connect
from strategies.loss_torch import Loss
from strategies.pipeline_parallel_torch import PipelineStages
from strategies.sharded_torch import Sharded
from strategies.tensor_parallel_torch import TensorParallel
from strategies.whole_model_torch import WholeModel


def make_engine(context: TaskContext, group: Group, loss: Loss, dataset: Dataset) -> Engine:
    """Connects the group and builds what this rank holds. Raises Stopped, PeerLost, SpecError, UserCodeError."""
    device, layout = torch.device(context.device), context.task.layout
    engine: WholeModel | PipelineStages | CutModel
    if layout is not None and len(layout.stages) > 1:
        engine = PipelineStages(context, loss, dataset, device)
    elif layout is not None and layout.tensor > 1:
        engine = TensorParallel(context, loss, dataset, device)
    elif layout is not None and layout.sharded:
        engine = Sharded(context, loss, dataset, device)
    else:
        engine = WholeModel.of(context, loss, device)
    _check_stop(context)  # all that takes long comes before the group: its deadline is for the others to arrive
    connect(context, group)
    engine.connected(context, group)
    return engine


def _check_stop(context: TaskContext) -> None:
    mode: StopMode | None = context.channel.stop_requested()
    if mode is not None:
        raise Stopped(mode)

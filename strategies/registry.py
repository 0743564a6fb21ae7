"""The strategies that are built, by name."""

from __future__ import annotations

from collections.abc import Mapping

from protos.jobspec import StrategyName
from strategies.base import Strategy
from strategies.data_parallel import DataParallel
from strategies.model_parallel import ModelParallel
from strategies.pipeline_parallel import PipelineParallel
from strategies.single_node import SingleNode

BUILT: Mapping[StrategyName, Strategy] = {
    strategy.name: strategy for strategy in (DataParallel(), ModelParallel(), PipelineParallel(), SingleNode())
}
"""A name of StrategyName that is missing here is strategies.base.NOT_BUILT."""

"""Ranks that are threads of the test process, over real gloo on loopback: quick, where a rank needs no process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from strategies.faults_torch import PeerLost
from strategies.group_torch import Group

T = TypeVar("T")


def among(ranks: int, call: Callable[[Group], T]) -> list[T | PeerLost]:
    """What each rank makes of it."""
    store = dist.HashStore()

    def rank(number: int) -> T | PeerLost:
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=30)
        group = Group(number, ranks, torch.device("cpu"))
        group.backend = dist.ProcessGroupGloo(store, number, ranks, options)
        group._backends.append(group.backend)
        try:
            return call(group)
        except PeerLost as error:
            return error

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(rank, range(ranks)))

"""What carries the collectives of one attempt: nccl when every rank has a GPU, else gloo, bound to the address of the
trusted network in the plan and to nothing else."""

from __future__ import annotations

import ipaddress
import os
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from strategies.context import TaskContext


def make_backend(context: TaskContext, store: Store, timeout: timedelta) -> tuple[Any, torch.device]:
    """Meets the other ranks in `store`. Also the device of all tensors that are given to it."""
    task = context.task
    nccl = all(device.startswith("cuda") for device in _devices(context, store)) and dist.is_nccl_available()
    device = torch.device(context.device if nccl else "cpu")
    if nccl:
        _bind_nccl(context.interface)
    if task.layout is not None:
        return _default_group(context, store, timeout, device), device
    if not nccl:
        return _gloo(store, task.rank, task.world_size, timeout, context.interface), device
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, task.rank, task.world_size, options), device


def gloo_device(bound_to: str) -> Any:
    """By address where there is one: an interface may have several, and gloo would listen on any of them."""
    try:
        address = str(ipaddress.ip_address("127.0.0.1" if bound_to == "lo" else bound_to))
    except ValueError:
        return dist.ProcessGroupGloo.create_device(interface=bound_to)  # refuses an empty name
    return dist.ProcessGroupGloo.create_device(hostname=address)


def _devices(context: TaskContext, store: Store) -> list[str]:
    store.set(f"device/{context.task.rank}", context.device)
    return [bytes(store.get(f"device/{rank}")).decode() for rank in range(context.task.world_size)]


def _default_group(context: TaskContext, store: Store, timeout: timedelta, device: torch.device) -> Any:
    """torch.distributed's own default group, which DTensor, FSDP2 and pipelining find by themselves: one per process,
    and a worker process has one attempt. Its subgroups are bound to the same trusted address."""
    backend = "nccl"
    if device.type == "cpu":
        backend = "cpu:hive"

        def make(store: Store, rank: int, size: int, timeout: timedelta) -> Any:
            return _gloo(store, rank, size, timeout, context.interface)

        dist.Backend.register_backend("hive", make, devices=["cpu"])
    task = context.task
    dist.init_process_group(backend, store=store, rank=task.rank, world_size=task.world_size, timeout=timeout)
    return dist.group.WORLD._get_backend(device)  # type: ignore[union-attr]


def _gloo(store: Store, rank: int, size: int, timeout: timedelta, bound_to: str) -> Any:
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [gloo_device(bound_to)]
    options._timeout = timeout
    options._threads = 2
    return dist.ProcessGroupGloo(store, rank, size, options)


def _bind_nccl(bound_to: str) -> None:
    """NCCL knows interfaces only, and without one it listens on whichever it likes."""
    names = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if name == bound_to or any(entry.address == bound_to for entry in addresses)
    ]
    if not names:
        raise RuntimeError(f"no interface of this machine has the trusted address {bound_to!r}")
    os.environ["NCCL_SOCKET_IFNAME"] = f"={names[0]}"

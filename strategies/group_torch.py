"""The process group of one attempt, made for one fence and thrown away after any failure.

Owns how its ranks meet, the few collectives the strategies use, the count of bytes they send, the bound on them
(`upload`: a collective starts when the owner's cap allows its bytes), and `break_group`, which makes a hanging
collective fail at once by shutting down the group's sockets. Refuses retries: after a failed collective the group is
poisoned, so every failure raises PeerLost and the attempt ends. No `*_object` collective, no pickle.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from protos.errors import DeadlineExceeded
from protos.token_bucket import TokenBucket
from strategies.backend_torch import make_backend
from strategies.context import TaskContext
from strategies.faults_torch import PeerLost
from strategies.store_torch import ChannelStore
from strategies.sums_torch import Sum
from strategies.tcp_connections import Connection, open_connections

BROADCAST_CHUNK_BYTES = 16 * 1024 * 1024
NEIGHBOURS = 2  # connections on which a stage of a pipeline sends at the same time: forward and backward
UPLOAD_BURST_S = 0.5  # what a capped group may send at once after an idle time, in seconds of its rate
_MARKS = ("gloo", "nccl", "connection closed", "connection reset")  # in what a backend says when it fails
_ABANDONED: list[object] = []  # what a broken group may still write into: must outlive the IO threads


@dataclass(slots=True)
class Pending:
    """A collective under way. `wait` raises PeerLost."""

    group: Group
    work: Any
    tensor: torch.Tensor

    def wait(self) -> None:
        try:
            with self.group.waiting():
                self.work.wait()
        except RuntimeError as error:
            raise self.group.lost(error, self.work, self.tensor) from error


@dataclass(slots=True)
class Group:
    """`backend` None is a world of one: every collective is the identity. Tensors given to it live on `device`."""

    rank: int
    world_size: int
    device: torch.device
    backend: Any = None
    bytes_sent: int = 0
    sync_s: float = 0.0
    waits_since: float | None = None  # in a wait for other ranks since then, on the clock of time.perf_counter
    broken: threading.Event = field(default_factory=threading.Event)
    upload: TokenBucket | None = None
    pace_bytes_per_s: float | None = None  # of each connection, where a library and not this class sends
    clock: Callable[[], float] = time.monotonic
    deadline_s: float = 20.0  # of a collective
    _backends: list[Any] = field(default_factory=list)  # of this group and its subgroups
    _store: object = None  # its python half must live as long as subgroups may be made
    _connections: frozenset[Connection] | None = None
    _before: frozenset[Connection] | None = None  # None: not being made yet

    def all_reduce(self, tensor: torch.Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
        """In place, blocking."""
        self.start_all_reduce(tensor, operation).wait()

    def start_all_reduce(self, tensor: torch.Tensor, operation: Any = dist.ReduceOp.SUM) -> Pending:
        """In place; the tensor is not touched until `wait`. Every rank starts the same calls in the same order."""
        if self.backend is None:
            return Pending(self, _Finished(), tensor)
        if operation == dist.ReduceOp.SUM:
            total = Sum(self.backend, tensor)
            self._sends(total.sends_bytes)
            return Pending(self, self._start(total.start, total), tensor)
        options = dist.AllreduceOptions()
        options.reduceOp = operation
        self._sends(2 * (self.world_size - 1) * _size(tensor) // self.world_size)  # around a ring
        return Pending(self, self._start(lambda: self.backend.allreduce([tensor], options), tensor), tensor)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        if self.backend is None:
            return
        options = dist.BroadcastOptions()
        options.rootRank = source
        options.rootTensor = 0
        self._sends(broadcast_sends((self.rank - source) % self.world_size, self.world_size) * _size(tensor))
        Pending(self, self._start(lambda: self.backend.broadcast([tensor], options), tensor), tensor).wait()

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """One tensor per rank, of equal shape."""
        if self.backend is None:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        self._sends((self.world_size - 1) * _size(tensor))
        Pending(self, self._start(lambda: self.backend.allgather([gathered], [tensor]), gathered), tensor).wait()
        return gathered

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Blocks until it is handed over. The receiver calls `receive` with the same shape; pairs keep their order."""
        self._sends(_size(tensor))
        Pending(self, self._start(lambda: self.backend.send([tensor], to, 0), tensor), tensor).wait()

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        """In place."""
        Pending(self, self._start(lambda: self.backend.recv([tensor], source, 0), tensor), tensor).wait()

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """What every rank says, in the order of the ranks."""
        return [self.broadcast_bytes(content, source) for source in range(self.world_size)]

    def run(self, sends_bytes: int, call: Callable[[], Any]) -> None:
        """A blocking call of torch.distributed over this group or a subgroup, counted and capped like the others here.
        Raises PeerLost."""
        self._sends(sends_bytes)
        try:
            with self.waiting():
                call()
        except RuntimeError as error:
            raise self.lost(error, call) from error

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for other ranks."""
        started = self.waits_since = time.perf_counter()
        try:
            yield
        finally:
            self.waits_since = None
            self.sync_s += time.perf_counter() - started

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1, device=self.device))

    def broadcast_bytes(self, content: bytes, source: int) -> bytes:
        """The same bytes on every rank; what others than `source` pass is ignored."""
        if self.backend is None:
            return content
        size = torch.tensor([len(content)], dtype=torch.int64, device=self.device)
        self.broadcast(size, source)
        if self.rank == source:
            payload = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self.device)
        else:
            payload = torch.empty(int(size.item()), dtype=torch.uint8, device=self.device)
        if payload.numel():
            self.broadcast(payload, source)
        return payload.cpu().numpy().tobytes()

    def broadcast_tensors(self, tensors: Sequence[torch.Tensor], source: int) -> None:
        """In place, of any dtype and device, packed into messages of about BROADCAST_CHUNK_BYTES."""
        if self.backend is None:
            return
        batch: list[torch.Tensor] = []
        waiting = 0
        for tensor in tensors:
            batch.append(tensor)
            waiting += tensor.numel() * tensor.element_size()
            if waiting >= BROADCAST_CHUNK_BYTES:
                self._broadcast_packed(batch, source)
                batch, waiting = [], 0
        if batch:
            self._broadcast_packed(batch, source)

    def _broadcast_packed(self, tensors: list[torch.Tensor], source: int) -> None:
        with torch.no_grad():
            packed = torch.cat([_as_bytes(tensor).to(self.device) for tensor in tensors])
            if not packed.numel():
                return
            self.broadcast(packed, source)
            if self.rank == source:
                return
            offset = 0
            for tensor in tensors:
                size = tensor.numel() * tensor.element_size()
                piece = packed[offset : offset + size].clone()  # aligned, so that it can be viewed as the dtype
                tensor.copy_(piece.view(tensor.dtype).view(tensor.shape))
                offset += size

    def break_group(self) -> None:
        """Makes every collective of this group fail now, from any thread, also while the group is being made."""
        self.broken.set()
        connections = self._connections
        if connections is None:
            connections = open_connections() - self._before if self._before is not None else frozenset()
        for connection in connections:
            connection.shut_down()
        if self.device.type == "cuda" and self.backend is not None:
            with suppress(RuntimeError):
                self.backend.abort()

    def connected(self) -> None:
        """After the connections of this group, or of a subgroup, were made: `break_group` covers them from now on."""
        assert self._before is not None
        self._connections = open_connections() - self._before
        if self.pace_bytes_per_s is not None:
            for connection in self._connections:
                connection.pace(self.pace_bytes_per_s)
        if self.broken.is_set():
            self.break_group()

    def subgroup(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """Of the default group (`connect` with a layout); every rank calls it, None on those outside. Raises PeerLost.

        Its collectives are not counted here: `sent_by_kernel` counts all connections.
        """
        try:
            made: dist.ProcessGroup | None = dist.new_group(list(ranks), timeout=timedelta(seconds=self.deadline_s))
        except RuntimeError as error:
            raise self.lost(error) from error
        self.connected()
        if self.rank not in ranks:
            return None
        assert made is not None
        self._backends.append(made._get_backend(self.device))
        return made

    def set_deadline(self, seconds: float) -> None:
        """Of collectives that start from now on."""
        self.deadline_s = seconds
        for backend in self._backends:
            backend._set_default_timeout(timedelta(seconds=seconds))

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Collectives that start inside have at least so long: others come to them from work of their own."""
        before = self.deadline_s
        if seconds <= before:
            yield
            return
        self.set_deadline(seconds)
        try:
            yield
        finally:
            self.set_deadline(before)

    def sent_by_kernel(self) -> int:
        """Bytes sent over all connections of the group and its subgroups, what TCP had to repeat counted once."""
        return sum(connection.bytes_sent() for connection in self._connections or ())

    def close(self) -> None:
        """After the last collective of every rank: a rank that is already gone is no failure any more."""
        if self.backend is None:
            return
        with suppress(PeerLost):
            self.barrier()

    def broke(self, error: BaseException) -> bool:
        """Whether an exception out of a pass that itself talks to other ranks is this group's and not the model's."""
        if not isinstance(error, RuntimeError):
            return False
        said = str(error).lower()
        return self.broken.is_set() or isinstance(error, dist.DistError) or any(mark in said for mark in _MARKS)

    def lost(self, error: BaseException, *keep: object) -> PeerLost:
        """The failure as PeerLost; whatever the dead group may still touch is kept alive."""
        _ABANDONED.append((self.backend, keep))
        self.broken.set()
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return PeerLost(f"rank {self.rank} lost a peer of the group: {first_line[:300]}")

    def _start(self, call: Callable[[], Any], *keep: object) -> Any:
        try:
            return call()
        except RuntimeError as error:
            raise self.lost(error, keep) from error

    def _sends(self, n_bytes: int) -> None:
        """Counts what this rank sends in the collective that follows, and waits until the owner's cap allows it."""
        self.bytes_sent += n_bytes
        if self.upload is None:
            return
        started = self.clock()
        wait_s = self.upload.take(n_bytes, started)
        if wait_s > 0:
            broken = self.broken.wait(wait_s)
            self.sync_s += self.clock() - started
            if broken:
                raise self.lost(RuntimeError("the group was broken while this rank waited for its upload cap"))


class _Finished:
    def wait(self) -> None:
        return None


def broadcast_sends(position: int, ranks: int) -> int:
    """How often the rank `position` places after the source sends the tensor: gloo's is a binomial tree."""
    bits = range((ranks - 1).bit_length())
    return sum(1 for bit in bits if position % 2 ** (bit + 1) == 0 and position + 2**bit < ranks)


def single() -> Group:
    """The group of a world of one."""
    return Group(0, 1, torch.device("cpu"))


def connect(context: TaskContext, group: Group) -> Group:
    """Meets the other ranks and gives `group` its backend. Raises PeerLost when they do not all arrive in time.

    The group is passed in so that `break_group` can be called from another thread while this blocks.
    """
    task = context.task
    if task.world_size == 1:
        return group
    rate = context.max_upload_bytes_per_s
    if rate is not None:
        group.upload = TokenBucket(rate, rate * UPLOAD_BURST_S, group.clock())
        if task.layout is not None and len(task.layout.stages) > 1:
            group.pace_bytes_per_s = rate / min(task.world_size - 1, NEIGHBOURS)
    store = group._store = ChannelStore(context.channel.store, task.deadline_s, group.broken.is_set)
    prefixed = PrefixStore(f"fence-{task.fence}", store)
    group._before = open_connections()
    group.deadline_s = task.collective_timeout_s
    timeout = timedelta(seconds=group.deadline_s)
    try:
        group.backend, group.device = make_backend(context, prefixed, timeout)
        group.barrier()
    except (RuntimeError, DeadlineExceeded) as error:
        raise group.lost(error) from error
    group._backends.append(group.backend)
    group.connected()
    return group


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

"""What this machine can do, kept fresh: measured speeds, round trip, bandwidth, disk, load; and why it takes no work.

Owns the capacity that is told to the coordinator and announced on the LAN. Invariants: no probe that fails ends the
daemon; a machine on which no worker starts says why, takes nothing, and is tried again on its own. Measuring itself is
a task in a worker: nothing heavy is imported here.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from node import calibrate, networks, probe
from node.calibrate import CalibrationCache
from node.calibration_run import calibrate_machine
from node.cancellation import raise_if_cancelled
from node.config import NodeConfig
from node.errands import Errands
from node.faults import CannotWork
from node.memory_trim import trim
from node.runner import Runner
from node.session import Session
from node.transfers import Transfers
from protos import documents
from protos.capacity import Capacity
from protos.errors import Conflict, HiveError
from protos.gen import membership_pb2 as pb
from protos.log import Log

log = Log("hive.node.fitness")

_REFRESH_S = 15.0
_CHANGED = 0.3  # a rate that moved by this share is told to the coordinator
_TRY_AGAIN_S = 30.0
_LONGEST_TRY_AGAIN_S = 600.0


@dataclass(slots=True, eq=False)
class Fitness:
    """`obstacle`: why this machine takes no work for the moment. `judge(why)` is told when it cannot work until it is
    mended, and `judge("")` after every measurement that went well."""

    config: NodeConfig
    capacity: Capacity
    runner: Runner
    errands: Errands
    transfers: Transfers
    session: Session
    calibrations: CalibrationCache
    judge: Callable[[str], None]
    obstacle: str = "starting"
    told: Capacity | None = None
    _measuring: asyncio.Lock = field(default_factory=asyncio.Lock)
    _doubted: asyncio.Event = field(default_factory=asyncio.Event)
    _suspect: bool = False
    _probed_for: object = None

    @property
    def threads(self) -> int:
        return max(1, round(self.capacity.cores))

    @property
    def device(self) -> str:
        return f"cuda:{self.capacity.gpus[0].index}" if self.capacity.gpus else "cpu"

    def doubt(self, error: CannotWork) -> None:
        """A task could not be started: take nothing more until a worker starts again."""
        self._suspect = True
        self._doubted.set()
        self.judge(f"cannot work: {_sentence(error)}")

    def try_again(self) -> None:
        """Do not wait for the next try: the owner says that it is mended."""
        self._doubted.set()

    async def keep_measured(self) -> None:
        """Measure once, then again whenever workers did not start, ever less often."""
        wait_s = _TRY_AGAIN_S
        while True:
            self._doubted.clear()
            try:
                await self.measure()
                wait_s = _TRY_AGAIN_S
                await self._doubted.wait()
            except Conflict:  # the owner measures just now
                await asyncio.sleep(_TRY_AGAIN_S)
            except (HiveError, OSError) as error:
                raise_if_cancelled()
                log.warning("not measured", reason=str(error), again_in_s=wait_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._doubted.wait()
                wait_s = min(_LONGEST_TRY_AGAIN_S, 2 * wait_s)

    async def measure(self, again: bool = False) -> None:
        """How fast this machine is under its caps: from the cache, or measured when it is this daemon's turn.

        Raises Conflict when that is under way, HiveError or OSError when it cannot be done.
        """
        if self._measuring.locked():
            raise Conflict("this machine is being measured just now", "wait until hive-node status says idle")
        async with self._measuring:
            self.obstacle = "measuring how fast this machine is"
            try:
                if self._suspect:  # speeds that are in the cache would hide it
                    await self._start_a_worker()
                calibration = await calibrate_machine(
                    self.capacity, self.calibrations, self.errands, self.threads, self.device, again=again
                )
            except (HiveError, OSError) as error:
                self.obstacle = ""
                if isinstance(error, CannotWork) or not self.capacity.flops:
                    self.judge(f"cannot work: {_sentence(error)}")
                raise
            finally:
                self.obstacle = ""
            self._suspect = False
            self.capacity = calibrate.apply(self.capacity, calibration)  # what else was found out meanwhile stays
            self.tell()
            self.judge("")

    async def _start_a_worker(self) -> None:
        try:
            await self.runner.warm()
        except HiveError as error:
            raise CannotWork.of(error) from None

    def tell(self) -> None:
        if self.session.send(pb.NodeMessage(capacity_json=documents.encode(self.capacity))):
            self.told = self.capacity

    def connected(self) -> None:
        """What was measured while hello was on its way was told to nobody."""
        if self.told is not self.capacity:
            self.tell()

    async def keep_fresh(self, also: Callable[[], object]) -> None:
        """Look again at what changes. `also` is done with it, every time, off the loop."""
        while True:
            await asyncio.sleep(1.0 if self.session.rtt_s is None else _REFRESH_S)
            try:
                await self._look_again()
                await asyncio.to_thread(also)
            except Exception:  # a driver, a kernel, a disk: the next look may do
                raise_if_cancelled()
                log.exception("not refreshed")

    async def _look_again(self) -> None:
        rate = self.capacity.bandwidth_bytes_per_s
        if self.session.is_connected and self._probed_for is not self.session.connection:
            self._probed_for = self.session.connection  # once per connection, also on a line too slow for it
            with contextlib.suppress(HiveError):
                rate = await self.transfers.bandwidth_bytes_per_s()
            trim()
        config = self.config
        trusted = networks.still_here(config.trusted_lan, networks.interface_addresses())
        now = probe.capacity(config.home, config.caps, trusted, self.runner.cpu_limit.mechanism)
        self.capacity = replace(
            self.capacity,
            rtt_s=self.session.rtt_s,
            bandwidth_bytes_per_s=rate,
            disk_free_bytes=now.disk_free_bytes,
            networks=now.networks,
            load=now.load,
            battery=now.battery,
            on_mains=now.on_mains,
            user_idle_s=now.user_idle_s,
            gpus=now.gpus,
        )
        if moved(self.told, self.capacity):
            self.tell()


def _sentence(error: HiveError | OSError) -> str:
    if isinstance(error, HiveError) and error.hint:
        return f"{error.message}; {error.hint}"
    return str(error)


def moved(told: Capacity | None, now: Capacity) -> bool:
    """Whether the planner should hear of a change."""
    if told is None or told.networks != now.networks or len(told.gpus) != len(now.gpus):
        return True
    pairs = ((told.rtt_s, now.rtt_s), (told.bandwidth_bytes_per_s, now.bandwidth_bytes_per_s))
    for before, after in pairs:
        if (before is None) != (after is None):
            return True
        if before and after and abs(math.log(after / before)) > _CHANGED:
            return True
    return told.on_mains != now.on_mains

"""Measuring this machine: taken from the cache, or measured in a worker under the cap when it is our turn."""

from __future__ import annotations

from node import calibrate
from node.calibrate import CalibrationCache
from node.errands import Errands
from protos import documents
from protos.capacity import Calibration, Capacity
from protos.errors import HiveError
from protos.ids import Fence, JobId
from protos.jobspec import DataSpec, JobSpec, ModelSpec
from protos.work import Task, TaskKind

_TURN_S = 300.0


async def calibrate_machine(
    capacity: Capacity, cache: CalibrationCache, errands: Errands, threads: int, device: str, *, again: bool = False
) -> Calibration:
    """The measured rates. Raises HiveError when the turn does not come or the measurement fails."""
    digest = calibrate.hardware_digest(capacity, calibrate.cpu_model(), calibrate.torch_version())
    kept = None if again else cache.load(digest)
    if kept is None:
        async with calibrate.machine_turn(_TURN_S):
            kept = None if again else cache.load(digest)
            if kept is None:
                outcome = await errands.run(_task(), threads, device)
                if outcome.fault is not None or not outcome.document:
                    fault = outcome.fault
                    raise HiveError(*(fault.message, fault.hint) if fault else ("the measurement answered nothing",))
                measured = documents.decode(Calibration, outcome.document)
                kept = cache.store(digest, calibrate.under_cap(measured, _share(capacity, threads, device)))
    return kept


def _share(capacity: Capacity, threads: int, device: str) -> float:
    """Of the time that a worker's threads may run. The worker measures in CPU time: a cap makes that stand still, so
    does whatever else the machine does meanwhile, and that is no slowness of this node."""
    if device != "cpu" or capacity.cpu_mechanism == "none":
        return 1.0
    return min(1.0, capacity.cores / max(threads, 1))


def _task() -> Task:
    spec = JobSpec(name="calibrate", model=ModelSpec(source="none"), data=DataSpec(source="none"))
    return Task(TaskKind.CALIBRATE, JobId("calibrate"), Fence(0), 0, 1, "single_node", spec, (1,))

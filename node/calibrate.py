"""What was measured about this machine, kept between starts; and one machine measuring at a time.

Owns the cache of Calibrations below HIVE_HOME, keyed by what the figures depend on, the merging of a new run with the
old one, and the lock that makes several daemons on one machine measure one after another. Measuring itself is a task in
a worker (strategies/calibrate_torch.py): this file imports neither torch nor numpy. A cache that cannot be read is no
error: the machine is measured again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from protos import documents, version
from protos.capacity import Calibration, Capacity, FamilyRate, Rate
from protos.errors import Conflict, DeadlineExceeded, HiveError, SpecError

LOCK_NAME = "hive-calibrate.lock"
_POLL_S = 0.05
_MAX_CACHE_BYTES = 256 * 1024


def cpu_model() -> str:
    """The processor's name as the system gives it; the architecture where it gives none."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def torch_version() -> str:
    """Of the installed torch, without importing it; "" when there is none."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def hardware_digest(capacity: Capacity, cpu: str, torch: str) -> str:
    """Equal exactly when figures measured under one are good under the other."""
    parts = [
        cpu,
        f"{capacity.cores:.3f} of {capacity.cores_total}",
        capacity.cpu_mechanism,
        capacity.memory_bytes,
        [[gpu.kind, gpu.name, gpu.memory_bytes] for gpu in capacity.gpus],
        torch,
        version.SOFTWARE,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class CalibrationCache:
    """One small JSON file per hardware digest in `folder`, always whole: written beside and moved into place."""

    folder: Path

    def load(self, digest: str) -> Calibration | None:
        """None when nothing usable is kept."""
        path = self._path(digest)
        try:
            if path.stat().st_size > _MAX_CACHE_BYTES:
                return None
            calibration = documents.decode(Calibration, path.read_bytes())
        except (OSError, SpecError):
            return None
        return calibration if plausible(calibration) else None

    def store(self, digest: str, new: Calibration) -> Calibration:
        """Keep a new run merged with the old one, and return what is kept. Raises SpecError for impossible figures."""
        if not plausible(new):
            raise SpecError("the calibration holds figures that are not positive", "measure again: hive-node bench")
        old = self.load(digest)
        kept = merge(old, new) if old is not None else new
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, name = tempfile.mkstemp(dir=self.folder, prefix=".calibration-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(documents.encode(kept))
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self._path(digest))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return kept

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.json"


def plausible(calibration: Calibration) -> bool:
    """Every rate positive and nothing negative: what a planner may divide by."""
    rates = [*calibration.flops.values(), calibration.memory_bandwidth]
    return all(rate.best > 0 and rate.p50 > 0 and rate.spread >= 0 for rate in rates) and all(
        family.flops > 0 and family.overhead_s >= 0 and family.spread >= 0 for family in calibration.families.values()
    )


def under_cap(calibration: Calibration, share: float) -> Calibration:
    """The same where threads run only for a `share` (0..1] of the time."""

    def slowed(rate: Rate) -> Rate:
        return replace(rate, best=rate.best * share, p50=rate.p50 * share)

    return replace(
        calibration,
        flops={name: slowed(rate) for name, rate in calibration.flops.items()},
        memory_bandwidth=slowed(calibration.memory_bandwidth),
        families={
            name: replace(family, flops=family.flops * share, overhead_s=family.overhead_s / share)
            for name, family in calibration.families.items()
        },
    )


def merge(old: Calibration, new: Calibration) -> Calibration:
    """Best of both, medians of the latest run; the spread also covers how far the two medians lie apart."""
    flops = {name: _merge_rate(old.flops.get(name), rate) for name, rate in new.flops.items()}
    return replace(
        new,
        flops=flops,
        memory_bandwidth=_merge_rate(old.memory_bandwidth, new.memory_bandwidth),
        families=_merge_families(old.families, new.families),
    )


def _merge_rate(old: Rate | None, new: Rate) -> Rate:
    if old is None:
        return new
    return Rate(max(old.best, new.best), new.p50, max(new.spread, abs(new.p50 - old.p50) / new.p50))


def _merge_families(old: Mapping[str, FamilyRate], new: Mapping[str, FamilyRate]) -> dict[str, FamilyRate]:
    merged = {}
    for name, rate in new.items():
        before = old.get(name)
        apart = abs(rate.flops - before.flops) / rate.flops if before is not None else 0.0
        merged[name] = replace(rate, spread=max(rate.spread, apart))
    return merged


def apply(capacity: Capacity, calibration: Calibration) -> Capacity:
    """The capacity with everything the calibration knows."""
    return replace(
        capacity,
        flops=calibration.flops,
        memory_bandwidth=calibration.memory_bandwidth,
        families=calibration.families,
        torch=calibration.torch,
    )


@contextlib.asynccontextmanager
async def machine_turn(deadline_s: float, folder: Path | None = None) -> AsyncIterator[None]:
    """Hold this machine's turn to measure; the daemons of one machine wait for each other here.

    Raises DeadlineExceeded when the turn does not come in time, Conflict when the lock file is not one. The kernel
    gives the turn back when the process ends, however it ends.
    """
    path = (folder or _lock_folder()) / LOCK_NAME
    descriptor = _open_lock(path)
    try:
        ends = time.monotonic() + deadline_s
        while not _taken(descriptor):
            if time.monotonic() >= ends:
                raise DeadlineExceeded(
                    f"another hive daemon on this machine has been measuring for {deadline_s:g} s",
                    f"try again later: hive-node bench; `fuser {path}` shows who holds the turn",
                )
            await asyncio.sleep(_POLL_S)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would not do if a forked child still had it open
        os.close(descriptor)


def _lock_folder() -> Path:
    """The same for every daemon of this machine: /run/lock stays shared where a service has a /tmp of its own."""
    shared = Path("/run/lock")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _open_lock(path: Path) -> int:
    """Read-only is enough for flock, so the file may belong to another user; a link or a device is refused."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    for _ in range(10):  # another daemon may create or remove it in between
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644))
            continue
        except OSError as error:
            raise _unusable_lock(path, error) from None
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        break
    raise _unusable_lock(path, OSError(errno.EINVAL, "not a regular file"))


def _unusable_lock(path: Path, error: OSError) -> HiveError:
    return Conflict(
        f"{path} cannot be used as a lock: {error.strerror}", "remove it, or set TMPDIR to a folder of yours"
    )

"""What this machine has, as far as it says: psutil, NVML and a few files. Never raises for what it cannot find out.

Every probe that fails leaves its field empty and a note that says why. Measured speeds are not here: see calibration.
Invariant: the machine's id never gives the raw /etc/machine-id away.
"""

from __future__ import annotations

import os
import platform
import pwd
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import blake3
import psutil

from node import networks
from node.limits import Caps
from protos.capacity import Capacity, DeviceInfo
from protos.machine_bounds import available_cores, available_memory_bytes

T = TypeVar("T")
DEFAULT_MEMORY_SHARE = 0.8
_MACHINE_ID_FILES = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")
_NO_GPUS: tuple[DeviceInfo, ...] = ()
_NO_BATTERY: tuple[float | None, bool | None] = (None, None)
_NETWORK_NAMESPACE = Path("/proc/self/ns/net")


@dataclass(frozen=True, slots=True)
class Probed:
    """`notes`: what could not be found out and why, for `doctor`."""

    capacity: Capacity
    notes: tuple[str, ...]


def capacity(
    home: Path,
    caps: Caps | None = None,
    trusted_lan: Sequence[str] = (),
    cpu_mechanism: str = "none",
    torch_version: str | None = None,
) -> Capacity:
    """As `probe`, without the notes."""
    return probe(home, caps, trusted_lan, cpu_mechanism, torch_version).capacity


def probe(
    home: Path,
    caps: Caps | None = None,
    trusted_lan: Sequence[str] = (),
    cpu_mechanism: str = "none",
    torch_version: str | None = None,
) -> Probed:
    """Granted and total resources now. Raises HiveError (USAGE) only for a --trusted-lan that names nothing."""
    caps = caps or Caps()
    notes: list[str] = []
    cores_total = attempt("cores", available_cores, 1.0, notes)
    memory_total = attempt("memory", available_memory_bytes, 0, notes)
    gpus = attempt("GPUs", _gpus, _NO_GPUS, notes)
    battery, on_mains = attempt("battery", _battery, _NO_BATTERY, notes)
    present: list[networks.InterfaceAddress] = attempt("network interfaces", networks.interface_addresses, [], notes)
    granted_memory = int(memory_total * DEFAULT_MEMORY_SHARE)
    found = Capacity(
        hostname=socket.gethostname(),
        machine_id=machine_id(notes),
        platform=f"{platform.system().lower()}-{platform.machine()}",
        python=platform.python_version(),
        cores=min(caps.cpus or cores_total, cores_total),
        cores_total=max(1, os.cpu_count() or 1),
        memory_bytes=min(caps.memory_bytes or granted_memory, memory_total) if memory_total else granted_memory,
        memory_total_bytes=memory_total,
        disk_free_bytes=attempt("disk", lambda: psutil.disk_usage(str(_existing(home))).free, 0, notes),
        gpus=gpus if caps.gpus is None else gpus[: caps.gpus],
        networks=networks.trusted_networks(trusted_lan, present),
        load=attempt("load", lambda: os.getloadavg()[0] / (os.cpu_count() or 1), None, notes),
        battery=battery,
        on_mains=on_mains,
        user_idle_s=attempt("user idle time", lambda: user_idle_s(time.time()), None, notes),
        cpu_mechanism=cpu_mechanism,
        max_upload_bytes_per_s=caps.max_upload_bytes_per_s,
        torch=torch_version,
        user=attempt("user", lambda: pwd.getpwuid(os.getuid()).pw_name, str(os.getuid()), notes),
    )
    return Probed(found, tuple(notes))


def attempt(what: str, find: Callable[[], T], otherwise: T, notes: list[str]) -> T:
    """The probe's value, or the empty one and a note."""
    try:
        return find()
    except Exception as error:  # a driver, a kernel or a container may fail in any way: the node still works
        notes.append(f"{what}: {type(error).__name__}: {error}")
        return otherwise


def machine_id(notes: list[str]) -> str:
    """The same for daemons that share one machine, one boot and one network namespace (so one loopback)."""
    machine = next((text for path in _MACHINE_ID_FILES if (text := attempt(str(path), path.read_text, "", []))), "")
    if not machine:
        notes.append("machine id: no /etc/machine-id: the host name stands for it")
        machine = socket.gethostname()
    boot = attempt("boot id", _BOOT_ID_FILE.read_text, "", notes)
    namespace = attempt("network namespace", lambda: str(_NETWORK_NAMESPACE.stat().st_ino), "", notes)
    parts = ("hive machine id", machine.strip(), boot.strip(), namespace)
    return str(blake3.blake3("\0".join(parts).encode()).hexdigest())[:32]


def user_idle_s(now_s: float) -> float | None:
    """Since a logged-in person last typed at a terminal; None when nobody is logged in at one."""
    times = []
    for user in psutil.users():
        device = Path("/dev") / (user.terminal or "")
        if user.terminal and device.exists():
            times.append(device.stat().st_atime)
    return max(0.0, now_s - max(times)) if times else None


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _battery() -> tuple[float | None, bool | None]:
    """(charge, on mains); (None, None) on a machine without a battery."""
    battery = psutil.sensors_battery()
    return (None, None) if battery is None else (battery.percent / 100, battery.power_plugged)


def _gpus() -> tuple[DeviceInfo, ...]:
    """NVIDIA GPUs that workers would see. No library, no driver or no GPU is normal and gives none."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        found = []
        for index in visible_indices(os.environ.get("CUDA_VISIBLE_DEVICES"), uuids):
            memory = pynvml.nvmlDeviceGetMemoryInfo(handles[index])
            try:
                utilisation = pynvml.nvmlDeviceGetUtilizationRates(handles[index]).gpu / 100
            except pynvml.NVMLError:
                utilisation = 0.0  # a MIG device does not say
            name = str(pynvml.nvmlDeviceGetName(handles[index]))
            found.append(DeviceInfo("cuda", index, name, int(memory.total), int(memory.free), utilisation))
        return tuple(found)
    finally:
        pynvml.nvmlShutdown()


def visible_indices(variable: str | None, uuids: Sequence[str]) -> list[int]:
    """Which of the GPUs CUDA_VISIBLE_DEVICES leaves, read as CUDA does: the first wrong entry ends it. Pure."""
    if variable is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for entry in filter(None, (part.strip() for part in variable.split(","))):
        if entry.isascii() and entry.isdigit() and int(entry) < len(uuids):
            index = int(entry)
        else:
            matching = [at for at, uuid in enumerate(uuids) if uuid.startswith(entry)]
            if len(matching) != 1:
                break
            index = matching[0]
        if index in found:
            break
        found.append(index)
    return found

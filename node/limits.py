"""What the owner of a machine grants to hive, and how a person writes it. Pure.

Owns the units: cores (fractional), bytes (2GiB, 500MB), bytes per second (10MB/s, 80Mbit). A wrong value is a USAGE
error that shows a right one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from protos.errors import ErrorCode, HiveError

_SIZE = re.compile(r"^\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)\s*$")
_BYTES = {"": 1, "b": 1}
_BYTES |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}
_BYTES |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}
_BYTES |= {prefix: 1024**power for power, prefix in enumerate("kmgt", 1)}  # as in systemd: 2G is 2GiB
_BITS = {f"{prefix}bit": 1000**power / 8 for power, prefix in enumerate("kmgt", 1)} | {"bit": 1 / 8}
MINIMUM_CPUS = 0.01
MINIMUM_MEMORY_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Caps:
    """Upper bounds for all of a node's workers together; None is no bound of the owner's."""

    cpus: float | None = None
    memory_bytes: int | None = None
    gpus: int | None = None
    max_upload_bytes_per_s: float | None = None


def _usage(message: str, hint: str) -> HiveError:
    return HiveError(message, hint, code=ErrorCode.USAGE)


def parse_cpus(text: str) -> float:
    """Cores, fractions allowed: 0.25, 2, 3.5."""
    hint = "give a number of cores of at least 0.01, for example --cpus 0.25 or --cpus 2"
    try:
        cpus = float(text)
    except ValueError:
        raise _usage(f"--cpus {text!r} is not a number of cores", hint) from None
    if not math.isfinite(cpus) or cpus < MINIMUM_CPUS:
        raise _usage(f"--cpus {text} cannot be granted", hint)
    return cpus


def parse_bytes(text: str, flag: str = "--memory", example: str = "2GiB") -> int:
    """A size: 2GiB, 500MB, 1.5G (binary), 1048576."""
    found = _SIZE.match(text)
    unit = found["unit"].lower() if found else ""
    if found is None or unit not in _BYTES:
        raise _usage(f"{flag} {text!r} is not a size", f"write a number and a unit, for example {flag} {example}")
    return int(float(found["number"]) * _BYTES[unit])


def parse_memory(text: str) -> int:
    """A size that a worker can at least start in."""
    size = parse_bytes(text)
    if size < MINIMUM_MEMORY_BYTES:
        raise _usage(f"--memory {text} is too small for any worker", "give at least 64MiB; training needs 1GiB or more")
    return size


def parse_upload(text: str) -> float:
    """Bytes per second: 10MB/s, 500KiB, 80Mbit, 80Mbit/s."""
    amount = text.strip().removesuffix("/s").removesuffix("ps")
    found = _SIZE.match(amount)
    unit = found["unit"].lower() if found else ""
    rate = 0.0
    if found is not None and unit in _BITS:
        rate = float(found["number"]) * _BITS[unit]
    elif found is not None and unit in _BYTES:
        rate = float(found["number"]) * _BYTES[unit]
    if rate <= 0:
        raise _usage(f"--max-upload {text!r} is not a rate", "write for example --max-upload 10MB/s or 80Mbit")
    return rate


def parse_gpus(text: str) -> int:
    """How many GPUs to lend: 0, 1, 2; `none` is 0."""
    if text.strip().lower() == "none":
        return 0
    try:
        count = int(text)
    except ValueError:
        count = -1
    if count < 0:
        raise _usage(f"--gpus {text!r} is not a number of GPUs", "give how many to lend, for example --gpus 1, or none")
    return count


def show_bytes(count: float) -> str:
    """1.9 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"

"""What a member's machine has and how fast it was measured to be. All sizes bytes, rates per second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Rate:
    """A measured rate: best and median of several repetitions, and spread = (p90 - p10) / p50."""

    best: float
    p50: float
    spread: float


@dataclass(frozen=True, slots=True)
class FamilyRate:
    """Sustained training speed for one family of layers: step time = overhead_s + training FLOP / flops."""

    flops: float
    overhead_s: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a calibrate task measured under the caps in force. `seconds` is what the measuring took."""

    flops: Mapping[str, Rate]  # dtype -> matmul FLOP/s
    memory_bandwidth: Rate  # bytes read and written per second by a large copy
    families: Mapping[str, FamilyRate]  # matmul, conv, rnn, embedding, tiny
    torch: str
    threads: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    kind: str  # "cuda"
    index: int
    name: str
    memory_bytes: int
    memory_free_bytes: int
    utilisation: float  # 0..1


@dataclass(frozen=True, slots=True)
class TrustedNetwork:
    """A link whose owner allows unencrypted collectives: `loopback`, or a CIDR named with --trusted-lan."""

    cidr: str
    interface: str
    address: str


@dataclass(frozen=True, slots=True)
class Capacity:
    """Granted (after caps) and total resources of one node, plus what was measured under the cap."""

    hostname: str
    machine_id: str  # same for every daemon on one machine and one boot; never the raw /etc/machine-id
    platform: str
    python: str
    cores: float
    cores_total: int
    memory_bytes: int
    memory_total_bytes: int
    disk_free_bytes: int
    gpus: tuple[DeviceInfo, ...] = ()
    flops: Mapping[str, Rate] = field(default_factory=dict)  # dtype -> matmul FLOP/s
    memory_bandwidth: Rate | None = None  # bytes/s
    families: Mapping[str, FamilyRate] = field(default_factory=dict)  # matmul, conv, rnn, embedding, tiny
    networks: tuple[TrustedNetwork, ...] = ()
    rtt_s: float | None = None  # to the coordinator
    bandwidth_bytes_per_s: float | None = None  # to the coordinator, the slower direction
    load: float | None = None
    battery: float | None = None  # 0..1, None when mains or unknown
    on_mains: bool | None = None
    user_idle_s: float | None = None
    cpu_mechanism: str = "none"  # cgroup2 | cgroup1 | duty_cycle | none
    max_upload_bytes_per_s: float | None = None
    torch: str | None = None  # version the workers have, None until a worker ran
    user: str = ""  # the account user jobs run as
    peer_port: int | None = None  # where it serves other nodes on its trusted networks; None: it does not listen


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """Between two nodes: round-trip time and bandwidth; `network` is the common trusted one, None if there is none."""

    rtt_s: float
    bandwidth_bytes_per_s: float
    network: str | None

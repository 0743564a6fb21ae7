"""The text of a hardened systemd unit for a node. Pure: who writes it where is `hive-node install`'s business.

The daemon runs under the unit's bounds, workers too. Delegation lets it make the workers' CPU group below its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from node.limits import Caps
from protos.errors import ErrorCode, HiveError

_DAEMON_MEMORY_BYTES = 256 * 1024 * 1024  # the daemon and the warm parent, beside what is granted to workers


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """`command`: the absolute path of hive-node and the arguments of `start`. `user`: of a system unit, None for a
    user unit."""

    command: Sequence[str]
    home: Path
    caps: Caps
    user: str | None = None


def service_unit(options: ServiceOptions) -> str:
    """The unit file. Raises HiveError for what cannot be written in one."""
    if not options.command or not Path(options.command[0]).is_absolute() or not options.home.is_absolute():
        raise HiveError("a unit needs absolute paths", "give the full path of hive-node", code=ErrorCode.USAGE)
    system = options.user is not None
    lines = [
        "[Unit]",
        "Description=hive node: lends this machine to its cluster",
        "After=network-online.target",
        "Wants=network-online.target",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "Type=exec",
        f"ExecStart={' '.join(_quoted(part) for part in options.command)}",
        f"Environment={_quoted(f'HIVE_HOME={options.home}')}",
        *([f"User={_plain(options.user)}"] if options.user is not None else []),
        "Restart=always",
        "RestartSec=2",
        "# The back-off grows from systemd 254 on; older ones ignore these two lines.",
        "RestartSteps=6",
        "RestartMaxDelaySec=120",
        "# SIGTERM drains: a running task writes a checkpoint first. What is left afterwards is ended.",
        "KillMode=mixed",
        "TimeoutStopSec=60",
        "Delegate=cpu memory",
        *_bounds(options.caps),
        "OOMPolicy=continue",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        f"ReadWritePaths={_quoted(str(options.home))}",
        *(["ProtectHome=read-only"] if system else []),
        "PrivateTmp=yes",
        "ReadWritePaths=-/run/lock",  # daemons of one machine measure one after another
        "ProtectKernelTunables=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelLogs=yes",
        "ProtectClock=yes",
        "ProtectHostname=yes",
        "RestrictSUIDSGID=yes",
        "RestrictRealtime=yes",
        "RestrictNamespaces=yes",
        "LockPersonality=yes",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
        "SystemCallArchitectures=native",
        *(["CapabilityBoundingSet=", "AmbientCapabilities="] if system else []),
        "UMask=0077",
        "",
        "[Install]",
        f"WantedBy={'multi-user.target' if system else 'default.target'}",
        "",
    ]
    return "\n".join(lines)


def _bounds(caps: Caps) -> list[str]:
    """A second fence around the caps the daemon itself enforces."""
    lines = ["Nice=10", "TasksMax=4096"]
    if caps.cpus is not None:
        lines.append(f"CPUQuota={max(1, round(caps.cpus * 100) + 5)}%")  # 5 % of a core for the daemon itself
    if caps.memory_bytes is not None:
        lines.append(f"MemoryMax={caps.memory_bytes + _DAEMON_MEMORY_BYTES}")
    return lines


def _plain(text: str | None) -> str:
    if not text or any(not (c.isalnum() or c in "-_.@") for c in text):
        raise HiveError(f"{text!r} is not a user name", "give the account the node runs as", code=ErrorCode.USAGE)
    return text


def _quoted(text: str) -> str:
    """One word of a unit file: systemd expands % and $, and reads backslashes and quotes."""
    if any(ord(c) < 32 for c in text):
        raise HiveError(f"{text!r} has a line break", "it cannot stand in a unit file", code=ErrorCode.USAGE)
    text = text.replace("%", "%%")
    if all(c.isalnum() or c in "-_./:=@%+,[]" for c in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{escaped}"'

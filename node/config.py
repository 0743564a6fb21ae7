"""What a node is told by its owner: flags over HIVE_* over HIVE_HOME/node.toml over defaults.

Owns the names, parsing and defaults of a node's settings. Decides nothing from them: whether workers may run as root or
what a cap means is the daemon's. The token is a secret: it is never shown, only whether and where it was given.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from node.limits import Caps, parse_cpus, parse_gpus, parse_memory, parse_upload
from protos.settings import Setting, boolean, home_folder, listing, port, resolve, text

T = TypeVar("T")


def _written(parse: Callable[[str], T]) -> Callable[[Any], T]:
    """Numbers of a TOML file are parsed as they are written."""
    return lambda raw: parse(str(raw))


SETTINGS = (
    Setting("coordinator", text, None),
    Setting("token", text, None, secret=True),
    Setting("name", text, None),
    Setting("cpus", _written(parse_cpus), None),
    Setting("memory", _written(parse_memory), None),
    Setting("gpus", _written(parse_gpus), None),
    Setting("max_upload", _written(parse_upload), None),
    Setting("trusted_lan", listing, ()),
    Setting("peer", boolean, True),
    Setting("peer_port", port, 0),
    Setting("advertise", boolean, True),
    Setting("allow_root", boolean, False),
    Setting("log_level", text, "info"),
)


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """None means no cap, or not given. `trusted_lan` holds interface names and CIDRs."""

    home: Path
    name: str
    coordinator: str | None = None  # HOST:PORT of the enrolment port; None: look on the LAN
    token: str | None = None  # needed once; later starts use the credential below home
    caps: Caps = field(default_factory=Caps)
    trusted_lan: tuple[str, ...] = ()
    peer: bool = True  # other nodes may reach this one on its trusted networks
    peer_port: int = 0  # 0: any free one
    advertise: bool = True
    allow_root: bool = False
    log_level: str = "info"
    sources: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"NodeConfig(home={self.home}, name={self.name}, token={'given' if self.token else None})"


def load(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> NodeConfig:
    """The settings in force. `flags` uses the keys of SETTINGS and "home"; None means the flag was not given."""
    home, home_source = home_folder(flags.get("home"), environment)
    resolved = resolve(SETTINGS, flags, environment, home / "node.toml")
    values = dict(resolved.values)
    values["name"] = values["name"] or socket.gethostname()
    caps = Caps(*(values.pop(key) for key in ("cpus", "memory", "gpus", "max_upload")))
    return NodeConfig(home=home, caps=caps, sources={"home": home_source, **resolved.sources}, **values)


def shown(config: NodeConfig) -> dict[str, Any]:
    """The settings by their keys, for `hive-node config show`; the token only as given or not."""
    return {
        "home": str(config.home),
        "coordinator": config.coordinator,
        "token": "(given)" if config.token else None,
        "name": config.name,
        "cpus": config.caps.cpus,
        "memory": config.caps.memory_bytes,
        "gpus": config.caps.gpus,
        "max_upload": config.caps.max_upload_bytes_per_s,
        "trusted_lan": list(config.trusted_lan),
        "peer": config.peer,
        "peer_port": config.peer_port,
        "advertise": config.advertise,
        "allow_root": config.allow_root,
        "log_level": config.log_level,
    }

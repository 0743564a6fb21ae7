"""What a coordinator is told by its owner: flags over HIVE_* over HIVE_HOME/coordinator.toml over defaults.

Owns the names, parsing and defaults of a coordinator's settings. Decides nothing from them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protos import limits
from protos.settings import Setting, boolean, home_folder, port, resolve, text

SETTINGS = (
    Setting("host", text, "0.0.0.0", "HIVE_HOST"),
    Setting("port", port, limits.DEFAULT_ENROLMENT_PORT, "HIVE_PORT"),
    Setting("session_port", port, limits.DEFAULT_SESSION_PORT, "HIVE_SESSION_PORT"),
    Setting("advertise", boolean, True, "HIVE_ADVERTISE"),
    Setting("name", text, None, "HIVE_NAME"),
    Setting("database_url", text, "", "HIVE_DATABASE_URL", secret=True),
    Setting("log_level", text, "info", "HIVE_LOG_LEVEL"),
)


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """`port` is the enrolment port (server TLS only), `session_port` asks for a certificate; 0 takes a free one."""

    home: Path
    host: str = "0.0.0.0"
    port: int = limits.DEFAULT_ENROLMENT_PORT
    session_port: int = limits.DEFAULT_SESSION_PORT
    advertise: bool = True
    name: str = "coordinator"
    database_url: str = ""  # empty: SQLite below home
    log_level: str = "info"
    sources: Mapping[str, str] = field(default_factory=dict)


def load(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> CoordinatorConfig:
    """The settings in force. `flags` uses the keys of SETTINGS and "home"; None means the flag was not given."""
    home, home_source = home_folder(flags.get("home"), environment)
    resolved = resolve(SETTINGS, flags, environment, home / "coordinator.toml")
    values = {key: value for key, value in resolved.values.items() if value is not None}
    values.setdefault("name", socket.gethostname())
    return CoordinatorConfig(home=home, sources={"home": home_source, **resolved.sources}, **values)

"""The unit starts this node, bounds it, and is accepted by systemd where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from node.limits import Caps
from node.service_unit import ServiceOptions, service_unit
from protos.errors import HiveError

COMMAND = ["/bin/true", "start", "--name", 'a "b" $c %d']


def test_a_system_unit_is_hardened_and_carries_the_caps() -> None:
    text = service_unit(ServiceOptions(COMMAND, Path("/var/lib/hive"), Caps(0.25, 2 * 2**30), "nobody"))
    lines = text.splitlines()
    assert 'ExecStart=/bin/true start --name "a \\"b\\" $$c %%d"' in lines
    for line in (
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "ReadWritePaths=/var/lib/hive",
        "PrivateTmp=yes",
        "Restart=always",
        "KillMode=mixed",
        "Delegate=cpu memory",
        "User=nobody",
        "CPUQuota=30%",
        f"MemoryMax={2 * 2**30 + 256 * 2**20}",
        "WantedBy=multi-user.target",
        "Environment=HIVE_HOME=/var/lib/hive",
    ):
        assert line in lines


def test_a_user_unit_names_no_user_and_no_bound_that_was_not_asked_for() -> None:
    text = service_unit(ServiceOptions(COMMAND, Path("/home/me/.hive"), Caps()))
    assert "User=" not in text and "CapabilityBoundingSet" not in text
    assert "CPUQuota" not in text and "MemoryMax" not in text
    assert "WantedBy=default.target" in text


@pytest.mark.parametrize(
    "options",
    [
        ServiceOptions(["hive-node", "start"], Path("/var/lib/hive"), Caps()),
        ServiceOptions(COMMAND, Path("relative"), Caps()),
        ServiceOptions([*COMMAND, "two\nlines"], Path("/var/lib/hive"), Caps()),
        ServiceOptions(COMMAND, Path("/var/lib/hive"), Caps(), user="root\nExecStart=/bin/sh"),
    ],
)
def test_what_cannot_stand_in_a_unit_is_refused(options: ServiceOptions) -> None:
    with pytest.raises(HiveError):
        service_unit(options)


@pytest.mark.parametrize("user", ["daemon", None])
def test_systemd_accepts_the_unit(tmp_path: Path, user: str | None) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    path = tmp_path / "hive-node.service"
    path.write_text(service_unit(ServiceOptions(COMMAND, Path("/var/lib/hive"), Caps(0.25, 2 * 2**30), user)))
    result = subprocess.run([analyze, "verify", str(path)], capture_output=True, text=True, timeout=60)
    if "initialize manager" in result.stderr:
        pytest.skip("systemd-analyze cannot run here")
    assert result.returncode == 0, result.stderr

"""A worker runs a stranger's code: it inherits no secret of its daemon, neither in variables nor by descriptors."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from tests.security.conftest import Working

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

FAMILY = ("warm parent", "worker")


def family(working: Working, name: str) -> dict[str, int]:
    (parent,) = psutil.Process(working.cluster.nodes[name].pid).children()
    (worker,) = parent.children()
    return dict(zip(FAMILY, (parent.pid, worker.pid), strict=True))


def descriptors(pid: int) -> dict[int, str]:
    """What each open descriptor of a process leads to."""
    return {int(entry.name): str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}


@pytest.mark.parametrize("name", ["n0", "n1"])
def test_the_token_and_every_other_setting_of_the_daemon_stay_out_of_the_environment(
    working: Working, name: str
) -> None:
    secret = working.cluster.token.rpartition(".")[2].encode()
    daemon = Path(f"/proc/{working.cluster.nodes[name].pid}/environ").read_bytes()
    assert (secret in daemon) == (name == "n1"), "the test gave it to this daemon"
    for who, pid in family(working, name).items():
        variables = Path(f"/proc/{pid}/environ").read_bytes()
        assert secret not in variables and b"HIVE_" not in variables, who
        assert secret not in Path(f"/proc/{pid}/cmdline").read_bytes(), who


@pytest.mark.parametrize("name", ["n0", "n1"])
def test_no_descriptor_of_the_daemon_is_open_in_a_worker(working: Working, name: str) -> None:
    daemon = descriptors(working.cluster.nodes[name].pid)
    sockets = {link for link in daemon.values() if link.startswith("socket:")}
    home = str(working.cluster.folder / name)
    for who, pid in family(working, name).items():
        opened = descriptors(pid)
        assert opened[0] == "/dev/null", "a worker does not read its owner's terminal"
        assert not sockets & set(opened.values()), f"{who} holds a socket of the daemon"
        beyond = {number: link for number, link in opened.items() if number > 2 and link.startswith(home)}
        assert all(f"{home}/node/jobs/" in link for link in beyond.values()), f"{who} has {beyond} open"


def test_a_worker_holds_its_own_channel_its_output_and_its_groups_sockets_only(working: Working) -> None:
    worker = family(working, "n0")["worker"]
    warm_parent = descriptors(family(working, "n0")["warm parent"])
    shared = {link for link in descriptors(worker).values() if link.startswith(("socket:", "pipe:"))}
    assert not shared & {link for link in warm_parent.values() if link.startswith(("socket:", "pipe:"))}


def test_a_worker_is_a_session_of_its_own_without_a_terminal(working: Working) -> None:
    for name in working.cluster.nodes:
        worker = family(working, name)["worker"]
        assert os.getsid(worker) == worker
        assert psutil.Process(worker).terminal() is None

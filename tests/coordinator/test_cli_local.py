"""`hive coordinator start`, `hive up` and the verbs against a real coordinator process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator import connect
from coordinator.cli.main import cli
from coordinator.config import load
from coordinator.local import LocalCluster, Share, equal_share
from protos.command_line import run
from protos.errors import AccessError, HiveError, Unreachable

HIVE = [sys.executable, "-m", "coordinator.cli.main"]
DEADLINE_S = 60.0


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HIVE_")}
    return {**kept, "HIVE_HOME": str(home), **more}


def start(home: Path, *more: str) -> subprocess.Popen[str]:
    arguments = ["coordinator", "start", "--host", "127.0.0.1", "--port", "0", "--session-port", "0", "--no-advertise"]
    return subprocess.Popen(
        [*HIVE, *arguments, "-o", "json", *more],
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str], number: signal.Signals = signal.SIGINT) -> tuple[int, str]:
    process.send_signal(number)
    _, errors = process.communicate(timeout=DEADLINE_S)
    return process.returncode, errors


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(HIVE_HOME, what it printed) of a coordinator without nodes."""
    home = tmp_path_factory.mktemp("coordinator")
    process = start(home)
    try:
        assert process.stdout is not None
        yield home, json.loads(process.stdout.readline())["coordinator"]
    finally:
        assert ended(process)[0] == 0


@pytest.fixture
def here(running: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in list(os.environ):
        if name.startswith("HIVE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HIVE_HOME", str(running[0]))
    return running[0]


def hive(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = run(cli, "hive", [*arguments, "-o", "json"])
    return code, json.loads(capsys.readouterr().out)


def job_file(folder: Path, name: str = "x") -> Path:
    (folder / "model.py").write_text("def build(): ...\n")
    path = folder / "job.yaml"
    path.write_text(f"name: {name}\nmodel: {{source: 'model.py:build'}}\ndata: {{source: 'builtin:digits'}}\n")
    return path


def test_it_says_where_it_is_and_how_to_join(running: tuple[Path, dict[str, Any]]) -> None:
    home, said = running
    assert said["home"] == str(home)
    assert said["join"] == f"hive-node start --coordinator {said['address']} --token {said['token']}"


def test_the_owner_needs_no_token(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = hive(capsys, "nodes")
    assert (code, document) == (0, {"schema": "hive/v1", "nodes": [], "links": []})


def test_a_job_waits_for_nodes_with_a_reason_and_can_be_cancelled(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, document = hive(capsys, "submit", str(job_file(tmp_path)), "--set", "name=other")
    assert code == 0
    job_id = document["job"]["id"]
    assert document["job"]["name"] == "other"
    assert [job["id"] for job in hive(capsys, "ps")[1]["jobs"]] == [job_id]
    code, document = hive(capsys, "cancel", job_id)
    assert (code, document["job"]["state"]) == (0, "CANCELLED")
    assert hive(capsys, "wait", job_id)[0] == 103
    assert run(cli, "hive", ["logs", "-f", job_id]) == 103
    capsys.readouterr()
    assert hive(capsys, "ps")[1]["jobs"] == []
    assert run(cli, "hive", ["events", "--job", job_id, "-o", "json"]) == 0
    kinds = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert kinds[-1]["payload"]["state"] == "CANCELLED"
    assert [event["seq"] for event in kinds] == sorted({event["seq"] for event in kinds})
    assert hive(capsys, "artifacts", "get", job_id, str(tmp_path / "out"))[0] == 4


@pytest.mark.parametrize(
    "arguments",
    [
        ("token", "create", "--uses", "99999999999999999999"),
        ("token", "create", "--uses", "2000000"),
        ("token", "create", "--lifetime", "9" * 400 + "d"),
        ("events", "--after", "99999999999999999999"),
        ("logs", "j-none", "--rank", "99999999999999999999"),
    ],
    ids=lambda arguments: " ".join(arguments)[:30],
)
def test_numbers_beyond_every_bound_are_a_matter_of_usage(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, document = hive(capsys, *arguments)
    assert (code, document["error"]["code"]) == (2, "usage")


def test_the_largest_numbers_are_taken(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, "hive", ["events", "--after", str(2**63 - 1), "-o", "json"]) == 0
    assert capsys.readouterr().out == ""


def test_a_plan_without_nodes_is_exit_7(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = hive(capsys, "plan", str(job_file(tmp_path)))
    assert (code, document["error"]["code"]) == (7, "no_placement")


def test_doctor_tells_of_both_sides(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, document = hive(capsys, "doctor")
    checks = {check["name"]: check["ok"] for check in document["checks"]}
    assert checks["coordinator"] and checks["credential"] and checks["event log"]
    assert checks["nodes"] is False


def test_a_coordinator_that_keeps_off_the_lan_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, document = hive(capsys, "doctor")
    zeroconf = next(check for check in document["checks"] if check["name"] == "zeroconf")
    assert (zeroconf["ok"], zeroconf["message"]) == (True, "not announced (--no-advertise)")
    assert run(cli, "hive", ["nodes", "--lan"]) == 0
    said = capsys.readouterr().out
    assert "this coordinator does not look at the LAN (--no-advertise)" in said
    assert "no other machines" not in said


def test_a_token_gives_another_machine_its_role_and_nothing_more(
    running: tuple[Path, dict[str, Any]],
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, document = hive(capsys, "token", "create", "--role", "observer")
    assert code == 0
    monkeypatch.setenv("HIVE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("HIVE_COORDINATOR", running[1]["address"])
    monkeypatch.setenv("HIVE_TOKEN", document["token"]["token"])
    assert hive(capsys, "ps")[0] == 0
    assert hive(capsys, "ps")[0] == 0  # the token had one use: the second call takes the stored credential
    code, document = hive(capsys, "submit", str(job_file(tmp_path)))
    assert (code, document["error"]["code"]) == (5, "forbidden")
    monkeypatch.delenv("HIVE_TOKEN")
    assert hive(capsys, "ps")[0] == 0


def test_a_revoked_token_is_refused(
    running: tuple[Path, dict[str, Any]],
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = hive(capsys, "token", "create", "--role", "submitter")[1]["token"]
    assert hive(capsys, "token", "revoke", made["id"])[0] == 0
    assert made["id"] not in [token["id"] for token in hive(capsys, "token", "list")[1]["tokens"]]
    monkeypatch.setenv("HIVE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("HIVE_COORDINATOR", running[1]["address"])
    monkeypatch.setenv("HIVE_TOKEN", made["token"])
    code, document = hive(capsys, "ps")
    assert (code, document["error"]["code"]) == (5, "unauthenticated")
    assert made["token"].rpartition(".")[2] not in json.dumps(document)


@pytest.mark.parametrize("token", ["nonsense", "hive1.abc", "hive1." + "0" * 64 + "." + "a" * 32])
def test_a_wrong_token_is_exit_5(
    running: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    config = connect.ClientConfig(tmp_path, running[1]["address"], token)
    with pytest.raises(AccessError) as caught:
        asyncio.run(connect.credential(config))
    assert caught.value.exit_code == 5


def test_a_taken_port_is_said_in_a_sentence(running: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    taken = running[1]["address"].rpartition(":")[2]
    process = start(tmp_path, "--port", taken)
    out, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    document = json.loads(out)
    assert document["error"]["code"] == "port_taken"
    assert taken in document["error"]["message"]
    assert "Traceback" not in errors


def test_nobody_at_the_address_is_exit_6(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    token = "hive1." + "0" * 64 + "." + "a" * 32
    with pytest.raises(Unreachable):
        asyncio.run(connect.credential(connect.ClientConfig(tmp_path, address, token)))


def test_the_followers_go_on_when_the_coordinator_is_killed_and_started_again(tmp_path: Path) -> None:
    """1. submit --wait follows; 2. kill -9 of the coordinator; 3. start again; 4. cancel: it ends with 103."""
    home, files = tmp_path / "home", tmp_path / "files"
    files.mkdir()
    process = start(home)
    assert process.stdout is not None and process.stderr is not None
    said = json.loads(process.stdout.readline())["coordinator"]
    waiting = subprocess.Popen(
        [*HIVE, "submit", str(job_file(files)), "--wait", "-o", "json"],
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert waiting.stderr is not None
        first = waiting.stderr.readline()
        assert "submitted" in first
        job_id = first.split()[1]
        process.kill()
        process.communicate(timeout=DEADLINE_S)
        ports = ("--port", said["address"].rpartition(":")[2], "--session-port", str(said["session_port"]))
        process = start(home, *ports)
        assert process.stdout is not None
        process.stdout.readline()
        cancel = subprocess.run(
            [*HIVE, "cancel", job_id], env=environment(home), capture_output=True, timeout=DEADLINE_S
        )
        assert cancel.returncode == 0
        out, _ = waiting.communicate(timeout=DEADLINE_S)
        assert waiting.returncode == 103
        assert json.loads(out)["job"]["state"] == "CANCELLED"
    finally:
        for each in (waiting, process):
            if each.poll() is None:
                each.kill()
                each.communicate(timeout=DEADLINE_S)


def test_ctrl_c_while_waiting_detaches_and_says_how_to_return(here: Path, tmp_path: Path) -> None:
    waiting = subprocess.Popen(
        [*HIVE, "submit", str(job_file(tmp_path)), "--wait"],
        env=environment(here),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stderr is not None
    job_id = waiting.stderr.readline().split()[1]
    code, errors = ended(waiting)
    assert code == 130
    assert f"hive wait {job_id}" in errors
    assert "Traceback" not in errors
    done = subprocess.run([*HIVE, "cancel", job_id], env=environment(here), capture_output=True, timeout=DEADLINE_S)
    assert done.returncode == 0


def test_a_local_cluster_leaves_nothing_running(tmp_path: Path) -> None:
    async def work() -> list[int]:
        async with LocalCluster(tmp_path, 0, Share(1.0, 2**30)) as cluster:
            async with await connect.connect(connect.ClientConfig(tmp_path)) as client:
                assert (await client.nodes())["nodes"] == []
            return cluster.pids

    for pid in asyncio.run(work()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_local_cluster_says_which_process_ended_early(tmp_path: Path) -> None:
    async def work() -> HiveError:
        async with LocalCluster(tmp_path, 0, Share(1.0, 2**30)) as cluster:
            os.kill(cluster.pids[0], signal.SIGKILL)
            return await cluster.ended()

    assert "coordinator ended by itself with exit code -9" in asyncio.run(work()).message


@pytest.mark.parametrize(("nodes", "cpus"), [(1, 8.0), (3, 2.66), (16, 0.5)])
def test_shares_are_equal_and_never_more_than_the_machine(nodes: int, cpus: float) -> None:
    share = equal_share(nodes, 8, 16 * 2**30)
    assert share.cpus == cpus
    assert share.cpus * nodes <= 8
    assert share.memory_bytes * nodes <= 16 * 2**30


def test_coordinator_settings_have_sources(tmp_path: Path) -> None:
    (tmp_path / "coordinator.toml").write_text("advertise = false\n")
    loaded = load({"port": 0}, {"HIVE_HOME": str(tmp_path), "HIVE_SESSION_PORT": "1234"})
    assert (loaded.port, loaded.session_port, loaded.advertise, loaded.host) == (0, 1234, False, "0.0.0.0")
    assert loaded.sources["port"] == "flag"
    assert loaded.sources["session_port"] == "environment HIVE_SESSION_PORT"

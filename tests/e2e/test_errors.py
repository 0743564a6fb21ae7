"""What goes wrong for people: one sentence, whose fault, what to do, the right exit code, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.e2e.cluster import Cluster, until

JOBS = Path(__file__).parent / "jobs"
ROOT = Path(__file__).parents[2]
OTHER_VERSION = """
import protos.version
protos.version.PROTOCOL = protos.version.MINIMUM_PROTOCOL = {protocol}
from {module} import main
main()
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def made(two_nodes: Cluster) -> Cluster:
    two_nodes.heal()
    return two_nodes


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Another coordinator, without nodes."""
    started = Cluster(tmp_path_factory.mktemp("empty"))
    try:
        started.start_coordinator()
        yield started
    finally:
        started.close()


def job(folder: Path, text: str = "", **parts: object) -> Path:
    """A job file beside the models of the tests; `parts` replace its sections."""
    shutil.copy(JOBS / "model.py", folder)
    document = {
        "name": "error",
        "model": {"source": "model.py:mlp"},
        "data": {"source": "builtin:digits"},
        "train": {"steps": 5},
    }
    path = folder / "job.yaml"
    path.write_text(text or json.dumps({**document, **parts}))
    return path


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str, traceback: bool = False) -> None:
    """Ended with this code and an error that holds these words, a hint, and no traceback of hive's own."""
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    for word in words:
        assert word in said, said
    assert ("Traceback" in said) == traceback, said
    assert "site-packages" not in said and f"{ROOT}/coordinator" not in said and "incident" not in said, said
    if done.stderr.startswith("error:"):
        assert "  hint: " in done.stderr or "upgrade hive on" in done.stderr, said


def stranger(tmp_path: Path, made: Cluster, token: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`hive` on a machine that has nothing but an address and a token."""
    environment = made.environment(tmp_path / "stranger")
    environment |= {"HIVE_COORDINATOR": made.address, "HIVE_TOKEN": token}
    return made.run(["coordinator.cli.main", *(arguments or ("nodes",))], environment, check=False)


def new_node(tmp_path: Path, made: Cluster, token: str) -> subprocess.CompletedProcess[str]:
    command = ["node.cli", "start", "--coordinator", made.address, "--token", token, "--allow-root", "--no-advertise"]
    return made.run(command, made.environment(tmp_path / "new"), check=False)


# ---- tokens


def test_a_token_of_another_coordinator_is_refused_before_its_secret_is_sent(
    made: Cluster, empty: Cluster, tmp_path: Path
) -> None:
    refused(stranger(tmp_path, made, empty.token), 5, "another coordinator than the one the token is from")
    refused(new_node(tmp_path, made, empty.token), 5, "another coordinator than the one the token is from")


@pytest.mark.parametrize("token", ["garbage", "hive1.zz.zz", "hive1." + "a" * 52 + "." + "b" * 26])
def test_a_garbage_token_is_refused(made: Cluster, tmp_path: Path, token: str) -> None:
    refused(stranger(tmp_path, made, token), 5, "token")
    refused(new_node(tmp_path, made, token), 5, "token")


def test_a_token_that_is_used_up_or_revoked_is_refused(made: Cluster, tmp_path: Path) -> None:
    once = made.ask("token", "create", "--role", "observer", "--uses", "1")["token"]
    assert stranger(tmp_path, made, once["token"]).returncode == 0
    refused(stranger(tmp_path / "second", made, once["token"]), 5, "used up")
    revoked = made.ask("token", "create", "--role", "observer", "--uses", "5")["token"]
    made.hive("token", "revoke", revoked["id"])
    refused(stranger(tmp_path / "third", made, revoked["token"]), 5, "revoked")


def test_a_token_of_another_role_does_not_do(made: Cluster, tmp_path: Path) -> None:
    node = made.ask("token", "create", "--role", "node")["token"]["token"]
    refused(stranger(tmp_path, made, node, "submit", str(JOBS / "mlp.yaml")), 5, "may not")
    submitter = made.ask("token", "create", "--role", "submitter")["token"]["token"]
    refused(new_node(tmp_path, made, submitter), 5, "submitter")
    observer = made.ask("token", "create", "--role", "observer")["token"]["token"]
    assert stranger(tmp_path / "o", made, observer).returncode == 0
    refused(stranger(tmp_path / "o", made, observer, "submit", str(JOBS / "mlp.yaml")), 5, "may not")


# ---- versions


@pytest.mark.parametrize(("protocol", "who"), [(99, "upgrade hive on the coordinator"), (0, "upgrade hive on")])
def test_another_protocol_is_refused_with_the_side_to_upgrade(
    made: Cluster, tmp_path: Path, protocol: int, who: str
) -> None:
    program = OTHER_VERSION.format(protocol=protocol, module="coordinator.cli.main")
    done = subprocess.run(
        [sys.executable, "-c", program, "nodes"],
        env=made.environment(made.home),
        capture_output=True,
        text=True,
        timeout=60,
    )
    refused(done, 6, "protocol", who)
    program = OTHER_VERSION.format(protocol=protocol, module="node.cli")
    flags = ["start", "--coordinator", made.address, "--token", made.token, "--allow-root", "--no-advertise"]
    done = subprocess.run(
        [sys.executable, "-c", program, *flags],
        env=made.environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    refused(done, 6, "protocol", who)


# ---- nodes


def test_without_nodes_a_plan_is_refused_and_a_submit_waits_with_the_reason(empty: Cluster) -> None:
    refused(empty.hive("plan", str(JOBS / "mlp.yaml"), check=False), 7, "no node has joined", "hive token create")
    job_id = empty.submit(JOBS / "mlp.yaml")
    waiting = until(lambda: (found := empty.show(job_id))["reason"] == "waiting_for_nodes" and found, "it says why")
    assert "no node has joined" in waiting["message"]
    assert "no node has joined" in empty.hive("ps").stdout
    empty.hive("cancel", job_id)
    assert empty.show(job_id)["state"] == "CANCELLED"


def test_more_nodes_than_there_are_wait_and_more_memory_than_any_has_is_refused(made: Cluster, tmp_path: Path) -> None:
    many = made.submit(job(tmp_path, nodes={"min": 3}))
    assert "needs 3 nodes, 2 take work" in made.wait_state(many, "QUEUED")["message"]
    until(lambda: "needs 3 nodes" in made.show(many)["message"], "it says why")
    assert "CANDIDATE" in made.hive("explain", many).stdout
    made.hive("cancel", many)
    path = job(tmp_path, nodes={"require": {"memory_bytes": 2**50}})
    refused(made.hive("plan", str(path), check=False), 7, "no plan fits the cluster", "memory_bytes")
    refused(made.hive("submit", str(path), "--wait", check=False), 7, "no plan fits the cluster")
    (last,) = [each["id"] for each in made.ask("ps", "--all", "--limit", "1")["jobs"]]
    explained = made.ask("explain", last)
    assert explained["plan"] is None and len(explained["candidates"]) == 5
    assert all(each["reasons"] and not each["feasible"] for each in explained["candidates"])
    said = made.hive("explain", last).stdout
    assert "no plan fits the cluster" in said and "CANDIDATE" in said


# ---- the job file, the model and the data


def test_a_model_that_fails_to_build_shows_the_users_own_lines(made: Cluster, tmp_path: Path) -> None:
    path = job(tmp_path, model={"source": "model.py:broken"})
    words = ("RuntimeError: the architect forgot the roof", "model.py", "in broken", "fix the code")
    refused(made.hive("plan", str(path), check=False), 3, *words, traceback=True)
    done = made.hive("submit", str(path), "--wait", check=False)
    refused(done, 3, *words, "model_unusable", "user_code", traceback=True)
    document = made.ask("submit", str(path), "--wait", check=False)["job"]
    assert (document["state"], document["exit_code"]) == ("FAILED", 3)
    assert document["last_lines"][0].startswith("Traceback") and "raise RuntimeError" in "".join(document["last_lines"])
    refused(made.hive("wait", document["id"], check=False), 3, *words, traceback=True)


def test_a_model_that_fails_while_it_trains_shows_the_users_own_lines(made: Cluster, tmp_path: Path) -> None:
    path = job(tmp_path, model={"source": "model.py:trips"})
    done = made.hive("submit", str(path), "--wait", check=False)
    refused(done, 100, "ValueError: tripped at 3", "in forward", "user_code", "fix the code", traceback=True)


def test_a_model_file_is_not_trained_and_how_to_convert_it_is_said(made: Cluster, tmp_path: Path) -> None:
    weights = torch.nn.Linear(64, 10).state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "state.pt")
    torch.save({"model": weights, "odd": pytest.approx}, tmp_path / "pickle.pt")
    for name in ("model.safetensors", "state.pt", "pickle.pt"):
        path = job(tmp_path, model={"source": name})
        for verb in ("plan", "submit"):
            words = (f"{name} is ", "it cannot be trained as it is", "source: model.py:build", "model.weights")
            refused(made.hive(verb, str(path), check=False), 3, *words)


def test_weights_that_do_not_fit_the_model_are_named(made: Cluster, tmp_path: Path) -> None:
    save_file(torch.nn.Linear(3, 2).state_dict(), tmp_path / "other.safetensors")
    path = job(tmp_path, model={"source": "model.py:mlp", "weights": "other.safetensors"})
    refused(made.hive("submit", str(path), "--wait", check=False), 3, "other.safetensors does not fit", "0.weight")


def test_a_missing_data_file_a_wrong_column_and_a_wrong_array_are_named(made: Cluster, tmp_path: Path) -> None:
    refused(made.hive("submit", str(job(tmp_path, data={"source": "no.csv"})), check=False), 3, "no.csv")
    (tmp_path / "rows.csv").write_text("length,width,label\n" + "1.0,2.0,0\n3.0,4.0,1\n" * 20)
    data = {"source": "rows.csv", "features": ["length", "wdith"], "target": "label"}
    words = ("rows.csv: no column 'wdith'; nearest: 'width'", "'label'")
    path = job(tmp_path, model={"source": "model.py:pair"}, data=data)
    refused(made.hive("plan", str(path), check=False), 3, *words)
    refused(made.hive("submit", str(path), "--wait", check=False), 3, *words, "data_unusable")
    good = job(tmp_path, model={"source": "model.py:pair"}, data={**data, "features": ["length", "width"]})
    assert made.hive("submit", str(good), "--wait").returncode == 0


def test_a_model_that_does_not_fit_the_data_is_refused_before_it_trains(made: Cluster, tmp_path: Path) -> None:
    path = job(tmp_path, model={"source": "model.py:pair"})
    refused(made.hive("plan", str(path), check=False), 3, "64")


def test_a_job_file_that_is_no_job_is_refused_here(made: Cluster, tmp_path: Path) -> None:
    def submitted(text: str = "", **parts: object) -> subprocess.CompletedProcess[str]:
        return made.hive("submit", str(job(tmp_path, text, **parts)), check=False)

    refused(submitted("model: [unclosed\n"), 3, "not valid YAML at line")
    refused(submitted(train={"epoch": 3}), 3, "train.epoch: unknown key; did you mean 'epochs'")
    refused(submitted(strategy="federated"), 3, "federated", "pipeline_parallel")
    refused(submitted(train={"loss": "mean_squared"}), 3, "loss")
    refused(made.hive("submit", str(tmp_path / "absent.yaml"), check=False), 4, "absent.yaml")
    refused(made.hive("submit", str(JOBS / "mlp.yaml"), "--set", "train.stepz=3", check=False), 3, "steps")
    refused(made.hive("show", "j-absent", check=False), 4, "j-absent", "hive ps --all")
    refused(made.hive("submti", check=False), 2, "did you mean 'submit'")
    document = json.loads(made.hive("show", "j-absent", "-o", "json", check=False).stdout)
    assert document["error"]["code"] == "not_found" and document["error"]["hint"]


@pytest.mark.parametrize("strategy", ["single_node", "data_parallel"])
def test_a_loss_that_is_not_a_number_ends_the_job(made: Cluster, tmp_path: Path, strategy: str) -> None:
    path = job(tmp_path, model={"source": "model.py:diverges"}, strategy=strategy)
    done = made.hive("submit", str(path), "--wait", "-o", "json", check=False)
    refused(done, 100)
    ended = json.loads(done.stdout)["job"]
    assert (ended["state"], ended["reason"], ended["blame"]) == ("FAILED", "not_a_number", "user_code")
    assert "the loss became nan at step 1" in ended["message"] and "lr" in ended["hint"]


# ---- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 384 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=384m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("needs root and leave to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(folder: Path, spare_bytes: int = 0) -> Path:
    """Use up every block of a file system but for so many bytes."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
        file.truncate(file.tell() - spare_bytes)
    return filler


@pytest.mark.root
def test_a_full_disk_of_the_coordinator_refuses_what_is_new_and_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    """What is known already is still taken, from space set aside; new files are refused before anything is promised."""
    made = Cluster(small_disk)
    try:
        made.start_coordinator()
        jobs = [made.submit(JOBS / "mlp.yaml")]
        filler = fill(small_disk)
        jobs.append(made.submit(JOBS / "mlp.yaml"))
        (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
        new = job(tmp_path, data={"source": "rows.csv", "features": ["a"], "target": "b"})
        refused(made.hive("submit", str(new), check=False), 1, "do not fit on the coordinator's disk", "free space")
        assert made.coordinator is not None
        made.coordinator.kill()
        made.start_coordinator()
        assert {found["id"] for found in made.ask("ps")["jobs"]} == set(jobs)
        filler.unlink()
        jobs.append(made.submit(new))
        assert {found["id"] for found in made.ask("ps")["jobs"]} == set(jobs)
    finally:
        made.close()


@pytest.mark.root
def test_a_full_disk_of_a_node_is_said_and_the_others_go_on(made: Cluster, small_disk: Path) -> None:
    """Enough is left for a report, not for the model."""
    home = made.folder / "cramped"
    home.symlink_to(small_disk)
    node = made.start_node("cramped")
    made.wait_ready(3)
    try:
        fill(small_disk, spare_bytes=512 * 1024)
        sets = ("nodes.require.names=[cramped]", "strategy=single_node", "train.steps=100")
        there = ["submit", str(JOBS / "long.yaml"), "--wait", *(f"--set={each}" for each in sets)]
        done = made.hive(*there, check=False)
        refused(done, 100, "no space left on the disk", "blame     node", "nodes     cramped")
        made.hive("submit", str(JOBS / "mlp.yaml"), "--wait", "--set=nodes.require.names=[n0, n1]")
        (small_disk / "filler").unlink()
        made.hive(*there)
    finally:
        (small_disk / "filler").unlink(missing_ok=True)
        node.end()
        made.nodes.pop("cramped")
        home.unlink()


# ---- processes and ports


def test_a_coordinator_that_is_not_there_is_unreachable(made: Cluster, tmp_path: Path) -> None:
    refused(made.hive("nodes", check=False, HIVE_HOME=str(tmp_path)), 6, "no coordinator is known here")
    away = {"HIVE_COORDINATOR": "127.0.0.1:9"}
    refused(made.hive("nodes", check=False, HIVE_HOME=str(tmp_path), HIVE_TOKEN=made.token, **away), 6, "127.0.0.1:9")
    assert made.coordinator is not None
    made.coordinator.kill()
    refused(made.hive("nodes", check=False), 6, "cannot be reached", "hive coordinator start")
    refused(made.hive("submit", str(JOBS / "mlp.yaml"), check=False), 6, "cannot be reached")
    document = json.loads(made.hive("nodes", "-o", "json", check=False).stdout)
    assert document["error"]["code"] == "unreachable"


def coordinator(made: Cluster, home: Path, port: str) -> subprocess.CompletedProcess[str]:
    flags = ["--host", "127.0.0.1", "--port", port, "--session-port", "0", "--no-advertise"]
    return made.run(["coordinator.cli.main", "coordinator", "start", *flags], made.environment(home), check=False)


def test_a_taken_port_and_a_taken_home_are_said(made: Cluster, tmp_path: Path) -> None:
    port = made.address.rpartition(":")[2]
    refused(coordinator(made, tmp_path, port), 1, f"port {port}", "taken", "--port")
    refused(coordinator(made, made.home, "0"), 2, "already running", "HIVE_HOME")
    home = made.folder / "n0"
    command = ["node.cli", "start", "--home", str(home), "--allow-root", "--no-advertise"]
    refused(made.run(command, made.environment(home), check=False), 2, "already runs in", "--home")
    assert len(made.wait_ready(2)) == 2


def test_ctrl_c_while_waiting_detaches_and_the_job_goes_on(made: Cluster) -> None:
    waiting = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "coordinator.cli.main",
            "submit",
            str(JOBS / "long.yaml"),
            "--wait",
            "--set=train.steps=20000",
        ],
        env=made.environment(made.home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stderr is not None
    job_id = waiting.stderr.readline().split()[1]
    made.wait_step(job_id, 50)
    waiting.send_signal(signal.SIGINT)
    out, errors = waiting.communicate(timeout=30)
    assert (waiting.returncode, out) == (130, "")
    assert f"job {job_id} goes on" in errors and f"hive wait {job_id}" in errors
    assert "Traceback" not in errors
    made.wait_step(job_id, made.show(job_id)["step"] + 50)
    made.wait_state(job_id, "RUNNING")  # it may be between two groups just then
    made.hive("cancel", job_id)
    made.wait(job_id)

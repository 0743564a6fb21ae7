"""`hive-node`: settings and their sources, consent, the control socket, the unit that install prints."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node import config as configuration
from node import control
from node.cli import VERBS, cli
from node.cli_control import shown
from node.consent import check_user, statement
from protos.command_line import run
from protos.errors import AccessError, Conflict, DeadlineExceeded, HiveError, NotFound
from protos.settings import Setting, Source, boolean, home_folder, listing, port, resolve


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in list(os.environ):
        if name.startswith("HIVE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HIVE_HOME", str(tmp_path))
    return tmp_path


# ---- settings


def test_flags_win_over_environment_over_file_over_defaults_and_each_says_so(home: Path) -> None:
    (home / "node.toml").write_text('cpus = 0.5\nmemory = "1GiB"\nname = "from-file"\ntrusted_lan = ["eth0"]\n')
    environment = {"HIVE_HOME": str(home), "HIVE_MEMORY": "2GiB", "HIVE_NAME": "from-environment"}
    loaded = configuration.load({"name": "from-flag"}, environment)
    assert (loaded.caps.cpus, loaded.caps.memory_bytes, loaded.name) == (0.5, 2 * 1024**3, "from-flag")
    assert loaded.trusted_lan == ("eth0",)
    assert loaded.sources["cpus"] == f"file {home / 'node.toml'}"
    assert loaded.sources["memory"] == "environment HIVE_MEMORY"
    assert loaded.sources["name"] == "flag"
    assert loaded.sources["gpus"] == "default"


def test_the_token_is_never_shown(home: Path) -> None:
    loaded = configuration.load({"token": "hive1.secret.secret"}, {})
    assert "secret" not in repr(loaded)
    assert "secret" not in json.dumps(configuration.shown(loaded))
    assert loaded.token == "hive1.secret.secret"


def test_an_unknown_key_in_the_file_names_the_nearest(home: Path) -> None:
    (home / "node.toml").write_text("cpu = 1\n")
    with pytest.raises(HiveError, match="did you mean 'cpus'") as caught:
        configuration.load({}, {"HIVE_HOME": str(home)})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["cpus = ", "cpus = true\n", 'memory = "lots"\n', "gpus = -1\n", "advertise = 3\n"])
def test_a_wrong_value_in_the_file_is_a_usage_error_that_names_the_file(home: Path, text: str) -> None:
    (home / "node.toml").write_text(text)
    with pytest.raises(HiveError, match=r"node\.toml") as caught:
        configuration.load({}, {"HIVE_HOME": str(home)})
    assert caught.value.exit_code == 2


def test_an_empty_environment_variable_is_not_given(home: Path) -> None:
    loaded = configuration.load({}, {"HIVE_HOME": str(home), "HIVE_CPUS": "", "HIVE_ALLOW_ROOT": "yes"})
    assert loaded.caps.cpus is None
    assert loaded.allow_root is True


def test_without_hive_home_the_users_data_folder_is_used() -> None:
    folder, source = home_folder(None, {})
    assert folder.name == "hive"
    assert source == "default"


@given(
    st.dictionaries(st.sampled_from(["a", "b"]), st.text("xyz", min_size=1, max_size=3)),
    st.dictionaries(st.sampled_from(["HIVE_A", "HIVE_B"]), st.text("xyz", max_size=3)),
)
def test_the_first_layer_that_has_a_value_wins(flags: dict[str, str], environment: dict[str, str]) -> None:
    made = resolve([Setting("a", str, "d"), Setting("b", str, "d")], flags, environment, Path("/nonexistent/x.toml"))
    for key in ("a", "b"):
        expected = flags.get(key) or environment.get(f"HIVE_{key.upper()}") or "d"
        assert made.values[key] == expected
        assert made.sources[key].startswith(
            Source.FLAG if key in flags else Source.ENVIRONMENT if environment.get(f"HIVE_{key.upper()}") else "default"
        )


def test_plain_parsers() -> None:
    assert [boolean(x) for x in (True, "no", "ON", 0)] == [True, False, True, False]
    assert [port(x) for x in (0, "7700")] == [0, 7700]
    assert listing("a, b,,c") == ("a", "b", "c")
    for wrong in ("x", -1, 65536, True):
        with pytest.raises(ValueError):
            port(wrong)


# ---- consent


def test_the_statement_names_the_user_and_whose_jobs() -> None:
    said = statement("ann", "lab:7700")
    assert "as user 'ann'" in said
    assert "lab:7700" in said
    assert "no sandbox" in said


def test_root_needs_the_owners_word() -> None:
    with pytest.raises(AccessError) as caught:
        check_user(0, allow_root=False)
    assert caught.value.exit_code == 5
    check_user(0, allow_root=True)
    check_user(1000, allow_root=False)


# ---- the control socket


@contextmanager
def daemon(home: Path, answers: Mapping[str, Any] | None = None) -> Iterator[list[tuple[str, Mapping[str, Any]]]]:
    """A control server in a thread of its own, as a daemon in another process would be."""
    asked: list[tuple[str, Mapping[str, Any]]] = []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    started: list[BaseException | None] = []
    ready = threading.Event()

    async def handle(command: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        asked.append((command, arguments))
        if command == "drain":
            raise Conflict("already draining", "wait")
        if command == "bench":
            raise ZeroDivisionError("inside")
        if command == "pause":
            await asyncio.sleep(3600)
        return (answers or {}).get(command, {"did": command})

    async def serve() -> None:
        try:
            async with control.serve(home, handle):
                started.append(None)
                ready.set()
                await stop.wait()
        except BaseException as error:
            started.append(error)
            ready.set()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(10)
    try:
        if started[0] is not None:
            raise started[0]
        yield asked
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def test_a_command_is_asked_and_answered(home: Path) -> None:
    with daemon(home) as asked:
        assert control.ask(home, "status", {"verbose": True}) == {"did": "status"}
    assert asked == [("status", {"verbose": True})]


def test_only_the_owner_may_speak_to_the_socket(home: Path) -> None:
    with daemon(home):
        assert stat.S_IMODE(control.socket_path(home).stat().st_mode) == 0o600


def test_a_refusal_arrives_as_itself_and_a_bug_as_a_sentence(home: Path) -> None:
    with daemon(home):
        with pytest.raises(Conflict, match="already draining"):
            control.ask(home, "drain")
        with pytest.raises(HiveError, match="bench failed: ZeroDivisionError: inside"):
            control.ask(home, "bench")
        with pytest.raises(HiveError, match="unknown command 'format'"):
            control.ask(home, "format")
        assert control.ask(home, "status") == {"did": "status"}  # it still answers


def test_a_daemon_that_does_not_answer_is_a_timeout(home: Path) -> None:
    with daemon(home), pytest.raises(DeadlineExceeded):
        control.ask(home, "pause", deadline_s=0.2)


def test_without_a_daemon_it_says_so(home: Path) -> None:
    with pytest.raises(NotFound, match="no daemon is running here"):
        control.ask(home, "status")


def test_the_socket_of_a_killed_daemon_does_not_keep_the_next_from_starting(home: Path) -> None:
    path = control.socket_path(home)
    path.parent.mkdir(parents=True)
    code = f"import socket; s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r}); s.listen()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    with pytest.raises(NotFound):
        control.ask(home, "status")
    with daemon(home):
        assert control.ask(home, "status") == {"did": "status"}
    assert not path.exists()


def test_a_second_daemon_in_one_home_is_refused_and_the_first_goes_on(home: Path) -> None:
    with daemon(home):
        with pytest.raises(Conflict, match="already runs in"), daemon(home):
            pass
        assert control.ask(home, "status") == {"did": "status"}


def test_a_home_with_a_long_path_gets_a_short_private_socket(home: Path) -> None:
    deep = home / ("x" * 90) / ("y" * 90)
    deep.mkdir(parents=True)
    path = control.socket_path(deep)
    assert len(str(path)) <= 100
    with daemon(deep):
        assert stat.S_IMODE(path.parent.stat().st_mode) & 0o077 == 0
        assert control.ask(deep, "status") == {"did": "status"}


@given(st.binary(max_size=200))
def test_no_line_on_the_socket_goes_unanswered(line: bytes) -> None:
    async def handle(command: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        return {}

    async def work() -> Mapping[str, Any]:
        reader = asyncio.StreamReader()
        reader.feed_data(line.replace(b"\n", b" ") + b"\n")
        return await control._one_answer(reader, handle)

    answer = asyncio.run(work())
    assert set(answer) in ({"answer"}, {"error"})


# ---- the verbs


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, "hive-node", [name, "--help"]) == 0
    assert "Usage: hive-node " + name in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom node.cli import cli\n"
        "try: cli.main(['--help'], prog_name='hive-node')\nexcept SystemExit: pass\n"
        "heavy = {'grpc', 'pydantic', 'rich', 'torch', 'numpy', 'zeroconf', 'psutil'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_status_prints_what_the_daemon_says(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = {"id": "n-1", "activity": "BUSY", "jobs": [{"job_id": "j-1", "rank": 0}]}
    with daemon(home, {"status": {"node": node}}):
        assert run(cli, "hive-node", ["status"]) == 0
        assert "activity: BUSY" in capsys.readouterr().out
        assert run(cli, "hive-node", ["status", "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"schema": "hive/v1", "node": node}


def test_a_verb_without_a_daemon_is_not_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, "hive-node", ["pause", "-o", "json"]) == 4
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "not_found"


def test_config_show_tells_values_and_sources(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "node.toml").write_text("cpus = 0.25\n")
    assert run(cli, "hive-node", ["config", "show", "--sources", "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["config"]["cpus"] == 0.25
    assert document["sources"]["cpus"].startswith("file ")
    assert document["sources"]["home"] == "environment HIVE_HOME"


def test_install_prints_a_unit_with_the_caps_and_without_the_token(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HIVE_TOKEN", "hive1.secret.secret")
    assert run(cli, "hive-node", ["install", "--cpus", "0.5", "--memory", "2GiB", "--name", "lab 3"]) == 0
    unit = capsys.readouterr().out
    assert "--cpus 0.5 --memory 2147483648" in unit
    assert f"HIVE_HOME={home}" in unit
    assert '"lab 3"' in unit
    assert "secret" not in unit


def test_install_as_root_needs_the_owners_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SUDO_USER", raising=False)
    assert run(cli, "hive-node", ["install", "--system"]) == 5
    assert "--allow-root" in capsys.readouterr().err


def test_a_wrong_cap_is_a_usage_error_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, "hive-node", ["start", "--allow-root", "--cpus", "many"]) == 2
    assert "--cpus 'many' is not a number of cores" in capsys.readouterr().err


def test_doctor_without_a_daemon_still_checks_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, "hive-node", ["doctor", "-o", "json"]) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["python"]["ok"] and checks["workers"]["ok"]
    assert checks["daemon"]["ok"] is False
    assert "cpu cap" in checks


def test_answers_are_shown_flat_with_lists_as_tables() -> None:
    text = shown(
        {"schema": "hive/v1", "node": {"id": "n", "caps": {"cpus": 1}, "none": None, "jobs": [{"job_id": "j"}]}}
    )
    assert text.splitlines() == ["id: n", "caps.cpus: 1", "none: -", "", "JOB_ID", "j"]

"""`hive qtable` as a person types it, against real coordinators in this process: two clusters, a log of finished jobs,
exports that travel, an old table, and what is refused."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.app import Ready, serve
from coordinator.cli.main import cli
from coordinator.config import CoordinatorConfig
from coordinator.learning import DECISION, OUTCOME
from coordinator.store.protocol import AppendEvent
from coordinator.store.sqlite import SqliteStore
from protos import credentials, enrol
from protos.command_line import run as run_command
from protos.ids import JobId
from protos.token import Role, parse_token
from qtable.state import SHAPE
from strategies.cost import COST_MODEL_VERSION

STATE = [1, 0, 1, 0]
Hive = Callable[..., Awaitable[tuple[int, str, str]]]


def decision(plan: str, taken: str, propensity: float = 1.0, residual: float = 0.0) -> AppendEvent:
    seconds = {"data_parallel": 10.0, "single_node": 11.0, "model_parallel": None}
    candidates = [
        {"strategy": name, "feasible": each is not None, "reasons": [] if each else ["too little memory"],
         "seconds": each, "residual": residual, "nodes": ["n-a"]}
        for name, each in seconds.items()
    ]  # fmt: skip
    payload = {
        "plan_id": plan, "strategy": taken, "state": STATE, "features": {"rows": 100}, "candidates": candidates,
        "predicted_s": seconds[taken], "propensity": propensity, "forced": False, "explored": propensity < 0.5,
        "expected_loss_s": 0.5 if propensity < 0.5 else 0.0, "cost_model_version": COST_MODEL_VERSION,
    }  # fmt: skip
    return AppendEvent(DECISION, JobId(f"j-{plan}"), payload=payload)


def outcome(plan: str, taken: str, measured_s: float) -> AppendEvent:
    predicted_s = {"data_parallel": 10.0, "single_node": 11.0}[taken]
    payload = {
        "plan_id": plan, "strategy": taken, "state": STATE, "predicted_s": predicted_s, "measured_s": measured_s,
        "measured_step_s": measured_s / 100, "ran_s": measured_s, "counted": True, "why": "",
        "cost_model_version": COST_MODEL_VERSION,
    }  # fmt: skip
    return AppendEvent(OUTCOME, JobId(f"j-{plan}"), payload=payload)


def history(slower: float, jobs: int = 12) -> list[AppendEvent]:
    """Jobs whose group is slower than predicted; every fourth one runs on a single node, as predicted."""
    events = []
    for number in range(jobs):
        alone = number % 4 == 3
        taken = "single_node" if alone else "data_parallel"
        plan = f"p-{number}"
        events += [decision(plan, taken, 0.05 if alone else 0.95)]
        events += [outcome(plan, taken, 11.0 if alone else 10.0 * slower * (1 + number / 100))]
    return [*events, decision("p-open", "data_parallel")]


@asynccontextmanager
async def coordinator(home: Path, log: list[AppendEvent]) -> AsyncIterator[Ready]:
    (home / "coordinator").mkdir(parents=True)
    store = await SqliteStore.open(home / "coordinator")
    await store.commit(*log)
    await store.close()
    config = CoordinatorConfig(home, host="127.0.0.1", port=0, session_port=0, advertise=False)
    ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(config, ready.set_result))
    await asyncio.wait({ready, serving}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    try:
        yield ready.result()
    finally:
        serving.cancel()
        await asyncio.wait({serving})


def story(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], body: Callable[..., Any]
) -> None:
    """`body` gets `hive(home, *arguments)` and the folder."""

    async def hive(home: Path, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setenv("HIVE_HOME", str(home))
        capsys.readouterr()
        code = await asyncio.to_thread(run_command, cli, "hive", ["qtable", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    async def main() -> None:
        async with asyncio.timeout(120):
            await body(hive)

    asyncio.run(main())


def test_a_table_is_shown_judged_carried_over_and_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"

    async def body(hive: Hive) -> None:
        async with coordinator(a, history(2.0)), coordinator(b, history(1.5, 8)):
            await shown(hive, a)
            await judged(hive, a)
            await exported_decisions(hive, a)
            await carried(hive, tmp_path, a, b)
            await ranked(hive, tmp_path, a)
            await wrong(hive, tmp_path, a)
            await forgotten(hive, a)

    story(tmp_path, monkeypatch, capsys, body)


async def shown(hive: Hive, home: Path) -> None:
    code, out, err = await hive(home, "show")
    assert code == 0
    header, row, *rest = out.splitlines()
    assert header.split() == ["PARAMETERS", "ROWS", "NODES", "LATENCY", "BEST", "Q", "N", "CONFIDENCE", "LEARNED"]
    assert rest == []
    assert row.startswith("< 100M") and "single_node" in row and "data_parallel +1" in row
    assert "exploring has cost" in err
    code, out, _ = await hive(home, "show", "--all")
    assert len(out.splitlines()) == 1 + 144
    code, out, _ = await hive(home, "show", "-o", "json")
    document = json.loads(out)
    assert document["schema"] == "hive/v1"
    table = document["qtable"]
    cell = next(each for each in table["cells"] if each["key"] == STATE)
    learned = cell["actions"]["data_parallel"]
    assert (cell["visits"], learned["n"], cell["actions"]["single_node"]["n"]) == (12, 9, 3)
    assert learned["residual"] == pytest.approx(learned["Q"] - learned["Q0"])
    assert -0.8 < learned["mean"] < -0.65 and 0 < learned["M2"] < 0.1 and learned["confidence"] > 0.8
    assert table["ledger"]["loss_s"] == 1.5 and table["ledger"]["share"] == pytest.approx(
        1.5 / table["ledger"]["job_s"]
    )
    assert table["last_event_seq"] == 25 and table["problem"] == ""
    assert [each["own"] for each in table["contributions"]] == [True]


async def judged(hive: Hive, home: Path) -> None:
    code, out, _ = await hive(home, "evaluate")
    assert code == 0 and "learning changed" in out
    found = json.loads((await hive(home, "evaluate", "-o", "json"))[1])["evaluation"]
    by_action = {each["action"]: each for each in found["errors"]}
    assert (found["jobs"], found["unread"]) == (12, 0)
    assert by_action["all"]["error_with"] < by_action["all"]["error_without"]
    assert by_action["data_parallel"]["bias_without"] < -0.6
    assert found["choices"]["decisions"] == 13 and 0 < found["choices"]["changed"] < 13
    policies = {each["policy"]: each for each in found["policies"]}
    assert policies["with what was learned"]["ratio"] < policies["predictions alone"]["ratio"]
    assert policies["predictions alone"]["matched"] == 9


async def exported_decisions(hive: Hive, home: Path) -> None:
    lines = [json.loads(line) for line in (await hive(home, "export", "--decisions"))[1].splitlines()]
    assert [line["plan_id"] for line in lines] == [*(f"p-{number}" for number in range(12)), "p-open"]
    assert lines[0]["predictions"] == {"data_parallel": 10.0, "single_node": 11.0}
    assert lines[0]["mask"] == {"model_parallel": ["too little memory"]}
    assert {"features", "propensity", "seq", "time", "job_id"} <= set(lines[0])
    assert lines[0]["outcome"]["measured_s"] == 20.0 and lines[-1]["outcome"] is None


async def carried(hive: Hive, folder: Path, a: Path, b: Path) -> None:
    """Each imports the other's export, one of them twice: the learned tables are the same."""
    files = {}
    for home in (a, b):
        code, out, _ = await hive(home, "export")
        files[home] = folder / f"{home.name}.json"
        files[home].write_text(out)
        assert code == 0 and json.loads(out)["schema"] == "hive/qtable/v1"
    code, out, _ = await hive(a, "import", files[b])
    assert code == 0 and out.startswith("imported 8 visits in 1 state from ")
    code, out, _ = await hive(a, "import", files[b])
    assert code == 0 and out.startswith("nothing new")
    document = json.loads((await hive(b, "import", files[a], "-o", "json"))[1])
    assert document["imported"]["new"][0]["visits"] == 12
    tables = [json.loads((await hive(home, "export"))[1]) for home in (a, b)]
    assert tables[0]["origin"] != tables[1]["origin"]
    for name in ("Q", "n", "mean", "M2"):
        assert tables[0][name] == tables[1][name]
    assert sum(tables[0]["n"]) == 20
    code, out, _ = await hive(a, "import", files[a])
    assert code == 0 and out.startswith("nothing new") and "from this coordinator itself" in out
    again = json.loads((await hive(a, "export"))[1])
    assert again["n"] == tables[0]["n"], "one's own is passed over: the log has it"


async def ranked(hive: Hive, folder: Path, home: Path) -> None:
    """An old table, and a rebuild that gives what the imports gave."""
    values = np.zeros(SHAPE)
    values[3, 0, 0, 0] = [3.0, 0.0, 1.0, 0.0, 2.0]
    (folder / "q_table.pkl").write_bytes(pickle.dumps(values))
    code, out, _ = await hive(home, "import", folder / "q_table.pkl")
    assert code == 0 and out.startswith("imported 3 ranks in 1 state from ranks-")
    assert (await hive(home, "import", folder / "q_table.pkl"))[1].startswith("nothing new")
    row = next(line for line in (await hive(home, "show"))[1].splitlines() if line.startswith(">= 1B"))
    assert "(rank)" in row and " prior " in row and "(1)" not in row, "an order is no visit"
    code, out, _ = await hive(home, "rebuild")
    assert code == 0 and out.startswith("rebuilt from 27 events up to ") and "equal to the table in use" in out


async def wrong(hive: Hive, folder: Path, home: Path) -> None:
    good = json.loads((folder / "b.json").read_text())
    for name, content, code, said in (
        ("empty", b"", 3, "the file is empty"),
        ("text", b"hello", 3, "not a pickled array"),
        ("other.json", b"{}", 3, "not a document of schema"),
        ("cut.json", (folder / "b.json").read_bytes()[:-200], 3, "cannot be imported"),
        ("changed.json", json.dumps({**good, "origin": "x"}).encode(), 3, "checksum does not match"),
        ("large", bytes(5_000_000), 3, "no table has"),
    ):
        (folder / name).write_bytes(content)
        found, out, err = await hive(home, "import", folder / name)
        assert (found, out) == (code, "") and said in err and "hint" in err, (name, err)
    assert (await hive(home, "import", folder / "none"))[0] == 4
    assert (await hive(home, "import", folder))[0] == 4


async def forgotten(hive: Hive, home: Path) -> None:
    code, _, err = await hive(home, "reset")
    assert code == 2 and "say --yes" in err
    code, out, _ = await hive(home, "reset", "--yes")
    assert code == 0 and "forgotten: 12 visits in 1 state from our own jobs" in out
    code, out, err = await hive(home, "show")
    assert code == 0 and out.startswith("nothing was learned yet")
    assert "equal to the table in use" in (await hive(home, "rebuild"))[1]


def test_who_submits_may_look_and_take_away_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def body(hive: Hive) -> None:
        async with coordinator(tmp_path / "a", history(2.0)) as ready:
            owner = credentials.load(tmp_path / "a" / "client" / "credential.json")
            from coordinator.client import Client

            async with Client.of(owner) as client:
                token = parse_token((await client.create_token(Role.SUBMITTER, 1, 60.0))["token"]["token"])
            person = await enrol.enrol(ready.address, token, "ada")
            home = tmp_path / "ada"
            credentials.save(person, home / "client" / "credential.json")
            for allowed in ("show", "export", "evaluate"):
                assert (await hive(home, allowed))[0] == 0, allowed
            assert (await hive(home, "export", "--decisions"))[0] == 0
            (tmp_path / "x.pkl").write_bytes(pickle.dumps(np.ones(SHAPE)))
            for refused in (("import", tmp_path / "x.pkl"), ("reset", "--yes"), ("rebuild",)):
                code, _, err = await hive(home, *refused)
                assert code == 5 and "use a credential with role admin" in err, refused

    story(tmp_path, monkeypatch, capsys, body)

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtable import snapshot
from qtable.policy import Ledger
from qtable.prior import load_prior, parse_prior
from qtable.state import StateKey
from qtable.table import ARRAYS, QTable

KEY = StateKey(1, 1, 1, 1)


def learned(seq: int, outcomes: int = 3) -> QTable:
    table = load_prior().table()
    for index in range(outcomes):
        table.learn(KEY, "data_parallel", 0.1 * index)
    table.last_seq = seq
    return table


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    table, ledger = learned(42), Ledger(1234.5, 6.7)
    snapshot.save(tmp_path / "q" / "qtable.json", table, ledger)
    loaded = snapshot.load(tmp_path / "q" / "qtable.json")
    assert loaded.table is not None
    assert all(np.array_equal(getattr(loaded.table, name), getattr(table, name)) for name in ARRAYS)
    assert (loaded.table.last_seq, loaded.table.cost_model_version) == (42, table.cost_model_version)
    assert loaded.ledger == ledger
    assert loaded.reason == "qtable.json at event 42"


def test_the_document_is_plain_json_with_the_promised_fields(tmp_path: Path) -> None:
    snapshot.save(tmp_path / "qtable.json", learned(1), Ledger())
    body = json.loads((tmp_path / "qtable.json").read_text())
    assert {"schema", "bins", "actions", "cost_model_version", "Q", "Q0", "n", "mean", "M2"} <= set(body)
    assert {"last_event_seq", "sha256"} <= set(body)
    assert len(body["Q"]) == 4 * 3 * 4 * 3 * 5


def test_three_generations_are_kept_and_the_newest_valid_one_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "qtable.json"
    for seq in (1, 2, 3, 4):
        snapshot.save(path, learned(seq), Ledger())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["qtable.json", "qtable.json.1", "qtable.json.2"]
    path.write_text(path.read_text()[:-100])
    loaded = snapshot.load(path)
    assert loaded.table is not None
    assert loaded.table.last_seq == 3
    assert loaded.path == tmp_path / "qtable.json.1"
    assert "passed over qtable.json:" in loaded.reason
    (tmp_path / "qtable.json.1").write_bytes(b"\x80\x04.")
    assert (reloaded := snapshot.load(path)).table is not None
    assert reloaded.table is not None
    assert reloaded.table.last_seq == 2


def test_no_snapshot_at_all_is_said_not_raised(tmp_path: Path) -> None:
    loaded = snapshot.load(tmp_path / "qtable.json")
    assert loaded.table is None
    assert loaded.reason.startswith("no snapshot yet")
    (tmp_path / "qtable.json").write_text("{}")
    damaged = snapshot.load(tmp_path / "qtable.json")
    assert damaged.table is None and "no usable snapshot" in damaged.reason and "passed over" in damaged.reason


EMPTY: dict[str, list[float]] = {"residual": [], "n": [], "mean": [], "m2": []}


def edited(**changes: object) -> str:
    body = snapshot.document(learned(9), Ledger()) | changes
    return json.dumps(body | {"sha256": snapshot.checksum(body)})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "schema"),
        ("[]", "schema"),
        ("nonsense", "Expecting value"),
        ("[" * 100_000, "deep"),
        ('{"schema": "hive/qtable/v1", "Q": ' + "[" * 960 + "]" * 960 + "}", "deep|checksum"),
        (edited(Q=[0.0]), "reshape"),
        (edited(actions=["single_node"]), "other bins or actions"),
        (edited(bins={}), "other bins or actions"),
        (edited(n=[1.0] * 720), "n is not what its contributions add up to"),
        (edited(Q=[0.5] * 720), "Q is not what its contributions add up to"),
        (edited(contributions={"": {"seq": 1, "cell": [0], "residual": [9.0]}}), "lacks a field"),
        (edited(origin="x", contributions={"\x1b[2J": {"seq": 1, "cell": [], **EMPTY}}), "names its origin"),
        (edited(contributions=[]), "not what its contributions add up to"),
        (edited(contributions=None), "wrong type"),
        (edited(Q=["x"] * 720), "could not convert"),
        (edited(last_event_seq=-1), "negative"),
        (edited(ledger=None), "wrong type"),
        (edited(Q=[float("nan")] * 720), "NaN is not a number"),
        (edited(Q=[1e999] * 720), "not a number"),
        (edited().replace('"last_event_seq": 9', '"last_event_seq": 10'), "checksum"),
    ],
)
def test_a_damaged_or_foreign_document_is_refused_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        snapshot.parse(text)


@given(st.binary(max_size=200))
def test_no_bytes_make_loading_raise_anything_else(content: bytes) -> None:
    with pytest.raises(ValueError):
        snapshot.parse(content)


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_flipped_byte_never_passes_as_another_table(position: int, value: int) -> None:
    text = bytearray(json.dumps(snapshot.document(learned(9), Ledger())).encode())
    index = position % len(text)
    text[index] = value
    try:
        table, _ = snapshot.parse(bytes(text))
    except ValueError:
        return
    assert np.array_equal(table.q, learned(9).q)
    assert table.last_seq == 9


def test_a_damaged_prior_is_refused() -> None:
    with pytest.raises(ValueError, match="damaged"):
        parse_prior('{"schema": "hive/qtable-prior/v1"}')


SAVER = """
import sys
from pathlib import Path
from qtable import snapshot
from qtable.policy import Ledger
from qtable.prior import load_prior
table = load_prior().table()
while True:
    table.last_seq += 1
    snapshot.save(Path(sys.argv[1]), table, Ledger())
    sys.stdout.write(f"{table.last_seq}\\n")
    sys.stdout.flush()
"""


def test_a_kill_at_any_moment_of_a_save_never_loses_the_table(tmp_path: Path) -> None:
    """The saver says each seq after its save returned; whatever it was doing when killed, that one is still there."""
    path = tmp_path / "qtable.json"
    for round_number in range(6):
        command = [sys.executable, "-c", SAVER, str(path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            for _ in range(3 + 5 * round_number):
                said = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            said = max([said, *(int(line) for line in process.stdout.read().splitlines() if line)])
        loaded = snapshot.load(path)
        assert loaded.table is not None
        assert loaded.table.last_seq >= said
        for generation in tmp_path.glob("qtable.json*"):
            if not generation.name.endswith(".tmp"):
                snapshot.parse(generation.read_bytes())
        for generation in tmp_path.glob("qtable.json*"):
            generation.unlink()

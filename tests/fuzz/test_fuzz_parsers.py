"""Parsers of what strangers send, fed with damaged and random bytes: they answer or raise HiveError, nothing else.

A failure prints the input; it then belongs into the parser's own tests as a case.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz_bytes import damaged

from coordinator.qtable_child import answer
from coordinator.qtable_import import read_document
from node.channel import Frame, pack, receive_frame
from protos import announcement, artifact, documents, jobspec
from protos.capacity import Capacity
from protos.errors import HiveError
from protos.jobspec import DataSpec
from protos.plan import Plan
from protos.token import new_token, parse_token
from protos.work import Outcome, Task
from qtable import snapshot
from qtable.policy import Ledger
from qtable.prior import load_prior
from qtable.state import ACTIONS, SHAPE, StateKey
from qtable.table import QTable
from strategies.data import open_dataset

JOB = b"""name: x
model: {source: 'model.py:build', args: {n: 3}}
data: {source: train.csv, target: y}
train: {epochs: 3}
"""
CSV = b'a,b,y\n1,2,0\n3,"4",1\n5,6,0\n7,8,1\n'
JSONL = b'{"a": 1, "y": 0}\n{"a": 2.5, "y": 1}\n{"a": [1, 2], "y": 1}\n'
MANIFEST = json.dumps({"files": [{"path": "a/b.py", "digest": "0" * 64, "bytes": 3, "origin": ""}]}).encode()


def read_job(content: bytes) -> None:
    jobspec.parse_text(content.decode("utf-8", "replace"))


def read_token(content: bytes) -> None:
    parse_token(content.decode("latin-1"))


def read_manifest(content: bytes) -> None:
    artifact.check_manifest(documents.decode(artifact.Manifest, content))


def read_documents(content: bytes) -> None:
    for kind in (Capacity, Task, Outcome, Plan):
        try:
            documents.decode(kind, content)
        except HiveError:
            continue


def read_txt(content: bytes) -> None:
    parts = content.split(b"=")
    txt = dict(zip(parts[::2], parts[1::2], strict=False))
    announcement.read_node(txt)
    announcement.read_coordinator(txt)


def read_old_table(content: bytes) -> None:
    json.dumps(answer(content))


def read_table(content: bytes) -> None:
    """As it comes, and with a checksum that fits: else nothing behind the checksum would ever be reached."""
    with contextlib.suppress(HiveError):
        read_document(content)
    try:
        body = json.loads(content)
        fitting = {**body, "sha256": snapshot.checksum(body)}
    except (ValueError, TypeError, AttributeError):
        return
    read_document(json.dumps(fitting).encode())


def read_contributions(content: bytes) -> None:
    """All the damage in what the coordinators have contributed, and a whole table around it."""
    try:
        body = {**json.loads(TABLES[0]), "contributions": json.loads(content)}
        fitting = {**body, "sha256": snapshot.checksum(body)}
    except ValueError:
        return
    read_document(json.dumps(fitting).encode())


def read_frames(content: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(content[:60_000])
        theirs.close()
        while receive_frame(ours) is not None:
            pass


def table_reader(folder: Path, name: str) -> Callable[[bytes], None]:
    path = folder / name

    def read(content: bytes) -> None:
        path.write_bytes(content)
        dataset = open_dataset(DataSpec(source=name, target="y"), path, None, split="train")
        if dataset is not None and dataset.rows:
            dataset.batch(torch.arange(min(dataset.rows, 4)).numpy())

    return read


OLD_TABLES = [
    pickle.dumps(table, protocol=protocol)
    for table in (np.zeros(SHAPE), {"q_table": np.ones(SHAPE), "epsilon": 0.1})
    for protocol in range(6)
]


def a_table(origins: int, outcomes: int) -> bytes:
    """An export of the first of so many coordinators, each with so many outcomes; without any it has no name."""
    rng = random.Random(origins)
    made = [QTable.fresh(load_prior().q0, 1, f"there-{number}") for number in range(origins)]
    for table in made:
        for _ in range(outcomes):
            key = StateKey(*(rng.randrange(size) for size in SHAPE[:4]))
            table.learn(key, rng.choice(ACTIONS), rng.uniform(-2, 2))
            table.last_seq += rng.randrange(1, 9)
    ours = made[0] if made else QTable.fresh(load_prior().q0, 1)
    for table in made[1:]:
        ours.take(table.origin, table.contributions()[table.origin])
    return json.dumps(snapshot.document(ours, Ledger(30.0, 0.1))).encode()


TABLES = [a_table(0, 0), a_table(1, 1), a_table(2, 5), a_table(5, 40)]
CONTRIBUTIONS = [json.dumps(json.loads(each)["contributions"]).encode() for each in TABLES]
TXT = [b"".join(b"%s=%s=" % (k.encode(), v.encode()) for k, v in {"id": "n-1", "name": "x", "cores": "4"}.items())]

PARSERS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "jobspec": (read_job, [JOB]),
    "token": (read_token, [new_token("ab" * 32).text.encode()]),
    "manifest": (read_manifest, [MANIFEST]),
    "documents": (read_documents, [MANIFEST, b'{"state": "DONE", "step": 3}']),
    "txt": (read_txt, TXT),
    "old table": (read_old_table, OLD_TABLES),
    "table": (read_table, TABLES),
    "contributions": (read_contributions, CONTRIBUTIONS),
    "worker frames": (read_frames, [pack(Frame({"kind": "task"}, b"body"))]),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [*PARSERS, "csv", "jsonl"])
def test_only_the_typed_error_escapes(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if name in PARSERS:
        read, seeds = PARSERS[name]
    else:
        read, seeds = table_reader(tmp_path, f"t.{name}"), [CSV if name == "csv" else JSONL]
    rng = random.Random(request.config.getoption("--fuzz-seed"))
    end = time.monotonic() + float(request.config.getoption("--fuzz-seconds"))
    tried = 0
    while time.monotonic() < end or tried < 20:
        content = damaged(rng, seeds)
        tried += 1
        try:
            read(content)
        except HiveError:
            continue
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__} escaped for {content!r}") from error

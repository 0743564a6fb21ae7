"""Parsers of what strangers send, fed with damaged and random bytes: they answer or raise HiveError, nothing else.

A failure prints the input; it then belongs into the parser's own tests as a case.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from coordinator.identify import parse
from node.channel import Frame, pack, receive_frame
from protos import announcement, artifact, documents, jobspec
from protos.capacity import Capacity
from protos.errors import HiveError
from protos.jobspec import DataSpec
from protos.plan import Plan
from protos.token import new_token, parse_token
from protos.work import Outcome, Task
from strategies.data import open_dataset


def torch_bytes() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a.weight": torch.zeros(4, 3), "n": 3}, buffer)
    return buffer.getvalue()


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


def read_model(content: bytes) -> None:
    parse.identify(io.BytesIO(content))


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


def damaged(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A seed with a few bytes changed, cut, doubled or mixed with another; now and then plain noise."""
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(0, 400))
    content = bytearray(rng.choice(seeds))
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(5):
            case 0:
                content[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del content[at : at + rng.randrange(1, 20)]
            case 2:
                content[at:at] = content[at : at + rng.randrange(1, 40)]
            case 3:
                content[at:at] = rng.choice(seeds)[: rng.randrange(1, 60)]
            case _:
                content[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"-1", b"1e999", b'"', b"[[[["))
    return bytes(content)


PICKLES = [pickle.dumps({"a": [1, 2, {"b": (3, None)}]}, protocol=protocol) for protocol in range(6)]
MODELS = [save({"w": torch.zeros(3, 2)}), torch_bytes(), *PICKLES]
TXT = [b"".join(b"%s=%s=" % (k.encode(), v.encode()) for k, v in {"id": "n-1", "name": "x", "cores": "4"}.items())]

PARSERS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "jobspec": (read_job, [JOB]),
    "token": (read_token, [new_token("ab" * 32).text.encode()]),
    "manifest": (read_manifest, [MANIFEST]),
    "documents": (read_documents, [MANIFEST, b'{"state": "DONE", "step": 3}']),
    "txt": (read_txt, TXT),
    "model file": (read_model, MODELS),
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

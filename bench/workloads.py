"""The fixed workloads: one description from which both the hive job and the peers' script read the same thing.

Owns sizes, so that figures of different days compare. The data are made here once per run, from scikit-learn's digits
and from the source of Python's standard library; models are those of examples/.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LEARNING_RATE = 1e-3
SEQUENCE = 64
TEXT_BYTES = 800_000


@dataclass(frozen=True, slots=True)
class Workload:
    """`batch` is the global one; `function` builds the model from `args` and lies in examples/FOLDER/model.py."""

    name: str
    folder: str
    function: str
    args: Mapping[str, Any]
    data: str  # digits | text
    batch: int
    steps: int

    def shortened(self, steps: int) -> Workload:
        return replace(self, steps=steps)


DIGITS_CNN = Workload("digits CNN", "digits", "cnn", {"channels": 16}, "digits", batch=64, steps=4000)
GPT_10M = Workload(
    "GPT 10 M",
    "textlm",
    "gpt",
    {"width": 320, "layers": 8, "heads": 5, "context": SEQUENCE},
    "text",
    batch=4,
    steps=25,
)


@dataclass(frozen=True, slots=True)
class Written:
    """Files of one workload: the job for hive, the same for a peer."""

    workload: Workload
    job: Path
    peer: Path


def write(workload: Workload, strategy: str, nodes: tuple[str, ...], root: Path) -> Written:
    """`strategy` and `nodes` are forced: a benchmark measures one decomposition, not the choice."""
    folder = root / f"{workload.data}-{strategy}-{workload.steps}"
    folder.mkdir(parents=True, exist_ok=True)
    code = (EXAMPLES / workload.folder / "model.py").read_text()
    (folder / "model.py").write_text(f"{code}\n\nsample = None  # nobody reads what a benchmark writes\n")
    source = _digits(folder) if workload.data == "digits" else _text(folder)
    data: dict[str, Any] = {"source": source.name}
    data |= {"features": "x", "target": "y"} if workload.data == "digits" else {"sequence_length": SEQUENCE}
    loss = "cross_entropy" if workload.data == "digits" else "causal_lm"
    job = {
        "name": f"bench-{workload.data}",
        "model": {"source": f"model.py:{workload.function}", "args": dict(workload.args)},
        "data": data,
        "train": {
            "loss": loss,
            "optimizer": {"name": "adamw", "lr": LEARNING_RATE},
            "batch_size": workload.batch,
            "steps": workload.steps,
            "seed": 0,
            "evaluate_every": "never",
        },
        "strategy": strategy,
        "nodes": {"min": len(nodes), "max": len(nodes), "require": {"names": list(nodes)}},
        "sync": {"compression": "none"},
    }
    peer = {
        "model": str(folder / "model.py"),
        "function": workload.function,
        "args": dict(workload.args),
        "data": str(source),
        "sequence": SEQUENCE,
        "batch": workload.batch,
        "steps": workload.steps,
        "learning_rate": LEARNING_RATE,
        "seed": 0,
    }
    written = Written(workload, folder / "job.yaml", folder / "peer.json")
    written.job.write_text(json.dumps(job, indent=1))  # JSON is YAML
    written.peer.write_text(json.dumps(peer, indent=1))
    return written


def _digits(folder: Path) -> Path:
    from sklearn.datasets import load_digits  # seconds to import: only where it is needed

    images, labels = load_digits(return_X_y=True)
    path = folder / "digits.npz"
    np.savez(path, x=(images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8), y=labels.astype(np.int64))
    return path


def _text(folder: Path) -> Path:
    """The first TEXT_BYTES of the standard library's top-level modules, in the order of their names."""
    content = bytearray()
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        content += source.read_bytes()
        if len(content) >= TEXT_BYTES:
            break
    path = folder / "source.txt"
    path.write_bytes(bytes(content[:TEXT_BYTES]))
    return path

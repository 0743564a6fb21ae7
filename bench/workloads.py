"""The fixed workloads: one description from which both the hive job and the peers' script read the same thing.

Owns sizes, so that figures of different days compare. The data are made here once per run, from scikit-learn's digits
and from the source of Python's standard library; models are those of examples/ and of this folder.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
LEARNING_RATE = 1e-3
SEQUENCE = 64
TEXT_BYTES = 800_000


@dataclass(frozen=True, slots=True)
class Workload:
    """`batch` is the global one; `function` builds the model from `args` and lies in FOLDER/model.py."""

    name: str
    folder: str
    function: str
    args: Mapping[str, Any]
    data: str  # digits (images) | rows (the same, flat) | text
    batch: int
    steps: int

    def shortened(self, steps: int) -> Workload:
        return replace(self, steps=steps)


DIGITS_CNN = Workload("digits CNN", "examples/digits", "cnn", {"channels": 16}, "digits", batch=64, steps=4000)
GPT_10M = Workload(
    "GPT 10 M",
    "examples/textlm",
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


Strategy = str | Mapping[str, Mapping[str, Any]]
"""As a job file names it: a name, or a name with its options."""


def write(workload: Workload, strategy: Strategy, nodes: tuple[str, ...], root: Path, label: str = "") -> Written:
    """`strategy` and `nodes` are forced: a benchmark measures one decomposition, not the choice.

    `label` ends the job's name and keeps the files of jobs apart that differ in what is not named here.
    """
    named = strategy if isinstance(strategy, str) else next(iter(strategy))
    parts = (workload.data, workload.function, named, str(workload.steps), *((label,) if label else ()))
    folder = root / "-".join(parts)
    folder.mkdir(parents=True, exist_ok=True)
    code = (ROOT / workload.folder / "model.py").read_text()
    (folder / "model.py").write_text(f"{code}\n\nsample = None  # nobody reads what a benchmark writes\n")
    text = workload.data == "text"
    source = _text(folder) if text else _digits(folder, flat=workload.data == "rows")
    data: dict[str, Any] = {"source": source.name}
    data |= {"sequence_length": SEQUENCE} if text else {"features": "x", "target": "y"}
    loss = "causal_lm" if text else "cross_entropy"
    job = {
        "name": "-".join(("bench", workload.data, *((label,) if label else ()))),
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


def _digits(folder: Path, flat: bool) -> Path:
    from sklearn.datasets import load_digits  # seconds to import: only where it is needed

    images, labels = load_digits(return_X_y=True)
    path = folder / "digits.npz"
    pixels = (images / 16.0).astype(np.float32).reshape(-1, *((64,) if flat else (1, 8, 8)))
    np.savez(path, x=pixels, y=labels.astype(np.int64))
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

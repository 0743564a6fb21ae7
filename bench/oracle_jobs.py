"""The jobs of the oracle: seven models on three networks, short enough to run every strategy of each three times, long
enough that starting is little of it.

Sizes are fixed, so that figures of different days compare. Each job has rows to be validated on that it does not train
on; time counts from the submission until the job has ended with its validation loss where it should be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.strategy_jobs import CNN, GPT_MEDIUM, GPT_SMALL, LSTM, MLP
from bench.workloads import SEQUENCE, Strategy, Workload, write

NODES = ("n1", "n2", "n3", "n4")
CPUS: Mapping[str, float] = {"n1": 0.5, "n2": 0.35, "n3": 0.35, "n4": 0.25}  # half a core is left for all else
FAST, MIDDLE, SLOW = "1gbit", "100mbit", "20mbit"
NETWORKS: Mapping[str, tuple[str, ...]] = {
    "1 Gbit/s": (FAST,) * 4,
    "100 Mbit/s": (MIDDLE,) * 4,
    "1 Gbit/s, one machine at 20 Mbit/s": (FAST, FAST, SLOW, FAST),
}
GPT_WIDE = {"width": 512, "layers": 4, "heads": 8, "context": SEQUENCE}
MODELS: tuple[Workload, ...] = (
    replace(MLP, batch=64, steps=1400),
    replace(MLP, name="MLP 2.2 M", args={"hidden": 1400}, batch=256, steps=110),
    replace(CNN, batch=512, steps=220),
    replace(CNN, name="CNN of 32 channels", args={"channels": 32}, batch=256, steps=150),
    replace(GPT_SMALL, steps=60),
    replace(GPT_MEDIUM, name="GPT 13 M", args=GPT_WIDE, batch=4, steps=40),
    replace(LSTM, batch=64, steps=60),
)
STRATEGIES = ("single_node", "data_parallel", "pipeline_parallel", "model_parallel")
VALIDATION_ROWS = 297
VALIDATION_BYTES = 6_000


@dataclass(frozen=True, slots=True)
class OracleJob:
    network: str
    model: Workload

    @property
    def name(self) -> str:
        return f"{self.network}, {self.model.name}"


def file_of(model: Workload, strategy: Strategy, root: Path) -> Path:
    """The job file: as benchmarks write theirs, with data to validate on and free to take any of the nodes."""
    label = "".join(letter if letter.isalnum() else "-" for letter in model.name)
    written = write(model, strategy, NODES, root, label)
    job = json.loads(written.job.read_text())
    folder = written.job.parent
    job["data"] |= _divided_text(folder) if model.data == "text" else _divided_rows(folder)
    job["train"]["evaluate_every"] = "end"
    job["nodes"] = {"min": 1, "max": len(NODES)}
    del job["sync"]
    written.job.write_text(json.dumps(job, indent=1))
    return written.job


def _divided_rows(folder: Path) -> dict[str, str]:
    with np.load(folder / "digits.npz") as loaded:
        x, y = loaded["x"], loaded["y"]
    np.savez(folder / "train.npz", x=x[:-VALIDATION_ROWS], y=y[:-VALIDATION_ROWS])
    np.savez(folder / "test.npz", x=x[-VALIDATION_ROWS:], y=y[-VALIDATION_ROWS:])
    return {"source": "train.npz", "test": "test.npz"}


def _divided_text(folder: Path) -> dict[str, str]:
    content = (folder / "source.txt").read_bytes()
    (folder / "train.txt").write_bytes(content[:-VALIDATION_BYTES])
    (folder / "test.txt").write_bytes(content[-VALIDATION_BYTES:])
    return {"source": "train.txt", "test": "test.txt"}

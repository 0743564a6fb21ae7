"""The frozen prior Q0: what the cost model says of an average job of each cell, before any job has run.

The numbers are data, `prior.json` beside this file, made by `python -m bench.build_prior` from the cost model over
random clusters and jobs with a fixed seed. This file only reads and checks them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from qtable.reward import LIMIT
from qtable.snapshot import checksum
from qtable.state import ACTIONS, BINS, SHAPE
from qtable.table import Array, QTable

SCHEMA = "hive/qtable-prior/v1"


@dataclass(frozen=True, slots=True)
class Prior:
    q0: Array
    cost_model_version: int

    def table(self, origin: str = "") -> QTable:
        """A table that has learned nothing yet; `origin`: whose it is."""
        return QTable.fresh(self.q0, self.cost_model_version, origin)


def prior_document(q0: Array, cost_model_version: int, seed: int, worlds: int) -> dict[str, Any]:
    """What the generator writes: `worlds` random clusters and jobs per cell."""
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "bins": {name: list(edges) for name, edges in BINS.items()},
        "actions": list(ACTIONS),
        "shape": list(SHAPE),
        "cost_model_version": cost_model_version,
        "seed": seed,
        "worlds": worlds,
        "Q0": [round(value, 4) for value in q0.ravel().tolist()],
    }
    return body | {"sha256": checksum(body)}


def parse_prior(text: str) -> Prior:
    """Raises ValueError when the document is damaged or of other bins."""
    body = json.loads(text)
    if body.get("schema") != SCHEMA or body.get("sha256") != checksum(body):
        raise ValueError("the packaged prior is damaged: reinstall, or run python -m bench.build_prior")
    if body["actions"] != list(ACTIONS) or body["bins"] != {name: list(edges) for name, edges in BINS.items()}:
        raise ValueError("the packaged prior was made for other bins: run python -m bench.build_prior")
    q0 = np.array(body["Q0"], dtype=np.float64).reshape(SHAPE)
    if not (np.abs(q0) <= LIMIT).all():
        raise ValueError(f"the packaged prior holds values beyond {LIMIT}")
    return Prior(q0, int(body["cost_model_version"]))


@cache
def load_prior() -> Prior:
    return parse_prior(resources.files("qtable").joinpath("prior.json").read_text(encoding="utf-8"))

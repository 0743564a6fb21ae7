"""The two sides of a comparison get the same model, data, batch, steps and optimizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.workloads import DIGITS_CNN, GPT_10M, Workload, write
from coordinator.bundle import bundle
from coordinator.jobfile import read_job


@pytest.mark.parametrize("workload", [DIGITS_CNN, GPT_10M], ids=lambda workload: workload.data)
def test_job_and_peer_are_the_same_work(workload: Workload, tmp_path: Path) -> None:
    written = write(workload, "data_parallel", ("n0", "n1"), tmp_path)
    spec, peer = read_job(written.job), json.loads(written.peer.read_text())
    assert (spec.train.batch_size, spec.train.steps, spec.train.seed) == (peer["batch"], peer["steps"], peer["seed"])
    assert spec.train.optimizer.lr == peer["learning_rate"]
    assert spec.model.source == f"{Path(peer['model']).name}:{peer['function']}"
    assert spec.model.args == peer["args"]
    assert (written.job.parent / spec.data.source).samefile(peer["data"])
    assert (spec.strategy, spec.nodes.min, spec.nodes.require.names) == ("data_parallel", 2, ["n0", "n1"])


def test_a_workload_can_be_submitted(tmp_path: Path) -> None:
    written = write(GPT_10M, "single_node", ("n0",), tmp_path)
    made = bundle(read_job(written.job), written.job.parent)
    assert made.data is not None and made.code is not None

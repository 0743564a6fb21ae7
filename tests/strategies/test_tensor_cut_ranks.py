"""What identification says of a tensor-parallel run beside what real ranks send: the same bytes. Tensors are large
enough that the headers of messages are nothing beside them; every batch is a whole one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from cut_model_harness import Case, CutGroup
from engine_harness import Job, RecordingChannel
from engine_jobs import gpt_job, mlp_job

from protos.model import ModelProfile, TensorCut
from protos.plan import Layout
from strategies.context import TaskContext
from strategies.profile_torch import describe
from strategies.tensor_estimate import sent_bytes
from strategies.train_loop_torch import open_data

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]  # the first test waits for all ranks

STEPS = 3
MLP = """from torch import nn

def build(**_):
    return nn.Sequential(nn.Linear(8, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 4))
"""
BERT = """import torch
from torch import nn
from torch.nn import functional


class SelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (
            f(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape)


class Output(nn.Module):
    def __init__(self, inner, width):
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x, before):
        return self.norm(self.dense(x) + before)


class Intermediate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dense = nn.Linear(width, 4 * width)

    def forward(self, x):
        return functional.gelu(self.dense(x))


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention, self.mixed = SelfAttention(width, heads), Output(width, width)
        self.intermediate, self.output = Intermediate(width), Output(4 * width, width)

    def forward(self, x):
        x = self.mixed(self.attention(x), x)
        return self.output(self.intermediate(x), x)


class Bert(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.words = nn.Embedding(96, width, padding_idx=0)
        self.places = nn.Embedding(12, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(2))
        self.head = nn.Linear(width, 32)

    def forward(self, tokens):
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build(**_):
    return Bert(64, 4)
"""


def jobs(folder: Path) -> dict[str, Job]:
    gpt = gpt_job(folder / "gpt", steps=STEPS, batch_size=120)
    bert = gpt_job(folder / "bert", steps=STEPS, batch_size=120)
    return {
        "mlp": mlp_job(folder / "mlp", rows=256, steps=STEPS, batch_size=256, code={"model.py": MLP}),
        "gpt": Job(gpt.folder, gpt.document | {"model": {"source": "model.py:build", "args": {"width": 64}}}, gpt.code,
                   gpt.data),
        "bert": Job(bert.folder, bert.document, {"model.py": BERT}, bert.data),
    }  # fmt: skip


def identified(job: Job) -> ModelProfile:
    asking = Job(
        job.folder, job.document | {"strategy": {"model_parallel": {"kind": "tensor"}}}, job.code, job.data, job.test
    )
    context = TaskContext(asking.task(), asking.workspace("profile"), RecordingChannel(), "", 1, "cpu", "n")
    train, test = open_data(context)
    return describe(context, train, test).profile


def cut_of(profile: ModelProfile, ranks: int) -> TensorCut:
    (cut,) = (each for each in profile.tensor_cuts if each.ranks == ranks)
    return cut


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, tuple[CutGroup, dict[str, Job]]]]:
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    found = {}
    for ranks in (2, 4):
        folder = tmp_path_factory.mktemp(f"cut{ranks}")
        made = jobs(folder)
        layout = Layout(((0, 1),), tensor=ranks)
        cases = [
            Case(name, job, (job.batch,), STEPS, (2,) * ranks if name == "gpt" else (), layout)
            for name, job in made.items()
        ]
        group = CutGroup(folder / "group", store.port, ranks, cases)
        try:
            group.wait()
        finally:
            group.end()
        found[ranks] = (group, made)
    yield found


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["mlp", "gpt", "bert"])
def test_ranks_send_what_identification_says_of_their_plan(groups: Any, name: str, ranks: int) -> None:
    group, made = groups[ranks]
    profile = identified(made[name])
    sent = sent_bytes(profile, cut_of(profile, ranks), made[name].batch, gpu=False)
    for rank in range(ranks):
        found = group.found(name, rank)
        assert "error" not in found, found
        assert found["sent_by_kernel_bytes"] / STEPS == pytest.approx(sent, rel=0.02)


def test_layers_of_different_modules_are_paired(tmp_path: Path) -> None:
    """Two layers, each with a pair around its heads and one in its feed-forward: for each pair a sum forward and one
    backward. The tables are small or have a row for padding, the head is small."""
    cut = cut_of(identified(jobs(tmp_path)["bert"]), 2)
    assert (cut.layers, cut.sums, cut.gathers) == (2 * 6, 2 * 2 * 2, 0)


def test_heads_that_cannot_be_shared_out_evenly_are_not_paired(tmp_path: Path) -> None:
    """Four heads among eight ranks: each projection is gathered, and the feed-forward is still a pair."""
    job = jobs(tmp_path)["bert"]
    cut = cut_of(identified(job), 8)
    assert (cut.layers, cut.gathers, cut.sums) == (2 * 6, 2 * 4, 2 * 2 + 2 * 4)

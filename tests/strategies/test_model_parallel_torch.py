"""Ranks that cut a model among them, in real processes over gloo, against plain torch in this one: parameters sharded
(FSDP2) and single layers cut (tensor parallel)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from cut_model_harness import Case, CutGroup, whole_state
from engine_harness import ROOT, Job
from engine_jobs import GPT, gpt_job, mlp_job
from torch import nn
from torch.nn import functional

from protos.errors import SpecError
from protos.plan import Layout
from strategies import checkpoint_torch
from strategies.batches_torch import bounds_of
from strategies.data.dataset import epoch_order
from strategies.data.opening import open_splits
from strategies.extent import Extent
from strategies.held_parts_torch import chunk_of
from strategies.hollow_model_torch import build_hollow, named_tensors
from strategies.initial_values_torch import initial_parts
from strategies.model_torch import build
from strategies.optimizer_torch import build_optimizer, learning_rate
from strategies.sample_order import slice_of
from strategies.shard_turns_torch import Turns
from strategies.shard_units_torch import units_of
from strategies.tensor_plan_torch import Pair, derive

pytestmark = pytest.mark.timeout(300)  # the first test waits for all ranks

SHARDED = Layout(((0, 1),), sharded=True)
RECOMPUTED = Layout(((0, 1),), sharded=True, checkpoint_activations=True)
TENSOR = Layout(((0, 1),), tensor=2)
TENSOR_RECOMPUTED = Layout(((0, 1),), tensor=2, checkpoint_activations=True)

SEPARATE = GPT.replace(
    "self.qkv = torch.nn.Linear(width, 3 * width, bias=False)",
    "self.q = torch.nn.Linear(width, width)\n"
    "        self.k = torch.nn.Linear(width, width, bias=False)\n"
    "        self.v = torch.nn.Linear(width, width)",
).replace(
    "q, k, v = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)",
    "n = self.norm1(x)\n"
    "        q, k, v = (f(n).view(rows, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))",
)
CNN = """from torch import nn

def build(**_):
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU(),
        nn.Conv1d(6, 5, 3), nn.BatchNorm1d(5, momentum=0.3), nn.ReLU(), nn.Flatten(), nn.Linear(30, 4))
"""
LSTM = """from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 7, num_layers=2, batch_first=True)
        self.head = nn.Linear(7, 4)

    def forward(self, x):
        return self.head(self.lstm(x.view(len(x), 4, 2))[0][:, -1])

def build(**_):
    return Net()
"""
ODD = """import torch
from torch import nn
from torch.nn import functional

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8), persistent=False)
        self.shift = torch.full((8,), 0.1)
        self.outside = nn.Linear(8, 12)
        self.inside = nn.Linear(12, 4)
        self.one = nn.Parameter(torch.ones(1, 4))

    def forward(self, x):
        x = torch.tanh(self.frozen(x) * self.scale + self.shift)
        x = functional.linear(x, self.outside.weight, self.outside.bias)
        return self.inside(torch.relu(x)) * self.one / self.temperature

def build(**_):
    return Net()
"""
DEEP = """from torch import nn

def build(**_):
    return nn.Sequential(nn.Linear(8, 1024), *(nn.Linear(1024, 1024) for _ in range(24)), nn.Linear(1024, 4))
"""
PAIRS = """from torch import nn

def build(dropout=0.0, **_):
    return nn.Sequential(
        nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8), nn.LayerNorm(8), nn.BatchNorm1d(8),
        nn.Linear(8, 4))
"""
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}


def textlm_job(folder: Path) -> Job:
    job = gpt_job(folder, steps=10)
    model = {"source": "model.py:gpt", "args": {"width": 16, "layers": 2, "heads": 2, "context": 12}}
    source = (ROOT / "examples" / "textlm" / "model.py").read_text()
    return Job(folder, {**job.document, "model": model}, {"model.py": source}, job.data)


def separate_job(folder: Path, **train: Any) -> Job:
    job = gpt_job(folder, steps=10, **train)
    return Job(folder, job.document, {"model.py": SEPARATE}, job.data)


def coded(folder: Path, code: str, **values: Any) -> Job:
    return mlp_job(folder, steps=10, code={"model.py": code}, **values)


def reference(case: Case) -> tuple[list[float], nn.Module]:
    """Plain torch: (loss of each step, model). Every piece of every rank is a forward pass of its own, which matters
    for batch norms only; their running statistics are averaged, weighted by the items of the ranks."""
    spec, train = case.job.spec, case.job.spec.train
    model = build(spec.model, case.job.folder / "code", None, train.seed)
    optimizer = build_optimizer(train.optimizer, model)
    data = open_splits(spec.data, case.job.data, case.job.folder / "code", test_path=case.job.test, loss=train.loss)
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    per_epoch, total = -(-data.train.rows // train.batch_size), train.steps or 0
    losses = []
    for step in range(case.first + case.steps):
        epoch, position = divmod(step, per_epoch)
        rows = epoch_order(data.train, train.seed, epoch, train.shuffle).batch(position, train.batch_size)
        batch = data.train.batch(rows)
        x, y = torch.from_numpy(batch.features), torch.from_numpy(batch.target)  # type: ignore[arg-type]
        before = [buffer.clone() for buffer in statistics]
        after = [torch.zeros_like(buffer) for buffer in statistics]
        items, mean = int((y != -100).sum()), 0.0
        optimizer.zero_grad()
        for rank in range(len(case.samples)):
            start, stop = slice_of(len(rows), case.samples, rank)
            for buffer, value in zip(statistics, before, strict=True):
                buffer.copy_(value)
            bounds = bounds_of(start, stop, case.accumulate[rank] if case.accumulate else 1)
            for first, last in pairwise(bounds) if stop > start else ():
                output = model(x[first:last])
                target = y[first:last].flatten()
                loss = functional.cross_entropy(output.flatten(0, -2), target, reduction="sum") / items
                loss.backward()
                mean += loss.item()
            share = int((y[start:stop] != -100).sum()) / items
            for buffer, summed in zip(statistics, after, strict=True):
                summed += buffer * share
        for buffer, summed in zip(statistics, after, strict=True):
            buffer.copy_(summed)
        if train.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train.schedule, train.optimizer.lr, step, total)
        optimizer.step()
        losses.append(mean)
    return losses, model


def assert_equal_to_plain_torch(group: CutGroup, case: Case) -> None:
    """Losses of every step on every rank, and the model that rank 0 wrote."""
    losses, model = reference(case)
    for rank in range(group.ranks):
        found = group.found(case.name, rank)
        assert "error" not in found, found
        assert np.allclose(found["losses"], losses[case.first :], atol=1e-5, rtol=0)
    written = group.model(case.name)
    expected = model.state_dict()
    model.load_state_dict(written)  # every name, tied ones too
    for name, tensor in expected.items():
        if "num_batches" not in name:
            assert torch.allclose(written[name], tensor, atol=1e-4), name


class Groups:
    """All cases of the module: a group of two ranks, then one of three that goes on from what the first left."""

    def __init__(self, folder: Path) -> None:
        tied = gpt_job(folder / "tied", steps=10)
        half = separate_job(folder / "half")
        mlp = mlp_job(folder / "mlp", steps=10, test_rows=50)
        pairs = coded(folder / "pairs", PAIRS, test_rows=50)
        two = [
            Case("deep", coded(folder / "deep", DEEP, optimizer=SGD, clip_norm=None), (20, 12), 2),
            Case("mlp", mlp, (20, 12), 10, (2, 1)),
            Case("sgd", mlp_job(folder / "sgd", steps=10, optimizer=SGD), (13, 19), 10),
            Case("cnn", coded(folder / "cnn", CNN), (20, 12), 10, (3, 1)),
            Case("recomputed", coded(folder / "recomputed", CNN), (20, 12), 4, (3, 1), RECOMPUTED),
            Case("empty", mlp_job(folder / "empty", steps=10, norm=True), (0, 32), 10),
            Case("lstm", coded(folder / "lstm", LSTM), (20, 12), 10),
            Case("odd", coded(folder / "odd", ODD), (20, 12), 10, (1, 2)),
            Case("textlm", textlm_job(folder / "textlm"), (17, 7), 10, (3, 2)),
            Case("tied", tied, (17, 7), 10, (3, 2)),
            Case("half", half, (17, 7), 5),
            Case("bf16", mlp_job(folder / "bf16", steps=10, precision="bf16"), (20, 12), 4),
            Case("tensor-half", half, (24,), 5, layout=TENSOR, resume=folder / "two" / "half" / "checkpoint", first=5),
            Case("tensor-pairs", pairs, (32,), 10, (2, 2), TENSOR),
            Case("tensor-textlm", textlm_job(folder / "tensor-textlm"), (24,), 10, layout=TENSOR),
            Case("tensor-tied", tied, (24,), 10, (2, 2), TENSOR),
            Case("tensor-recomputed", separate_job(folder / "tensor-recomputed"), (24,), 4, (2, 2), TENSOR_RECOMPUTED),
            Case("tensor-bf16", separate_job(folder / "tensor-bf16", precision="bf16"), (24,), 4, layout=TENSOR),
            Case("tensor-dropout", coded(folder / "dropout", PAIRS, dropout=0.5), (32,), 4, layout=TENSOR),
            Case("tensor-dies", half, (24,), 5, layout=TENSOR, end="die"),
        ]
        three = [
            Case("half", half, (9, 5, 10), 5, resume=folder / "two" / "half" / "checkpoint", first=5),
            Case("uneven", mlp, (5, 0, 27), 10, (1, 1, 4)),
            Case("tied", tied, (3, 14, 7), 10),
            Case("dies", half, (8, 8, 8), 5, end="die"),
        ]
        self.cases = {("two", case.name): case for case in two} | {("three", case.name): case for case in three}
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self.groups: dict[str, CutGroup] = {}
        for name, ranks, cases in (("two", 2, two), ("three", 3, three)):
            self.groups[name] = CutGroup(folder / name, store.port, ranks, cases)
            try:
                self.groups[name].wait()
            finally:
                self.groups[name].end()


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Groups]:
    yield Groups(tmp_path_factory.mktemp("cut"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("two", "mlp"),
        ("two", "sgd"),
        ("two", "cnn"),
        ("two", "recomputed"),
        ("two", "empty"),
        ("two", "lstm"),
        ("two", "odd"),
        ("two", "textlm"),
        ("two", "tied"),
        ("three", "uneven"),
        ("three", "tied"),
        ("two", "tensor-pairs"),
        ("two", "tensor-textlm"),
        ("two", "tensor-tied"),
        ("two", "tensor-recomputed"),
    ],
)
def test_a_model_cut_over_ranks_learns_what_plain_torch_does(groups: Groups, group: str, name: str) -> None:
    assert_equal_to_plain_torch(groups.groups[group], groups.cases[group, name])


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), [("three", "half"), ("two", "tensor-half")])
def test_a_checkpoint_of_two_shards_is_gone_on_from_by_another_cut(groups: Groups, group: str, name: str) -> None:
    assert_equal_to_plain_torch(groups.groups[group], groups.cases[group, name])


@pytest.mark.slow
def test_half_precision_stays_close(groups: Groups) -> None:
    for name in ("bf16", "tensor-bf16"):
        losses, _ = reference(groups.cases["two", name])
        found = groups.groups["two"].found(name)
        assert "error" not in found, found
        assert np.allclose(found["losses"], losses, atol=0.03)
        assert not np.allclose(found["losses"], losses, atol=1e-7)  # it was half precision


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), [("two", "mlp"), ("three", "uneven"), ("two", "tensor-pairs")])
def test_the_test_split_is_scored_as_on_one_machine(groups: Groups, group: str, name: str) -> None:
    case = groups.cases[group, name]
    _, model = reference(case)
    assert case.job.test is not None
    with np.load(case.job.test) as arrays:
        x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    output = model.eval()(x)
    expected = [functional.cross_entropy(output, y).item(), (output.argmax(1) == y).float().mean().item()]
    for rank in range(groups.groups[group].ranks):
        assert groups.groups[group].found(name, rank)["score"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_no_rank_ever_holds_the_whole_model(groups: Groups) -> None:
    case = groups.cases["two", "deep"]
    whole = sum(4 * each.numel() for each in build(case.job.spec.model, case.job.folder / "code", None, 0).parameters())
    for rank in (0, 1):
        found = groups.groups["two"].found("deep", rank)
        assert found["parameter_bytes"] <= whole / 2 + 4 * 1024
        # half of weights, gradients and momentum; a few layers of 4 MiB are whole at a time, and 32 MiB are code
        assert found["built_bytes"] < 0.5 * whole + 40 * 1024**2, found["built_bytes"] / whole
        assert found["grown_bytes"] < 1.5 * whole + 56 * 1024**2, found["grown_bytes"] / whole


@pytest.mark.slow
def test_what_was_sent_is_counted(groups: Groups) -> None:
    for name in ("deep", "tensor-tied"):
        found = groups.groups["two"].found(name)
        assert found["sent_bytes"] == pytest.approx(found["sent_by_kernel_bytes"], rel=0.02)


@pytest.mark.slow
def test_dropout_is_drawn_alike_where_layers_are_cut(groups: Groups) -> None:
    group, case = groups.groups["two"], groups.cases["two", "tensor-dropout"]
    losses = [group.found(case.name, rank)["losses"] for rank in (0, 1)]
    assert losses[0] == losses[1]
    assert not np.allclose(losses[0], reference(groups.cases["two", "tensor-pairs"])[0][:4], atol=1e-3)
    digest = checkpoint_torch.spec_digest(case.job.spec)
    parts = [
        checkpoint_torch.load(each.folder) for each in checkpoint_torch.stored(group.checkpoint(case.name), digest)[0]
    ]
    common = [name for name in parts[0].model if name not in parts[0].extents]
    assert common
    assert all(torch.equal(parts[0].model[name], parts[1].model[name]) for name in common)


@pytest.mark.slow
def test_parts_of_a_checkpoint_are_boxes_of_the_whole(groups: Groups) -> None:
    group, case = groups.groups["two"], groups.cases["two", "tied"]
    state = whole_state(group.checkpoint("tied"), checkpoint_torch.spec_digest(case.job.spec))
    written = group.model("tied")
    assert state.aliases == {"head.weight": "tokens.weight"}
    assert all(torch.equal(tensor, written[name]) for name, tensor in state.model.items())
    assert state.optimizer["tokens.weight/exp_avg"].shape == written["tokens.weight"].shape
    assert float(state.optimizer["tokens.weight/step"]) == 10


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), [("three", "dies"), ("two", "tensor-dies")])
def test_a_peer_that_dies_is_a_peer_lost(groups: Groups, group: str, name: str) -> None:
    for rank in range(groups.groups[group].ranks - 1):
        assert groups.groups[group].found(name, rank)["error"] == "PeerLost"


def test_the_blocks_of_a_stack_are_gathered_one_at_a_time(tmp_path: Path) -> None:
    job = textlm_job(tmp_path)
    model = build_hollow(job.spec.model, tmp_path / "code", None, 0)
    units = units_of(model, torch.zeros(2, 12, dtype=torch.int64))
    names = {id(module): name for name, module in model.named_modules()}
    assert [names[id(unit)] for unit in units] == ["token", "position", "blocks.0", "blocks.1", "head"]
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_module_whose_weights_are_used_elsewhere_is_no_unit(tmp_path: Path) -> None:
    tied = gpt_job(tmp_path / "tied")
    model = build_hollow(tied.spec.model, tmp_path / "tied" / "code", None, 0)
    names = {id(module): name for name, module in model.named_modules()}
    units = [names[id(unit)] for unit in units_of(model, torch.zeros(2, 12, dtype=torch.int64))]
    assert units == ["places", "blocks.0", "blocks.1"]
    odd = coded(tmp_path / "odd", ODD)
    model = build_hollow(odd.spec.model, tmp_path / "odd" / "code", None, 0)
    names = {id(module): name for name, module in model.named_modules()}
    assert [names[id(unit)] for unit in units_of(model, torch.zeros(2, 8))] == ["frozen", "inside"]


def test_a_hollow_model_keeps_ties_buffers_and_plain_tensors(tmp_path: Path) -> None:
    tied = gpt_job(tmp_path / "tied")
    named = named_tensors(build_hollow(tied.spec.model, tmp_path / "tied" / "code", None, 0))
    assert named.aliases == {"head.weight": "tokens.weight"}
    odd = coded(tmp_path / "odd", ODD)
    model: Any = build_hollow(odd.spec.model, tmp_path / "odd" / "code", None, 0)
    assert torch.equal(model.scale, torch.linspace(0.5, 1.5, 8))
    assert torch.equal(model.shift, torch.full((8,), 0.1))
    assert not model.frozen.weight.requires_grad
    assert "scale" not in named_tensors(model).tensors


def test_a_model_that_reads_its_weights_while_it_is_built_is_refused(tmp_path: Path) -> None:
    code = """from torch import nn

def build(**_):
    m = nn.Linear(8, 4)
    m.bound = float(m.weight.max())
    return m
"""
    job = coded(tmp_path, code)
    with pytest.raises(SpecError, match=r"cannot be built without memory"):
        build_hollow(job.spec.model, tmp_path / "code", None, 0)


@pytest.mark.parametrize("given", [False, True])
def test_a_rank_starts_with_its_boxes_of_the_initial_values(tmp_path: Path, given: bool) -> None:
    job = gpt_job(tmp_path)
    workspace = job.workspace("one")
    expected = build(job.spec.model, workspace.code_dir, None, job.spec.train.seed)
    if given:
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter.add_(1.0)
        weights = {name: tensor for name, tensor in expected.state_dict().items() if name != "head.weight"}
        safetensors.torch.save_file(weights, tmp_path / "start.safetensors")
        workspace = replace(workspace, weights_path=tmp_path / "start.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(expected).tensors.items()}
    boxes = {name: chunk_of(shape, len(shape) - 1, 2, 3) for name, shape in shapes.items()}
    parts = initial_parts(job.spec, workspace, boxes)
    for name, box in boxes.items():
        whole = expected.state_dict()[name]
        assert torch.equal(parts[name], whole[box.inside(Extent.whole(box.shape))])
    assert parts["tokens.weight"].shape == (32, 4)


def test_parts_cover_a_dimension_as_torch_chunks_it() -> None:
    for length, ranks in ((10, 3), (3, 4), (8, 2), (1, 3)):
        sizes = [chunk_of((2, length), 1, rank, ranks).size[1] for rank in range(ranks)]
        chunks = [chunk.shape[1] for chunk in torch.zeros(2, length).chunk(ranks, 1)]
        assert sizes == chunks + [0] * (ranks - len(chunks))


def test_a_plan_pairs_columns_with_rows(tmp_path: Path) -> None:
    job = separate_job(tmp_path)
    plan = derive(build_hollow(job.spec.model, tmp_path / "code", None, 0), 2)
    assert Pair(("blocks.0.q", "blocks.0.k", "blocks.0.v"), "blocks.0.out") in plan.pairs
    assert Pair(("blocks.1.mlp.0",), "blocks.1.mlp.2") in plan.pairs
    assert plan.dimensions()["blocks.0.out.weight"] == 1
    assert plan.dimensions()["tokens.weight"] == plan.dimensions()["head.weight"] == 0


def test_query_key_and_value_in_one_matrix_are_not_paired_by_head(tmp_path: Path) -> None:
    job = gpt_job(tmp_path)
    plan = derive(build_hollow(job.spec.model, tmp_path / "code", None, 0), 2)
    assert plan.pairs == (Pair(("blocks.0.mlp.0",), "blocks.0.mlp.2"), Pair(("blocks.1.mlp.0",), "blocks.1.mlp.2"))
    assert "blocks.0.qkv" in plan.gathered


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 24)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.back = nn.Linear(8, 8)


def test_gated_layers_and_narrow_keys_are_found_by_shape() -> None:
    plan = derive(Gated(), 2)
    assert set(plan.pairs) == {Pair(("w1", "w3"), "w2"), Pair(("query", "key", "value"), "back")}


def test_a_model_without_anything_to_cut_says_what_was_looked_at() -> None:
    with pytest.raises(SpecError, match=r"no layer .* over 2 ranks; looked at: 1.out_proj \(its weights"):
        derive(nn.Sequential(nn.Conv1d(2, 8, 3), nn.MultiheadAttention(8, 2)), 2)


def test_all_ranks_make_the_passes_of_the_one_with_the_most() -> None:
    turns = Turns((0, 5, 27), (1, 1, 4))
    assert turns.of_step(32) == 4
    assert turns.of_step(3) == 3  # fewer rows than micro-batches
    assert turns.rows_at_once(0) == 1
    assert turns.of_evaluation(64) == 9  # 54 rows, six at a time

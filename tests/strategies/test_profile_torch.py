"""Identification of the user's model and data in a worker: exact counts, and errors that are the user's to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos import documents
from protos.ids import Fence, JobId
from protos.jobspec import parse
from protos.model import Complexity, Family, LayerProfile
from protos.plan import Identification
from protos.states import AttemptState, Reason, StopMode
from protos.work import Outcome, Progress, Task, TaskKind
from strategies.context import KeyValueStore, TaskContext, Workspace
from strategies.profile_torch import condensed, identify


@dataclass
class QuietChannel:
    """A channel for tasks that say nothing until they end."""

    stop: StopMode | None = None
    said: list[object] = field(default_factory=list)

    @property
    def store(self) -> KeyValueStore:
        raise AssertionError("no rendezvous in this task")

    def ready(self) -> None:
        self.said.append("ready")

    def progress(self, progress: Progress) -> None:
        self.said.append(progress)

    def checkpoint(self, folder: Path, step: int, samples: int) -> None:
        self.said.append(folder)

    def uploading(self) -> bool:
        return False

    def leave(self, outcome: Outcome) -> None:
        raise AssertionError("there are no others to wait for")

    def artifact(self, name: str, path: Path) -> None:
        self.said.append(name)

    def stop_requested(self) -> StopMode | None:
        return self.stop

    def on_stop(self, callback: Callable[[StopMode], None]) -> None:
        self.said.append(callback)


HEADER = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n"


@dataclass
class Job:
    folder: Path
    code: str
    shape: Sequence[int] = (8,)
    rows: int = 40
    token_ids: bool = False
    target: np.ndarray[Any, Any] | None = None
    train: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    strategy: str = "auto"

    def run(self) -> Outcome:
        code_dir = self.folder / "code"
        code_dir.mkdir()
        name = f"model_{abs(hash(self.code)) % 10**9}.py"
        (code_dir / name).write_text(HEADER + self.code)
        values = np.zeros((self.rows, *self.shape), dtype=np.int64 if self.token_ids else np.float32)
        target = self.target if self.target is not None else np.arange(self.rows, dtype=np.int64) % 4
        np.savez(self.folder / "train.npz", x=values, y=target)
        spec = parse(
            {
                "model": {"source": f"{name}:build", "args": self.args},
                "data": {"source": "train.npz", "features": "x", "target": "y", "test_fraction": 0.25},
                "train": {"batch_size": 16, **self.train},
                "strategy": self.strategy,
            }
        )
        task = Task(TaskKind.IDENTIFY, JobId("j"), Fence(1), 0, 1, "", spec, (16,))
        workspace = Workspace(code_dir, self.folder / "train.npz", None, None, self.folder, self.folder)
        return identify(TaskContext(task, workspace, QuietChannel(), "", 1, "cpu", "n"))

    def identified(self) -> Identification:
        outcome = self.run()
        assert outcome.state is AttemptState.DONE, outcome.fault
        return documents.decode(Identification, outcome.document)


def by_name(found: Identification) -> dict[str, Any]:
    return {layer.name: layer for layer in found.profile.layers}


def test_mlp_is_exact(tmp_path: Path) -> None:
    code = "def build(hidden): return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 4))"
    found = Job(tmp_path, code, args={"hidden": 32}).identified()
    profile = found.profile
    assert profile.parameters == 8 * 32 + 32 + 32 * 4 + 4
    assert profile.bytes == 4 * profile.parameters
    assert (profile.family, profile.task, profile.complexity) == (Family.MLP, "classification", Complexity.SMALL)
    assert profile.input_shape == (8,)
    assert profile.dtypes == ("F32",)
    assert profile.trainable
    layers = by_name(found)
    assert layers["0"].flops_per_sample == 2 * 8 * 32
    assert layers["2"].flops_per_sample == 2 * 32 * 4
    assert (layers["0"].output_shape, layers["0"].output_bytes_per_sample) == ((32,), 128)
    # saved for backward: the input of the first layer, the output of ReLU (shared with the second layer)
    assert profile.activation_bytes_per_sample == 4 * (8 + 32)
    # the loss keeps the four log-probabilities and the label
    assert profile.peak_activation_bytes_per_sample == profile.activation_bytes_per_sample + 4 * 4 + 8
    assert (found.data.rows, found.data.test_rows) == (30, 10)
    assert found.data.digest
    assert (dict(found.feature_shapes), dict(found.feature_dtypes)) == ({"features": (8,)}, {"features": "float32"})
    assert found.classes == 4


GRAPH_LAYER = """
class {kind}(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.lin = nn.Linear(inputs, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("adjacency", torch.eye(6) + torch.roll(torch.eye(6), 1, 0))

    def forward(self, nodes):
        return self.adjacency @ self.lin(nodes) + self.bias

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = {kind}(5, 16), {kind}(16, 4)

    def forward(self, nodes):
        return self.conv2(F.relu(self.conv1(nodes))).mean(1)

def build(): return Net()
"""


@pytest.mark.parametrize("kind", ["GCNConv", "GraphConvolution", "SAGEConv", "GATv2Conv"])
def test_layers_of_graphs_make_a_graph_network(tmp_path: Path, kind: str) -> None:
    profile = Job(tmp_path, GRAPH_LAYER.format(kind=kind), shape=(6, 5)).identified().profile
    assert (profile.family, profile.task) == (Family.GNN, "classification") and profile.confidence < 1
    assert profile.parameters == 5 * 16 + 16 + 16 * 4 + 4
    assert profile.flops_per_sample == 2 * 6 * (5 * 16 + 16 * 4) + 2 * 6 * 6 * (16 + 4)


def test_causal_lm_on_values_is_refused_as_data_when_the_job_is_identified(tmp_path: Path) -> None:
    outcome = Job(tmp_path, "def build(): return nn.Linear(8, 4)", train={"loss": "causal_lm"}).run()
    assert outcome.fault is not None and outcome.fault.reason is Reason.DATA_UNUSABLE
    assert "tokens" in outcome.fault.message


def test_requirements_are_layer_arithmetic(tmp_path: Path) -> None:
    code = "def build(): return nn.Linear(8, 4)"
    found = Job(tmp_path, code, train={"optimizer": {"name": "sgd"}}).identified()
    assert found.profile.family is Family.LINEAR
    requirements = found.profile.requirements
    assert (requirements.source, requirements.hours_source, requirements.cores_source) == ("layers", "layers", "table")
    assert 0 < requirements.hours < 1e-3
    assert requirements.gpu_memory_bytes < requirements.memory_bytes < 1 << 30


def test_cnn_with_batch_norm_is_exact(tmp_path: Path) -> None:
    code = (
        "def build(): return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),"
        " nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))"
    )
    found = Job(tmp_path, code, shape=(1, 8, 8)).identified()
    assert found.profile.parameters == (9 * 6 + 6) + 2 * 6 + (6 * 4 + 4)
    assert found.profile.family is Family.CNN
    layers = by_name(found)
    assert layers["0"].flops_per_sample == 2 * 9 * 6 * 64
    assert layers["0"].output_shape == (6, 8, 8)
    assert layers["1"].parameters == 12


GPT = """
class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (p.view(b, t, self.heads, -1).transpose(1, 2) for p in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(b, t, c))

class GPT(nn.Module):
    def __init__(self, vocabulary, width, length, depth):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, 4) for _ in range(depth)])
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight
    def forward(self, ids):
        x = self.token(ids) + self.position(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def build(): return GPT(vocabulary=50, width=32, length=16, depth=2)
"""


def test_tied_gpt_counts_shared_weights_once(tmp_path: Path) -> None:
    rows, length, width = 12, 16, 32
    target = np.zeros((rows, length), dtype=np.int64)
    job = Job(tmp_path, GPT, (length,), rows, token_ids=True, target=target, train={"loss": "causal_lm"})
    found = job.identified()
    block = 2 * width + (width * 3 * width + 3 * width) + (width * width + width)
    assert found.profile.parameters == 50 * width + length * width + 2 * block
    assert sum(layer.parameters for layer in found.profile.layers) == found.profile.parameters
    assert (found.profile.family, found.profile.task) == (Family.TRANSFORMER, "language_model")
    layers = by_name(found)
    assert layers["blocks.0.qkv"].flops_per_sample == 2 * length * width * 3 * width
    assert layers["head"].flops_per_sample == 2 * length * width * 50
    assert layers["head"].output_shape == (length, 50)
    assert layers["blocks.0"].flops_per_sample == 2 * 2 * length * length * width  # the fused attention itself


def test_lstm_uses_the_closed_form(tmp_path: Path) -> None:
    code = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.LSTM(5, 16, batch_first=True)
        self.head = nn.Linear(16, 4)
    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])
def build(): return Net()
"""
    found = Job(tmp_path, code, shape=(7, 5)).identified()
    assert found.profile.parameters == 4 * 16 * (5 + 16 + 2) + 16 * 4 + 4
    assert found.profile.family is Family.RNN
    layer = by_name(found)["body"]
    assert layer.flops_per_sample == 7 * 2 * 4 * 16 * (5 + 16)
    assert layer.output_shape == (7, 16)
    assert layer.activation_bytes_per_sample > 0


def test_transformer_encoder_keeps_every_parameter(tmp_path: Path) -> None:
    code = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 1)
    def forward(self, x):
        return self.head(self.body(x).mean(1))
def build(): return Net()
"""
    target = np.linspace(0, 1, 40, dtype=np.float32)
    found = Job(tmp_path, code, shape=(6, 16), target=target, train={"loss": "mse"}).identified()
    one = (3 * 16 * 16 + 3 * 16) + (16 * 16 + 16) + (16 * 32 + 32) + (32 * 16 + 16) + 2 * 2 * 16
    assert found.profile.parameters == 2 * one + 17
    assert sum(layer.parameters for layer in found.profile.layers) == found.profile.parameters
    assert (found.profile.family, found.profile.task) == (Family.TRANSFORMER, "regression")
    linear = by_name(found)["body.layers.0.linear1"]
    assert linear.flops_per_sample == 2 * 6 * 16 * 32


def test_a_huge_model_is_profiled_without_memory(tmp_path: Path) -> None:
    code = "def build(): return nn.Sequential(*[nn.Linear(40_000, 40_000, bias=False) for _ in range(40)])"
    found = Job(tmp_path, code, shape=(40_000,), rows=8).identified()
    assert found.profile.parameters == 40 * 40_000**2
    assert found.profile.complexity is Complexity.XLARGE
    assert found.profile.requirements.memory_bytes > 16 * found.profile.parameters


def test_a_model_that_looks_at_values_is_run_for_real(tmp_path: Path) -> None:
    code = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 4)
    def forward(self, x):
        return self.body(x) * (1.0 if x.abs().max().item() < 1e9 else 0.0)
def build(): return Net()
"""
    found = Job(tmp_path, code).identified()
    assert found.profile.parameters == 36
    assert by_name(found)["body"].flops_per_sample == 2 * 8 * 4


def test_bf16_halves_the_saved_activations(tmp_path: Path) -> None:
    code = "def build(): return nn.Sequential(nn.Linear(8, 64), nn.Sigmoid(), nn.Linear(64, 4))"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    full = Job(tmp_path / "a", code).identified().profile.activation_bytes_per_sample
    half = Job(tmp_path / "b", code, train={"precision": "bf16"}).identified().profile.activation_bytes_per_sample
    assert half < 0.6 * full


@pytest.mark.parametrize(
    ("code", "message", "line"),
    [
        ("def build(): return 1 / 0", "ZeroDivisionError", "return 1 / 0"),
        ("def build(:", "SyntaxError", "def build(:"),
        ("import does_not_exist_anywhere\ndef build(): pass", "ModuleNotFoundError", "import does_not_exist_anywhere"),
        ("def build(): return nn.Linear(9, 4)", "features [2, 8] F32", ""),
        (
            "class Net(nn.Linear):\n    def forward(self, x):\n        return self.missing(x)\n"
            "def build(): return Net(8, 4)",
            "AttributeError",
            "return self.missing(x)",
        ),
        ("def build(): return 7", "returned int, not a torch.nn.Module", ""),
        ("def build(): return nn.ReLU()", "without trainable parameters", ""),
        ("def build(): return nn.LazyLinear(4)", "lazy layers", ""),
        ("def other(): pass", "defines no function 'build'", ""),
        ("def build(): return nn.Linear(8, 4, device='cuda:77')", "", ""),
    ],
)
def test_a_model_that_cannot_be_used_is_explained(tmp_path: Path, code: str, message: str, line: str) -> None:
    outcome = Job(tmp_path, code).run()
    assert outcome.state is AttemptState.FAILED
    fault = outcome.fault
    assert fault is not None
    assert fault.reason is Reason.MODEL_UNUSABLE
    assert not fault.retryable
    assert message in fault.message
    assert fault.hint
    if line:
        shown = "\n".join(fault.last_lines)
        assert line in shown
        assert "site-packages" not in shown
        assert str(tmp_path) not in shown


def test_an_output_that_does_not_fit_the_target_is_found_before_training(tmp_path: Path) -> None:
    target = np.zeros((40, 3), dtype=np.float32)
    outcome = Job(tmp_path, "def build(): return nn.Linear(8, 4)", target=target, train={"loss": "mse"}).run()
    assert outcome.fault is not None
    assert outcome.fault.reason is Reason.MODEL_UNUSABLE
    assert "mse cannot compare an output of shape [2, 4]" in outcome.fault.message


def test_data_that_cannot_be_read_are_the_datas_fault(tmp_path: Path) -> None:
    job = Job(tmp_path, "def build(): return nn.Linear(8, 4)", rows=0)
    outcome = job.run()
    assert outcome.fault is not None
    assert outcome.fault.reason is Reason.DATA_UNUSABLE


def test_text_without_a_target_is_a_language_model(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "text_model.py").write_text(HEADER + GPT.replace("vocabulary=50", "vocabulary=256"))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    spec = parse(
        {
            "model": {"source": "text_model.py:build"},
            "data": {"source": "text.txt", "sequence_length": 16},
            "train": {"loss": "causal_lm", "batch_size": 4},
        }
    )
    task = Task(TaskKind.IDENTIFY, JobId("j"), Fence(1), 0, 1, "", spec, (4,))
    workspace = Workspace(tmp_path / "code", tmp_path / "text.txt", None, None, tmp_path, tmp_path)
    outcome = identify(TaskContext(task, workspace, QuietChannel(), "", 1, "cpu", "n"))
    assert outcome.state is AttemptState.DONE, outcome.fault
    found = documents.decode(Identification, outcome.document)
    assert (found.profile.family, found.profile.task) == (Family.TRANSFORMER, "language_model")
    assert by_name(found)["head"].output_shape == (16, 256)
    assert found.data.rows is not None
    assert found.data.rows > 100


def test_a_model_of_very_many_layers_is_condensed_without_loss() -> None:
    layers = tuple(LayerProfile(str(i), "Linear" if i % 3 else "Conv2d", i, 2.0 * i, 1.0, 4.0, (i,)) for i in range(10))
    joined = condensed(layers, 4)
    assert [layer.name for layer in joined] == ["0..2", "3..5", "6..8", "9..9"]
    assert sum(layer.parameters for layer in joined) == 45
    assert sum(layer.flops_per_sample for layer in joined) == 90.0
    assert (joined[1].kind, joined[1].output_shape) == ("Linear", (5,))
    assert condensed(layers, 10) == layers

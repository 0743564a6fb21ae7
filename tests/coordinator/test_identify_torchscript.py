"""TorchScript archives: parameters by what their classes list, compared with torch itself; and what is refused."""

from __future__ import annotations

import asyncio
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from public_models import public_file
from torch import Tensor, nn
from wire import changed, outcome

from coordinator.identify import archive_readers
from coordinator.identify.confine import identify_file
from protos.errors import SpecError
from protos.model import Family, ModelProfile


class Net(nn.Module):
    """Tied weights, a buffer that looks like a weight, a plain tensor, a list, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList([nn.Linear(36, 36), nn.Linear(36, 36)])
        self.blocks[1].weight = self.blocks[0].weight
        self.scale = nn.Parameter(torch.ones(36))
        self.register_buffer("weight", torch.ones(36, 36))
        self.plain = torch.zeros(7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).relu().mean(1).flatten(1)
        for block in self.blocks:
            h = block(h)
        return h * self.scale @ self.weight + self.plain.sum()


def saved(make: Callable[[], torch.jit.ScriptModule]) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(make(), file)
    return file.getvalue()


def scripted(module: nn.Module) -> bytes:
    return saved(lambda: torch.jit.script(module))


def traced(module: nn.Module, *inputs: Tensor) -> bytes:
    return saved(lambda: torch.jit.trace(module.eval(), inputs))


def identify(content: bytes) -> ModelProfile:
    return archive_readers.read(io.BytesIO(content), len(content))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


SCRIPT = scripted(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))


@pytest.mark.parametrize("trace", [False, True])
def test_parameters_are_those_that_classes_list(trace: bool) -> None:
    module = Net()
    profile = identify(traced(module, torch.zeros(2, 1, 8, 8)) if trace else scripted(module))
    assert (profile.framework, profile.format, profile.trainable) == ("pytorch", "torchscript", False)
    assert (profile.parameters, profile.family) == (count(module), Family.CNN)
    assert {layer.name: (layer.kind, layer.parameters, layer.borrowed_parameters) for layer in profile.layers} == {
        "conv": ("Conv2d", 40, 0),
        "norm": ("BatchNorm2d", 8, 0),
        "blocks.0": ("Linear", 36 * 37, 0),
        "blocks.1": ("Linear", 36, 36 * 36),
        "model": ("Linear", 36, 0),
    }
    assert profile.input_shape == ((1, 8, 8) if trace else None)
    assert profile.dtypes == ("F32", "I64") and "class" in profile.notes[0]
    assert "Python function that builds the module" in profile.why_not and profile.unknown[0] == "task"


@pytest.mark.parametrize(
    ("module", "family"),
    [
        (nn.LSTM(4, 8), Family.RNN),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), Family.MLP),
        (nn.TransformerEncoderLayer(8, 2, 16), Family.TRANSFORMER),
        (nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU()), Family.CNN),
        (nn.EmbeddingBag(10, 4), Family.EMBEDDING),
        (nn.Linear(4, 4).half(), Family.LINEAR),
    ],
)
def test_families_and_types(module: nn.Module, family: Family) -> None:
    profile = identify(scripted(module))
    assert (profile.family, profile.parameters) == (family, count(module))
    assert profile.dtypes == (("F16",) if family is Family.LINEAR else ("F32",))


def test_a_frozen_module_keeps_its_weights_among_constants() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    profile = identify(saved(lambda: torch.jit.freeze(torch.jit.script(module))))
    assert profile.parameters == count(module)
    assert "parameters" in profile.unknown and any("frozen" in note for note in profile.notes)


def test_a_class_without_lists_is_counted_by_names_and_that_is_said() -> None:
    profile = identify(changed(SCRIPT, lambda name, data: data.replace(b"__parameters__", b"__p__________")))
    assert profile.parameters == 26
    assert profile.unknown.count("parameters") == 1 and any("do not list" in note for note in profile.notes)


def test_hostile_code_is_only_text(tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    code = f"import os\nos.system('touch {canary}')\nclass ((((\n".encode() * 100
    path = tmp_path / "m.pt"
    path.write_bytes(changed(SCRIPT, lambda name, data: code if name.endswith(".py") else data))
    profile = asyncio.run(identify_file(path))
    assert profile.format == "torchscript" and not canary.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name, data: None if name.endswith("data/0") else data, "missing from the archive"),
        (lambda name, data: data[:-4] if name.endswith("data/0") else data, "stores less"),
        (lambda name, data: None if name.endswith("/data.pkl") else data, "has no"),
        (lambda name, data: b"\x80\x02]." if name.endswith("/data.pkl") else data, "not hold a module"),
        (lambda name, data: b"\x80\x02(((" if name.endswith("/data.pkl") else data, "damaged"),
    ],
)
def test_lies_are_refused(change: Callable[[str, bytes], bytes | None], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        identify(changed(SCRIPT, change))


def test_files_cut_short_give_the_typed_error() -> None:
    for length in range(1, len(SCRIPT), 211):
        assert isinstance(outcome(archive_readers.read, SCRIPT[:length]), SpecError)


@settings(max_examples=100)
@given(st.data())
def test_damaged_files_give_a_profile_or_the_typed_error(data: st.DataObject) -> None:
    content = bytearray(SCRIPT)
    for _ in range(data.draw(st.integers(1, 12))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    outcome(archive_readers.read, bytes(content))


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_pickle_or_code_inside_gives_the_same(data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from(["data.pkl", "constants.pkl", ".py"]))

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith(suffix):
            return content
        made = bytearray(content)
        for _ in range(data.draw(st.integers(1, 4))):
            made[data.draw(st.integers(0, len(made) - 1))] = data.draw(st.integers(0, 255))
        return bytes(made)

    outcome(archive_readers.read, changed(SCRIPT, change))


@pytest.mark.slow
def test_a_public_voice_detector() -> None:
    profile = asyncio.run(identify_file(public_file("silero_vad==6.2.3", "silero_vad/data/silero_vad.jit", 2_272_526)))
    assert (profile.parameters, profile.family) == (462_594, Family.RNN)  # as torch.jit.load counts them
    assert "parameters" not in profile.unknown

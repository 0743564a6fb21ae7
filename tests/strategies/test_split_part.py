"""A part of a model's initial values: those of the whole, without the whole in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from protos.errors import Exhausted, SpecError
from protos.jobspec import ModelSpec, parse
from strategies import model_torch
from strategies.part_torch import build_part, file_backed
from strategies.split_torch import cut, trace_job

ROOT = Path(__file__).parents[2]
CODE = """
import torch
from torch import nn
from torch.nn import functional as F

class GPT(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.token = nn.Embedding(700, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, 700, bias=False)
        self.head.weight = self.token.weight
        self.start = nn.Parameter(torch.randn(512, 1024))
        self.mask = torch.rand(600, 600)
        self.register_buffer("positions", torch.randn(512, 1024), persistent=False)
        self.apply(self.init)

    def init(self, module):
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight)

    def forward(self, tokens):
        return self.head(self.body(self.token(tokens)))

def mlp():
    return nn.Sequential(nn.Linear(600, 700), nn.ReLU(), nn.Linear(700, 500), nn.ReLU(), nn.Linear(500, 4))

def cnn():
    first = nn.Conv2d(3, 400, 5)
    nn.init.orthogonal_(first.weight)
    return nn.Sequential(first, nn.BatchNorm2d(400), nn.Conv2d(400, 300, 3), nn.Flatten(), nn.Linear(1200, 500))

def gpt():
    return GPT(512)

class Stack(nn.Module):
    def __init__(self, width, count):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.apply(lambda m: nn.init.normal_(m.weight, std=0.02) if isinstance(m, nn.Linear) else None)

def stack(width=2048, count=38):
    return Stack(width, count)
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "part_model.py").write_text(CODE)
    return tmp_path


def everything(model: torch.nn.Module) -> dict[str, Tensor]:
    found = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    if hasattr(model, "mask"):
        found["mask"] = model.mask
    return found


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_every_tensor_is_bit_equal_to_the_whole_model(name: str, code: Path) -> None:
    spec = ModelSpec(source=f"part_model.py:{name}")
    whole = everything(model_torch.build(spec, code, None, 7))
    part = build_part(spec, code, None, 7, tuple(whole), code)
    assert set(part) == set(whole)
    for key, value in whole.items():
        assert torch.equal(part[key], value), key
        assert part[key].stride() == value.stride()
    assert not list(code.glob("tmp*"))


def test_the_random_stream_goes_on_as_after_the_whole_model(code: Path) -> None:
    spec = ModelSpec(source="part_model.py:mlp")
    model_torch.build(spec, code, None, 7)
    expected = torch.rand(3)
    build_part(spec, code, None, 7, ("0.weight",))
    assert torch.equal(torch.rand(3), expected)


def test_a_name_the_model_does_not_have_is_said(code: Path) -> None:
    with pytest.raises(SpecError, match="no tensor 'nothing'"):
        build_part(ModelSpec(source="part_model.py:mlp"), code, None, 7, ("nothing",))


def test_a_full_disk_is_said(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(Exhausted, match="No space left"), file_backed(code):
        torch.empty(1 << 20)


def test_a_model_whose_building_looks_at_values_is_traced_without_its_memory(code: Path) -> None:
    (code / "by_value.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n"
        "    width = int(torch.linspace(0, 700, 3)[1].item())\n"
        "    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))\n"
    )
    spec = parse({"model": {"source": "by_value.py:build"}, "data": {"source": "t.npz"}})
    stages = cut(trace_job(spec, code, torch.zeros(2, 8)), ("1",))
    assert [stage.names for stage in stages] == [("0.weight", "0.bias"), ("2.weight", "2.bias")]
    part = build_part(spec.model, code, None, 3, stages[1].names)
    assert torch.equal(part["2.weight"], model_torch.build(spec.model, code, None, 3).get_parameter("2.weight"))


Write = Callable[[dict[str, Tensor], Path], Path]


def one_file(state: dict[str, Tensor], folder: Path) -> Path:
    safetensors.torch.save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def sharded(state: dict[str, Tensor], folder: Path) -> Path:
    names = sorted(state)
    where: dict[str, str] = {}
    for number, some in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        safetensors.torch.save_file({name: state[name] for name in some}, folder / file)
        where |= dict.fromkeys(some, file)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


def saved(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"state_dict": state}, folder / "model.pt")
    return folder / "model.pt"


@pytest.mark.parametrize("write", [one_file, sharded, saved])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_weights_to_start_from_are_read_by_name(write: Write, code: Path) -> None:
    spec = ModelSpec(source="part_model.py:gpt")
    whole = model_torch.build(spec, code, None, 7)
    state = {name: value + 1 for name, value in whole.state_dict().items() if name != "head.weight"}
    path = write(state, code)
    part = build_part(spec, code, path, 7, ("head.weight", "body.layers.1.norm2.bias", "positions"))
    assert torch.equal(part["head.weight"], state["token.weight"])  # named once in the file
    assert torch.equal(part["body.layers.1.norm2.bias"], state["body.layers.1.norm2.bias"])
    assert torch.equal(part["positions"], whole.get_buffer("positions"))  # which no file of weights has
    loaded = model_torch.build(spec, code, path, 7)
    assert all(
        torch.equal(value, state.get(name, state["token.weight"])) for name, value in loaded.state_dict().items()
    )


@pytest.mark.parametrize(("change", "words"), [({"x": torch.zeros(2)}, "unexpected: x"), ({}, "missing: 4.bias")])
def test_weights_that_do_not_fit_are_refused(change: dict[str, Tensor], words: str, code: Path) -> None:
    spec = ModelSpec(source="part_model.py:mlp")
    state = dict(model_torch.build(spec, code, None, 7).state_dict())
    del state["4.bias"]
    path = one_file(state | change | ({"4.bias": torch.zeros(4)} if change else {}), code)
    with pytest.raises(SpecError, match=words):
        build_part(spec, code, path, 7, ("0.weight",))


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "../m.safetensors"}}', "{}", "no json", '{"weight_map": 3}'])
def test_an_index_that_is_wrong_is_refused(index: str, code: Path) -> None:
    path = code / "model.safetensors.index.json"
    path.write_text(index)
    with pytest.raises(SpecError, match="cannot be read as weights"):
        build_part(ModelSpec(source="part_model.py:mlp"), code, path, 7, ("0.weight",))


MEASURE = """
import json, sys, threading
from pathlib import Path
import torch
torch.set_num_threads(1)
from protos.jobspec import ModelSpec
from strategies.part_torch import build_part

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

code, names = Path(sys.argv[1]), json.loads(sys.argv[2])
small = ModelSpec(source="part_model.py:stack", args={"width": 64, "count": 1})
build_part(small, code, None, 0, ["blocks.0.weight"], code)
base, peak, done = resident(), [0], threading.Event()

def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], resident())

thread = threading.Thread(target=watch)
thread.start()
part = build_part(ModelSpec(source="part_model.py:stack"), code, None, 0, names, code)
done.set()
thread.join()
print(json.dumps([peak[0] - base, sum(value.nbytes for value in part.values())]))
"""


@pytest.mark.slow
def test_a_small_part_of_a_large_model_takes_little_memory(code: Path) -> None:
    """638 MB of parameters, two of 38 tensors of 16.8 MB wanted: what stays is those, with a few tensors in between."""
    names = ["blocks.0.weight", "blocks.37.weight", "blocks.37.bias"]
    environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE, str(code), json.dumps(names)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    over_bytes, part_bytes = json.loads(done.stdout)
    assert over_bytes < part_bytes + 80e6

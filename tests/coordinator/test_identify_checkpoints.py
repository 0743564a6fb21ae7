"""What torch.save writes: which part is the model, what is beside it, and modules that were pickled whole."""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from coordinator.identify import parse
from coordinator.identify.confine import usable_as_weights
from protos.errors import SpecError
from protos.model import Family, ModelProfile
from strategies.weights_torch import open_weights


def saved(value: object, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def identify(value: object, *, zipped: bool = True) -> ModelProfile:
    return parse.identify(io.BytesIO(saved(value, zipped=zipped)))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def trained(optimizer: Any, **options: Any) -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    made = optimizer(model.parameters(), **options)
    model(torch.ones(1, 4)).sum().backward()
    if not isinstance(made, torch.optim.LBFGS):
        made.step()
    return model, made


@pytest.mark.parametrize(
    ("optimizer", "options", "name"),
    [
        (torch.optim.SGD, {"lr": 0.1}, "sgd, learning rate 0.1"),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, "sgd"),
        (torch.optim.Adam, {}, "adam, learning rate 0.001"),
        (torch.optim.AdamW, {}, "adamw, learning rate 0.001"),
        (torch.optim.RMSprop, {}, "rmsprop"),
        (torch.optim.Adagrad, {}, "adagrad"),
        (torch.optim.Adadelta, {}, "adadelta"),
        (torch.optim.Adamax, {}, "adamax"),
        (torch.optim.NAdam, {}, "nadam"),
        (torch.optim.RAdam, {}, "radam"),
        (torch.optim.ASGD, {}, "asgd"),
        (torch.optim.Rprop, {}, "rprop"),
        (torch.optim.Adafactor, {}, "adafactor"),
        (torch.optim.LBFGS, {}, "lbfgs"),
    ],
)
def test_the_optimizer_is_named_and_not_counted(optimizer: Any, options: dict[str, Any], name: str) -> None:
    model, made = trained(optimizer, **options)
    profile = identify({"net": model.state_dict(), "opt": made.state_dict(), "epoch": 7, "global_step": 900})
    assert profile.format == "pytorch_checkpoint"
    assert profile.parameters == count(model)
    said = " / ".join(profile.notes)
    assert f"optimizer ({name}" in said
    assert "epoch 7" in said and "global_step 900" in said


def test_several_optimizers_and_schedulers_are_left_out() -> None:
    model, adam = trained(torch.optim.Adam)
    _, sgd = trained(torch.optim.SGD, lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, 3)
    profile = identify(
        {
            "state_dict": model.state_dict(),
            "optimizer_states": [adam.state_dict(), sgd.state_dict()],
            "lr_schedulers": [schedule.state_dict()],
            "pytorch-lightning_version": "2.1.0",
        }
    )
    assert profile.parameters == count(model)
    assert sum("optimizer" in note for note in profile.notes) == 2
    assert "written by Lightning 2.1.0" in profile.notes


@pytest.mark.parametrize(("zipped", "file_format"), [(True, "pytorch_state_dict"), (False, "pytorch_legacy")])
def test_a_layer_that_is_called_like_training_state_counts(zipped: bool, file_format: str) -> None:
    whole = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("upscaler", "scaler", "optimus", "body")})
    profile = identify(whole.state_dict(), zipped=zipped)
    assert (profile.format, profile.parameters, len(profile.layers)) == (file_format, 48, 4)
    assert identify(nn.Linear(2, 2).state_dict(prefix="scaler."), zipped=zipped).parameters == 6
    with pytest.raises(SpecError, match="claims more"):
        identify({**whole.state_dict(), "upscaler.weight": torch.zeros(1).expand(3, 3)}, zipped=zipped)


def test_training_state_beside_bare_tensors_is_still_left_out() -> None:
    model, optimizer = trained(torch.optim.Adam)
    scaler = {"scale": 2.0, "_growth_tracker": 3}
    profile = identify({**model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler})
    assert (profile.format, profile.parameters) == ("pytorch_checkpoint", count(model))


def test_a_copy_beside_the_model_is_said_and_not_counted() -> None:
    model = nn.Linear(8, 8)
    profile = identify({"model": model.state_dict(), "ema": model.state_dict(), "step": 3})
    assert profile.parameters == count(model)
    assert any("copies of the model: ema" in note for note in profile.notes)


def test_a_checkpoint_in_a_checkpoint_and_parallel_names() -> None:
    model, optimizer = trained(torch.optim.AdamW)
    parallel = {f"module.{name}": value for name, value in model.state_dict().items()}
    inner = {"state_dict": parallel, "optimizer": optimizer.state_dict()}
    profile = identify({"model": inner, "config": {"lr": 1.0}})
    assert profile.parameters == count(model)
    assert [layer.name for layer in profile.layers] == ["0", "1"]
    assert any("DataParallel" in note for note in profile.notes)


def test_objects_beside_the_weights_make_a_file_that_is_not_loaded() -> None:
    model = nn.Linear(3, 4)
    profile = identify({"state_dict": model.state_dict(), "args": argparse.Namespace(lr=1)})
    assert (profile.format, profile.parameters) == ("pickled_checkpoint", 16)
    assert not usable_as_weights(profile)
    assert "argparse.Namespace" in profile.why_not and "model.state_dict()" in profile.why_not


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state", "net", "my_network"])
def test_what_is_called_weights_is_what_a_node_loads(key: str, tmp_path: Path) -> None:
    model, optimizer = trained(torch.optim.Adam)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(saved({"epoch": 2, "optimizer": optimizer.state_dict(), key: model.state_dict()}))
    with path.open("rb") as file:
        profile = parse.identify(file)
    assert usable_as_weights(profile)
    with open_weights(path) as weights:
        assert set(weights) == set(model.state_dict())
        assert sum(weights[name].numel() for name in weights) == profile.parameters


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.body = nn.LSTM(8, 6, batch_first=True)
        self.twice = nn.Linear(6, 6)
        self.again = self.twice
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.zeros(1000))
        self.head = nn.Linear(6, 50)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_a_pickled_module_is_counted_exactly_and_never_loaded(zipped: bool) -> None:
    model = Own()
    profile = identify(model, zipped=zipped)
    assert (profile.format, profile.trainable) == ("pickled_module", False)
    assert profile.parameters == count(model)
    assert {layer.name: (layer.kind, layer.parameters) for layer in profile.layers} == {
        "model": ("Own", 3),
        "table": ("Embedding", 400),
        "body": ("LSTM", 384),
        "twice": ("Linear", 42),
        "head": ("Linear", 350),
    }
    assert profile.family is Family.RNN
    assert any(note.endswith(".Own") for note in profile.notes)
    assert "never unpickles" in profile.why_not


@pytest.mark.parametrize(
    ("model", "family"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)), Family.CNN),
        (nn.TransformerEncoderLayer(8, 2, 16), Family.TRANSFORMER),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), Family.MLP),
        (nn.Linear(4, 2), Family.LINEAR),
    ],
)
def test_families_of_pickled_modules(model: nn.Module, family: Family) -> None:
    profile = identify({"model": model, "epoch": 2})
    assert (profile.format, profile.family, profile.parameters) == ("pickled_module", family, count(model))
    assert "epoch 2" in profile.notes


def test_tied_parameters_count_once() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    assert identify(model).parameters == 40
    assert identify(model.state_dict()).parameters == 40


def rewritten(content: bytes, leaf: str, data: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(target, "w") as archive:
        for item in source.infolist():
            archive.writestr(item.filename, data if item.filename.endswith(leaf) else source.read(item))
    return target.getvalue()


@pytest.mark.parametrize("value", [{"w": torch.zeros(100, 10)}, nn.Linear(9, 100)])
def test_storages_that_lie_are_refused(value: object) -> None:
    content = rewritten(saved(value), "data/0", bytes(16))
    with pytest.raises(SpecError, match="less than the tensors"):
        parse.identify(io.BytesIO(content))


def test_expanded_tensors_are_refused_wherever_they_are() -> None:
    claim = torch.zeros(1).expand(1 << 33)
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(claim, requires_grad=False)
    for value in ({"model": {"w": claim}, "epoch": 1}, module):
        with pytest.raises(SpecError, match="claims more than"):
            identify(value)


@pytest.mark.parametrize(
    ("names", "task"),
    [
        (["body.weight", "lm_head.weight"], "language_model"),
        (["cls.predictions.decoder.weight"], "language_model"),
        (["features.0.weight", "classifier.6.weight"], "classification"),
        (["fc.weight", "head.weight"], "unknown"),
    ],
)
def test_the_task_where_a_name_says_it(names: list[str], task: str) -> None:
    profile = identify({name: torch.zeros(2, 2) for name in names})
    assert profile.task == task
    assert ("task" in profile.unknown) is (task == "unknown")


@pytest.mark.parametrize("value", [3, "text", [1, 2], {}, {"epoch": 3}, {"a": {"b": 1}}, torch.zeros(3)])
def test_what_holds_no_named_tensors_says_so(value: object) -> None:
    with pytest.raises(SpecError, match="no state dict"):
        identify(value)

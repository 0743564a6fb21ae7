"""Models without source: a torch.export file trains, is cut, and says what it needs."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from split_chain import close
from torch import Tensor, nn

from protos.errors import ErrorCode, SpecError
from protos.jobspec import JobSpec, ModelSpec, parse
from strategies import model_torch
from strategies.data import Batch
from strategies.profile_cuts_torch import with_cuts
from strategies.profile_torch import cuttable, run
from strategies.split_torch import build_part, cut, stage_module, trace_job

CPU = torch.device("cpu")


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.rows = nn.LSTM(24, 8, batch_first=True, num_layers=2, dropout=0.3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.norm(self.conv(x)).relu().transpose(1, 2).flatten(2)
        _, (hidden, _) = self.rows(maps)
        return {"logits": self.head(self.drop(hidden[-1]))}


def images(rows: int) -> Tensor:
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(rows))


@pytest.fixture(scope="module", params=["exported in training", "exported in evaluation"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Classifier]:
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = Classifier().train(request.param == "exported in training")
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=512)}}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (images(4),), dynamic_shapes=shapes)
        torch.export.save(program, folder / "model.pt2")
        torch.export.save(torch.export.export(model, (images(4),)), folder / "fixed.pt2")
    model.load_state_dict(state)
    return folder, model


def spec_of(name: str = "model.pt2") -> JobSpec:
    return parse(
        {
            "model": {"source": name},
            "data": {"source": "t.npz", "features": "x", "target": "y"},
            "strategy": "pipeline_parallel",
        }
    )


def test_a_file_trains_and_evaluates_as_its_source_would(source: tuple[Path, Classifier]) -> None:
    folder, original = source
    model = model_torch.build(ModelSpec(source="model.pt2"), folder, None, 0)
    assert list(model.state_dict()) == list(original.state_dict())
    for training in (True, False):
        for rows in (5, 1):
            answers = []
            for one in (original, model):
                one.train(training)
                one.zero_grad()
                torch.manual_seed(rows)
                answer = one(images(rows))
                answer = answer["logits"] if isinstance(answer, dict) else answer
                answer.square().sum().backward()
                answers.append(answer)
            close(answers[1], answers[0], "output")
            for name, parameter in original.named_parameters():
                found, expected = model.get_parameter(name).grad, parameter.grad
                assert found is not None and expected is not None
                close(found, expected, name)
    for name in ("norm.running_mean", "norm.running_var"):
        close(model.get_buffer(name), original.get_buffer(name), name)


def test_a_file_is_cut_as_its_source_would_be(source: tuple[Path, Classifier]) -> None:
    folder, _ = source
    spec = spec_of()
    whole = model_torch.build(spec.model, folder, None, 0).eval()
    stages = cut(trace_job(spec, folder, images(2)), ("norm", "rows"))
    modules = [
        stage_module(stage, build_part(spec.model, folder, None, 0, stage.names), CPU).eval() for stage in stages
    ]
    values: tuple[Tensor, ...] = (images(3),)
    for module in modules[:-1]:
        values = module(*values)
    close(modules[-1](*values), whole(images(3)), "output")
    assert {name for module in modules for name in module.state_dict()} == set(whole.state_dict())


def test_the_file_may_come_in_the_place_of_weights(source: tuple[Path, Classifier], tmp_path: Path) -> None:
    folder, original = source
    moved = tmp_path / "blob"
    moved.write_bytes((folder / "model.pt2").read_bytes())
    spec = spec_of()
    model = model_torch.build(spec.model, None, moved, 0)
    assert set(model.state_dict()) == set(original.state_dict())
    assert len(cut(trace_job(spec, None, images(2), moved), ("norm",))) == 2


def test_the_layers_of_a_file_are_those_of_its_source(source: tuple[Path, Classifier]) -> None:
    folder, _ = source
    spec = spec_of()
    batch = Batch(np.zeros((4, 1, 8, 8), np.float32), np.zeros(4, np.int64))
    built = run(spec, folder, batch)
    layers, why_not = with_cuts(built.layers, spec, 0, lambda: cuttable(built, spec, batch))
    kinds = {layer.name: layer.kind for layer in layers}
    assert kinds["conv"] == "Conv2d" and kinds["norm"] == "BatchNorm2d" and kinds["head"] == "Linear"
    assert why_not == ""
    assert {layer.name: layer.cut_bytes_per_sample for layer in layers}["norm"] == 4 * 6 * 6 * 4


def test_a_fixed_batch_size_is_refused_with_what_to_do(source: tuple[Path, Classifier]) -> None:
    folder, _ = source
    with pytest.raises(SpecError) as caught:
        model_torch.build(ModelSpec(source="fixed.pt2"), folder, None, 0)
    assert "fixed number of rows" in caught.value.message and "dynamic batch" in caught.value.hint
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"text"])
def test_a_file_that_is_no_program_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(content)
    with pytest.raises(SpecError, match=r"model\.pt2 cannot be read"):
        model_torch.build(ModelSpec(source="model.pt2"), tmp_path, None, 0)
    with pytest.raises(SpecError, match="not among the job's files"):
        model_torch.build(ModelSpec(source="other.pt2"), tmp_path, None, 0)

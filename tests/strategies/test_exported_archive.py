"""A torch.export file that would run code when it is read is refused before torch's reader sees it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from protos.errors import ErrorCode, SpecError
from protos.jobspec import ModelSpec
from strategies import model_torch
from strategies.exported_archive_torch import check_archive, is_plain_expression
from strategies.exported_torch import load_program
from strategies.graph_torch import quiet

PROGRAM, EXAMPLES, WEIGHTS = (
    "models/model.json",
    "data/sample_inputs/model.pt",
    "data/weights/model_weights_config.json",
)
MARK = "code-ran"  # a folder that the code would make


class Shifted(nn.Module):
    """With a buffer, a constant that is neither, a size that is computed, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 2))
        self.register_buffer("scale", torch.ones(2))
        self.shift = torch.arange(2.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(x) * self.scale + self.shift, x.reshape(2 * x.shape[0], 2)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = {"x": {0: torch.export.Dim("batch", min=2, max=512)}}
        torch.export.save(torch.export.export(Shifted(), (torch.randn(4, 4),), dynamic_shapes=shapes), path)
    return path


class Code:
    """Unpickling it leaves a mark."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (MARK,)


def changed(source: Path, target: Path, change: dict[str, Callable[[bytes], bytes] | bytes]) -> Path:
    """The archive with entries replaced, or added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for entry in old.infolist():
            how = change.get(entry.filename.partition("/")[2])
            content = old.read(entry)
            new.writestr(entry.filename, how(content) if callable(how) else how if how is not None else content)
        names = {name.partition("/")[2] for name in old.namelist()}
        for name, content in change.items():
            if name not in names:
                assert isinstance(content, bytes)
                new.writestr(f"{root}/{name}", content)
    return target


def edited(how: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        document = json.loads(content)
        how(document)
        return json.dumps(document).encode()

    return change


def graph(program: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = program["graph_module"]["graph"]
    return found


def renamed(program: dict[str, Any]) -> None:
    text = json.dumps(program).replace('"name": "x"', "\"name\": \"x=__import__('os').putenv('A', '1')\"")
    program.clear()
    program.update(json.loads(text))


def with_tree(text: str) -> Callable[[dict[str, Any]], None]:
    def change(program: dict[str, Any]) -> None:
        program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = text

    return change


def with_size(expression: str) -> Callable[[dict[str, Any]], None]:
    def change(program: dict[str, Any]) -> None:
        graph(program)["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = expression

    return change


def with_target(target: str) -> Callable[[dict[str, Any]], None]:
    def change(program: dict[str, Any]) -> None:
        graph(program)["nodes"][0]["target"] = target

    return change


def pickled_weight(config: dict[str, Any]) -> None:
    next(iter(config["config"].values()))["use_pickle"] = True


def elsewhere(config: dict[str, Any]) -> None:
    next(iter(config["config"].values()))["path_name"] = "../sample_inputs/model.pt"


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_plain_program_passes_and_builds_with_its_constants(exported: Path) -> None:
    check_archive(exported)
    model = model_torch.build(ModelSpec(source="model.pt2"), exported.parent, None, 0)
    rows = torch.randn(3, 4)
    for training in (True, False):
        model.train(training)
        assert model(rows).shape == (3, 2)
    assert set(model.state_dict()) == set(Shifted().state_dict())


DEFAULTS = '[1, {"type": "collections.defaultdict", "context": {"default_factory_module": "os"}, "children_spec": []}]'
HOSTILE: dict[str, dict[str, Callable[[bytes], bytes] | bytes]] = {
    "examples that run code": {EXAMPLES: saved((Code(),))},
    "examples as a bare pickle": {EXAMPLES: pickle.dumps(Code())},
    "pickled weights": {WEIGHTS: edited(pickled_weight), "data/weights/weight_0": saved(Code())},
    "weights from elsewhere": {WEIGHTS: edited(elsewhere)},
    "weights of an older format": {"data/weights/model.pt": saved({"x": Code()})},
    "a custom object": {"data/constants/custom_obj_0": pickle.dumps(Code())},
    "an opaque object": {"data/constants/opaque_obj_0": pickle.dumps(Code())},
    "compiled code": {"data/aotinductor/model/x.so": b"\x7fELF"},
    "a second program": {"models/other.json": b"{}"},
    "a function of torch's namespace": {PROGRAM: edited(with_target("torch.os.system"))},
    "a loader": {PROGRAM: edited(with_target("torch.load"))},
    "a method of an operator": {PROGRAM: edited(with_target("torch.ops.aten.linear.__class__"))},
    "operators of files": {PROGRAM: edited(with_target("torch.ops.aten.from_file.default"))},
    "loading a library": {PROGRAM: edited(with_target("torch.ops.load_library"))},
    "another library's operator": {PROGRAM: edited(with_target("torch.ops.other.thing.default"))},
    "a caller": {PROGRAM: edited(with_target("_operator.methodcaller"))},
    "an attribute": {PROGRAM: edited(with_target("_operator.attrgetter"))},
    "an extension": {PROGRAM: edited(with_target("#other:thing"))},
    "code as a size": {PROGRAM: edited(with_size("__import__('os').mkdir('code-ran')"))},
    "code as a name": {PROGRAM: edited(renamed)},
    "a tree that imports": {PROGRAM: edited(with_tree(DEFAULTS))},
    "an enum that imports": {PROGRAM: edited(with_tree('[1, {"type": null, "context": "{\\"__enum__\\": 1}"}]'))},
    "no program": {PROGRAM: b"[]"},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_would_run_code_is_refused_and_does_not_run(
    what: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = changed(exported, tmp_path / "model.pt2", HOSTILE[what])
    with pytest.raises(SpecError, match=r"model\.pt2 is not loaded: ") as caught:
        load_program(path)
    assert not Path(MARK).exists() and caught.value.code is ErrorCode.MODEL_UNUSABLE


@pytest.mark.parametrize("what", ["examples that run code", "code as a size"])
def test_torchs_own_reader_would_have_run_it(
    what: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = changed(exported, tmp_path / "model.pt2", HOSTILE[what])
    with quiet(), contextlib.suppress(Exception):
        torch.export.load(path)
    assert Path(MARK).exists()


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Mul(Integer(2), Symbol('s77', integer=True))", True),
        ("2*s0 + 1", True),
        ("FloorDiv(s0, 2)", True),
        ("Float('1.5', precision=53)", True),
        ("__import__('os')", False),
        ("s0.__class__", False),
        ("(1).real", False),
        ("preview(s0)", False),
        ("s0 if s1 else s2", False),
        ("'a b'", False),
        ("[s0]", False),
        ("9**9**9", False),
        ("s0;s1", False),
        ("x" * 10_000, False),
        (3, False),
        ("", True),
    ],
)
def test_sizes_are_numbers_symbols_and_their_functions(text: object, plain: bool) -> None:
    assert is_plain_expression(text) is plain

"""Programs of torch.export without torch: parameters, shapes and FLOPs from their JSON, compared with torch itself."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from wire import changed, outcome

from coordinator.identify import archive_readers
from protos.errors import SpecError
from protos.model import Family, ModelProfile


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3))).softmax(-1)


class Language(nn.Module):
    """Tied embeddings and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.first, self.norm = nn.Linear(16, 48), nn.LayerNorm(16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        q, k, v = self.first(self.norm(h)).chunk(3, -1)
        return self.head(h + nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])


def exported(module: nn.Module, *inputs: Tensor, shapes: object = None) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module.eval(), inputs, dynamic_shapes=shapes), file)
    return file.getvalue()


def open_batch() -> object:
    return ({0: torch.export.Dim("batch", min=2, max=4096)},)


def identify(content: bytes) -> ModelProfile:
    return archive_readers.read(io.BytesIO(content), len(content))


def counted_flops(module: nn.Module, sample: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module.eval()(sample)
    return counter.get_total_flops()


IMAGES = exported(Convolutional(), torch.zeros(4, 3, 32, 32), shapes=open_batch())


def test_an_open_batch_and_flops_as_torch_counts_them() -> None:
    module = Convolutional()
    profile = identify(IMAGES)
    assert (profile.framework, profile.format, profile.trainable) == ("pytorch", "pytorch_export", True)
    assert profile.parameters == sum(each.numel() for each in module.parameters())
    assert (profile.family, profile.task, profile.input_shape) == (Family.CNN, "classification", (3, 32, 32))
    assert [(layer.name, layer.kind, layer.parameters) for layer in profile.layers] == [
        ("conv", "Conv2d", 224),
        ("norm", "BatchNorm2d", 16),
        ("head", "Linear", 90),
    ]
    assert profile.flops_per_sample == counted_flops(module, torch.zeros(1, 3, 32, 32))
    assert profile.requirements.source == "layers" and profile.activation_bytes_per_sample > 3 * 4 * 8 * 16 * 16
    assert profile.unknown == () and "node" in profile.why_not


def test_tied_parameters_count_once_and_a_fixed_batch_is_divided_out() -> None:
    module = Language()
    profile = identify(exported(module, torch.zeros(2, 7, dtype=torch.long)))
    assert profile.parameters == sum(each.numel() for each in module.parameters()) == 800 + 816 + 32
    assert profile.family is Family.TRANSFORMER and profile.input_shape == (7,)
    assert {layer.name: layer.borrowed_parameters for layer in profile.layers}["head"] == 800
    attention = 2 * 7 * 7 * (16 + 16)
    assert profile.flops_per_sample == 2 * 7 * (16 * 48 + 16 * 50) + attention


class Guarded(nn.Module):
    """Rows of weights that are looked up without gradients, in a graph inside the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mixed = x @ x.transpose(1, 2)
        return self.body(mixed @ x)


def test_a_graph_inside_the_graph_is_walked() -> None:
    profile = identify(exported(Guarded(), torch.zeros(2, 4, 6)))
    assert profile.parameters == 21
    assert profile.flops_per_sample == 2 * 2 * (4 * 4 * 6) + 2 * 4 * 6 * 3


def test_an_open_sequence_leaves_flops_unknown() -> None:
    sizes = ({0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("tokens", min=2, max=64)},)
    profile = identify(exported(Language(), torch.zeros(3, 7, dtype=torch.long), shapes=sizes))
    assert profile.parameters == 1648 and profile.input_shape is None
    assert {"input_shape", "flops_per_sample"} <= set(profile.unknown)
    assert profile.requirements.source == "table"


@pytest.mark.parametrize(
    ("module", "sample", "family"),
    [
        (nn.LSTM(4, 8, batch_first=True), torch.zeros(2, 5, 4), Family.RNN),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).half(), torch.zeros(2, 4).half(), Family.MLP),
        (nn.ConvTranspose2d(2, 3, 3), torch.zeros(2, 2, 5, 5), Family.CNN),
        (nn.Linear(4, 3).bfloat16(), torch.zeros(2, 4).bfloat16(), Family.LINEAR),
    ],
)
def test_other_layers(module: nn.Module, sample: Tensor, family: Family) -> None:
    profile = identify(exported(module, sample))
    assert (profile.family, profile.parameters) == (family, sum(each.numel() for each in module.parameters()))
    assert profile.flops_per_sample > 0 and profile.requirements.source == "layers"
    assert profile.dtypes == ({"float16": "F16", "bfloat16": "BF16"}.get(str(sample.dtype)[6:], "F32"),)


def program(content: bytes = IMAGES) -> Any:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("models/model.json"))
        return json.loads(archive.read(name))


def with_program(document: object) -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return changed(IMAGES, lambda name, data: text if name.endswith("models/model.json") else data)


def test_the_layout_of_an_older_torch_is_described_and_not_trained() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("serialized_exported_program.json", json.dumps(program()))
        archive.writestr("version", "8.1")
    profile = identify(file.getvalue())
    assert (profile.format, profile.trainable, profile.parameters) == ("pytorch_export_old", False, 330)
    assert "older torch" in profile.why_not and profile.input_shape == (3, 32, 32)


def test_a_schema_that_is_not_known_is_left_to_a_node() -> None:
    for document in ({}, [], {"graph_module": 3}, {"graph_module": {"graph": {"tensor_values": []}}}):
        profile = identify(with_program(document))
        assert (profile.format, profile.trainable, profile.parameters) == ("pytorch_export", True, 0)
        assert "parameters" in profile.unknown


def lying_program(size: object) -> bytes:
    document = program()
    document["graph_module"]["graph"]["tensor_values"]["p_conv_weight"]["sizes"][0] = {"as_int": size}
    return with_program(document)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (with_program(b"{" * 1000), "not JSON"),
        (with_program(b"[" * 100_000), "not JSON"),
        (lying_program(-3), "impossible shape"),
        (lying_program(2.5), "impossible shape"),
        (lying_program(1 << 60), "impossible shape"),
        (lying_program(1 << 20), "two shapes"),
        (changed(IMAGES, lambda name, data: None if name.endswith("weight_0") else data), "missing"),
        (changed(IMAGES, lambda name, data: data[:8] if name.endswith("weight_0") else data), "less bytes"),
    ],
)
def test_lies_are_refused(content: bytes, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        identify(content)


def test_a_description_that_is_too_large_is_not_unpacked_and_weights_still_count() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/archive_format", "pt2")
        archive.writestr("m/models/model.json", bytes(40 << 20))
    profile = identify(file.getvalue())
    assert (profile.trainable, profile.parameters) == (True, 0) and "parameters" in profile.unknown
    large = b"[" + bytes(25 << 20) + b"]"
    profile = identify(changed(IMAGES, lambda name, data: large if name.endswith("models/model.json") else data))
    assert (profile.trainable, profile.parameters) == (True, 330)
    assert "parameters" not in profile.unknown and "input_shape" in profile.unknown
    assert [layer.kind for layer in profile.layers] == ["Conv2d", "LayerNorm", "Linear"]


@settings(max_examples=100)
@given(st.data())
def test_damaged_descriptions_give_a_profile_or_the_typed_error(data: st.DataObject) -> None:
    document = program()
    for _ in range(data.draw(st.integers(1, 3))):
        here = document
        while True:
            keys = sorted(here) if isinstance(here, dict) else range(len(here))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(here[key], (dict, list)) or not here[key] or data.draw(st.booleans()):
                here[key] = data.draw(st.sampled_from([None, -1, "x", [], {}, [1], {"as_int": 3}, 1e300, True]))
                break
            here = here[key]
        if not isinstance(document, dict) or not document:
            break
    outcome(archive_readers.read, with_program(document))


def test_files_cut_short_give_the_typed_error() -> None:
    for length in range(1, len(IMAGES), 401):
        assert isinstance(outcome(archive_readers.read, IMAGES[:length]), SpecError)

"""What a model needs, shown: each number with where it is from."""

from __future__ import annotations

import io

import pytest
from test_identify_onnx import CONVOLUTIONAL, convolutional, model

from coordinator.cli import model_view
from coordinator.identify import onnx_file
from coordinator.identify.tensors import foreign
from protos import documents
from protos.command_line import human_bytes
from protos.model import ModelProfile


def needs(profile: ModelProfile) -> str:
    shown = model_view.model({**documents.plain(profile), "source": "x", "seen_by": "bytes"}, layers=0)
    return next((line for line in shown.splitlines() if line.startswith("needs")), "")


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (
            CONVOLUTIONAL,
            "needs      2 cores, 0.5 h (from the table of sizes); {} memory, {} on a GPU (from its layers)",
        ),
        (
            convolutional("n", 3, "h", "w"),  # open sizes: what the layers keep is not known
            "needs      2 cores, 4.0 GiB memory, 4.0 GiB on a GPU, 0.5 h (from the table of sizes)",
        ),
    ],
)
def test_each_number_says_where_it_is_from(graph: bytes, said: str) -> None:
    content = model(graph)
    profile = onnx_file.read(io.BytesIO(content), len(content))
    sizes = (profile.requirements.memory_bytes, profile.requirements.gpu_memory_bytes)
    assert needs(profile) == said.format(*map(human_bytes, sizes))


def test_what_is_only_named_needs_nothing_that_is_known() -> None:
    profile = foreign("tensorflow", "tflite", 40, "no")
    found = profile.requirements
    assert (found.source, found.cores_source, found.hours_source) == ("unknown",) * 3
    assert needs(profile) == ""

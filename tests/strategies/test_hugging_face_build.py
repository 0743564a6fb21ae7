"""Models built from Hugging Face directories: architecture, arguments, weights as from_pretrained finds them, parts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from protos.errors import Blame, SpecError
from protos.jobspec import ModelSpec, parse
from protos.states import Reason
from strategies import model_torch
from strategies.context import Workspace
from strategies.data import Batch
from strategies.extent import Extent
from strategies.faults_torch import UserCodeError, fault_of
from strategies.hollow_model_torch import build_hollow
from strategies.initial_values_torch import initial_parts
from strategies.loss_torch import Loss
from strategies.part_torch import build_part
from strategies.profile_torch import run

transformers = pytest.importorskip("transformers", reason="needs the extra hf: pip install 'hive[hf]'")

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT = {"model_type": "bert", "architectures": ["BertModel"], "max_position_embeddings": 16, **SIZES}
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 1, "tie_word_embeddings": True,
    **SIZES,
}  # fmt: skip
MIXTRAL = {**LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 2}
VIT = {
    "model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 8, "patch_size": 4, **SIZES,
    "num_channels": 1,
}  # fmt: skip
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def spec_of(weights: str | None = "none", **args: Any) -> ModelSpec:
    return ModelSpec(source="model", args=args, weights=weights)


def built(folder: Path, weights: str | None = "none", **args: Any) -> Any:
    return model_torch.build(spec_of(weights, **args), None, folder, 3)


def saved(folder: Path, config: dict[str, Any], **options: Any) -> Any:
    """A model of transformers with weights in the folder."""
    model = built(write(folder, config))
    with torch.no_grad():
        for parameter in model.parameters():  # away from ones and zeros, so that nothing is right by chance
            parameter.add_(torch.rand_like(parameter))
    model.save_pretrained(folder, **options)
    return model


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_configuration_names_the_class_and_the_seed_gives_the_weights(tmp_path: Path) -> None:
    folder = write(tmp_path, BERT)
    model = built(folder)
    assert type(model) is transformers.BertModel
    equal(model.state_dict(), built(folder).state_dict())
    other = model_torch.build(spec_of(), None, folder, 4)
    assert not torch.equal(model.embeddings.word_embeddings.weight, other.embeddings.word_embeddings.weight)


@pytest.mark.parametrize(
    ("task", "name", "shape"),
    [
        ("sequence_classification", "BertForSequenceClassification", (2, 3)),
        ("token_classification", "BertForTokenClassification", (2, 4, 3)),
        ("masked_lm", "BertForMaskedLM", (2, 4, 50)),
        ("causal_lm", "BertLMHeadModel", (2, 4, 50)),
        ("base", "BertModel", (2, 4, 16)),
    ],
)
def test_a_task_chooses_the_head_and_the_loss_gets_its_logits(
    task: str, name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    labels = {"num_labels": 3} if "classification" in task else {}
    model = built(write(tmp_path, BERT), task=task, **labels)
    assert type(model).__name__ == name
    loss = Loss("mse", None)(model(input_ids=IDS, attention_mask=(IDS > 0).long()), torch.zeros(shape))
    assert loss.requires_grad


def test_images_reach_a_model_of_images_as_one_tensor(tmp_path: Path) -> None:
    model = built(write(tmp_path, VIT), num_labels=5)
    assert model(torch.rand(2, 1, 8, 8)).logits.shape == (2, 5)


def test_any_field_of_the_configuration_is_an_argument(tmp_path: Path) -> None:
    model = built(write(tmp_path, BERT), hidden_dropout_prob=0.0, hidden_size=8, num_labels=7)
    assert (model.config.hidden_size, model.config.num_labels) == (8, 7)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.0, 0.1}


@pytest.mark.parametrize(
    ("config", "args", "message"),
    [
        (BERT, {"hiden_size": 8}, "'hiden_size' is no field of a bert configuration; did you mean 'hidden_size'"),
        (BERT, {"task": "masked_ml"}, "did you mean 'masked_lm'"),
        (BERT, {"task": 3}, "task '3' is not built"),
        (BERT, {"task": ["base"]}, "is not built"),
        (BERT, {"dtype": "float16"}, r"train\.precision chooses"),
        (BERT, {"auto_map": {"AutoModel": "x.Y"}}, "its own code"),
        (BERT, {"attn_implementation": "a/kernel"}, "code from elsewhere"),
        ({**BERT, "auto_map": {"AutoModel": "x.Y"}}, {}, "its own code"),
        ({**BERT, "model_type": "unheard-of"}, {}, "does not know the model type 'unheard-of'"),
        ({**BERT, "architectures": ["os"]}, {}, "architecture 'os'"),
        ({**BERT, "architectures": ["PreTrainedModel.x"]}, {}, "cannot build"),
        ({**BERT, "architectures": None}, {}, "names no architecture"),
        ({**BERT, "architectures": ["LlamaModel"]}, {}, "LlamaModel is not built from a bert configuration"),
        (VIT, {"task": "causal_lm"}, "no causal_lm model of type 'vit'"),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_sentence(
    config: dict[str, Any], args: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        built(write(tmp_path, config), **args)


def test_values_that_do_not_fit_together_are_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError) as caught:
        built(write(tmp_path, BERT), num_attention_heads=3)
    fault = fault_of(caught.value, None)
    assert fault.blame is Blame.USER_CODE and "multiple of the number of attention" in fault.message


def test_a_node_without_transformers_says_so_and_another_may_do_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SpecError) as caught:
        built(write(tmp_path, BERT))
    fault = fault_of(caught.value, None)
    assert (fault.reason, fault.blame, fault.retryable) == (Reason.MODEL_UNUSABLE, Blame.NODE, True)
    assert fault.lacking and "pip install 'hive[hf]'" in fault.hint


@pytest.mark.parametrize("config", [BERT, LLAMA, MIXTRAL], ids=lambda config: config["model_type"])
def test_weights_of_a_directory_are_loaded_as_saved(config: dict[str, Any], tmp_path: Path) -> None:
    original = saved(tmp_path, config)
    equal(built(tmp_path, None).state_dict(), original.state_dict())
    known = type(original).from_pretrained(tmp_path)
    equal(built(tmp_path, None).state_dict(), known.state_dict())


def test_sharded_weights_are_loaded_in_whole_and_in_part(tmp_path: Path) -> None:
    original = saved(tmp_path, LLAMA, max_shard_size=8_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    state = original.state_dict()
    equal(built(tmp_path, None).state_dict(), state)
    names = ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"]  # the second is tied and stored once
    equal(build_part(spec_of(None), None, tmp_path, 3, names), {name: state[name] for name in names})


def test_half_precision_is_read_into_the_models_own_type(tmp_path: Path) -> None:
    saved(tmp_path, BERT)
    state = load_file(tmp_path / "model.safetensors")
    save_file({name: value.half() for name, value in state.items()}, tmp_path / "model.safetensors")
    write(tmp_path, {**json.loads((tmp_path / "config.json").read_text()), "dtype": "float16"})
    name = "encoder.layer.0.output.dense.weight"
    expected = state[name].half().float()
    assert torch.equal(built(tmp_path, None).state_dict()[name], expected)
    assert torch.equal(build_part(spec_of(None), None, tmp_path, 3, [name])[name], expected)


def test_a_base_checkpoint_starts_a_task_and_a_head_is_left_out_for_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(tmp_path, BERT)
    model = built(tmp_path, None, task="sequence_classification", num_labels=3)
    said = capsys.readouterr().err
    assert "not in model.safetensors, initialised from the seed: classifier.weight, classifier.bias" in said
    equal(model.bert.state_dict(), base.state_dict())
    fresh = built(tmp_path, task="sequence_classification", num_labels=3)
    assert torch.equal(model.classifier.weight, fresh.classifier.weight)
    model.save_pretrained(tmp_path)
    again = built(tmp_path, None, task="base")
    equal(again.state_dict(), base.state_dict())
    assert "not used by BertModel: classifier.bias, classifier.weight" in capsys.readouterr().err


def test_old_names_of_weights_are_found(tmp_path: Path) -> None:
    original = saved(tmp_path, BERT)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = load_file(tmp_path / "model.safetensors")
    for new, before in old.items():
        state = {f"bert.{name.replace(new, before)}".replace("bert.bert.", "bert."): v for name, v in state.items()}
    save_file(state, tmp_path / "model.safetensors")
    equal(built(tmp_path, None).state_dict(), original.state_dict())


def test_weights_of_another_size_or_model_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, {**BERT, "architectures": ["BertForSequenceClassification"]})
    with pytest.raises(SpecError, match=r"classifier\.bias is \[2\], the model has \[5\]") as caught:
        built(tmp_path, None, num_labels=5)
    assert "weights: none" in caught.value.hint
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SpecError, match="has no tensor of BertForSequenceClassification"):
        built(tmp_path, None)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SpecError, match="holds neither"):
        built(tmp_path, None)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    model = saved(tmp_path, BERT)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(SpecError, match="holds neither"):
        built(tmp_path, None)


@pytest.mark.parametrize("config", [BERT, LLAMA, MIXTRAL, VIT], ids=lambda config: config["model_type"])
def test_a_part_and_a_hollow_model_are_those_of_the_whole(config: dict[str, Any], tmp_path: Path) -> None:
    state = saved(tmp_path, config).state_dict()
    hollow = build_hollow(spec_of(None), None, tmp_path, 3)
    assert all(parameter.is_meta for parameter in hollow.parameters()) and list(hollow.state_dict()) == list(state)
    names = list(state)[1::2]
    equal(build_part(spec_of(None), None, tmp_path, 3, names), {name: state[name] for name in names})
    workspace = Workspace(None, None, None, tmp_path, tmp_path, tmp_path)
    job = parse({"model": {"source": "model"}, "data": {"source": "t.npz"}})
    extents = {name: Extent(tuple(state[name].shape), (1, *[0] * (state[name].dim() - 1)), (1, *state[name].shape[1:]))
               for name in names if state[name].dim() and len(state[name]) > 1}  # fmt: skip
    for name, box in initial_parts(job, workspace, extents).items():
        assert torch.equal(box, state[name][1:2]), name


def test_a_directory_is_identified_without_its_weights(tmp_path: Path) -> None:
    folder = write(tmp_path, {**BERT, "architectures": ["BertForMaskedLM"]})
    data = {"source": "t.npz", "features": ["input_ids", "attention_mask"], "target": "y"}
    spec = parse({"model": {"source": "model"}, "data": data, "train": {"loss": "causal_lm"}})
    batch = Batch({"input_ids": IDS.repeat(2, 1).numpy(), "attention_mask": np.ones((4, 4), np.int64)}, IDS.numpy())
    batch = Batch(batch.features, np.zeros((4, 4), np.int64))
    found = run(spec, None, batch, folder)
    assert sum(parameter.numel() for parameter in found.model.parameters()) == sum(
        parameter.numel() for parameter in built(folder).parameters()
    )
    assert "bert.encoder.layer.1.attention.self.query" in {layer.name for layer in found.layers}

"""Model files of every kind through the confined child: what they are is said, nothing in them runs."""

from __future__ import annotations

import asyncio
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from coordinator.identify import confine
from coordinator.identify.confine import identify_file, usable_as_weights
from protos.errors import ErrorCode, HiveError, NotFound, SpecError
from protos.model import Complexity, Family, ModelProfile


def identify(path: Path, deadline_s: float = 30.0) -> ModelProfile:
    return asyncio.run(identify_file(path, deadline_s=deadline_s))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 10))


CNN_PARAMETERS = 80 + 16 + 2890


def check_cnn(profile: ModelProfile) -> None:
    assert profile.parameters == CNN_PARAMETERS
    assert profile.family is Family.CNN
    assert profile.complexity is Complexity.SMALL
    assert {layer.name: (layer.kind, layer.parameters) for layer in profile.layers} == {
        "0": ("Conv2d", 80),
        "1": ("BatchNorm", 16),
        "3": ("Linear", 2890),
    }
    assert profile.dtypes == ("F32", "I64")
    assert not profile.trainable
    assert "model.weights" in profile.why_not
    assert usable_as_weights(profile)
    assert profile.requirements.source == "table"


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "misnamed.pdf"
    save_file(cnn().state_dict(), path)
    profile = identify(path)
    check_cnn(profile)
    assert (profile.framework, profile.format, profile.bytes) == ("safetensors", "safetensors", path.stat().st_size)


@pytest.mark.parametrize(("zipped", "file_format"), [(True, "pytorch_state_dict"), (False, "pytorch_legacy")])
def test_state_dicts_of_both_generations(tmp_path: Path, zipped: bool, file_format: str) -> None:
    path = tmp_path / "weights"
    torch.save(cnn().state_dict(), path, _use_new_zipfile_serialization=zipped)
    profile = identify(path)
    check_cnn(profile)
    assert (profile.framework, profile.format) == ("pytorch", file_format)


@pytest.mark.parametrize("key", ["model", "model_state_dict", "state_dict", "my_network"])
def test_the_model_is_found_in_a_full_checkpoint(tmp_path: Path, key: str) -> None:
    model = cnn()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 3, key: model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    profile = identify(path)
    check_cnn(profile)
    assert profile.format == "pytorch_checkpoint"


def test_tied_and_half_precision_weights_are_counted_once(tmp_path: Path) -> None:
    weight = torch.zeros(100, 16, dtype=torch.bfloat16)
    torch.save({"emb.weight": weight, "head.weight": weight, "norm.weight": torch.zeros(16)}, tmp_path / "tied.pt")
    profile = identify(tmp_path / "tied.pt")
    assert profile.parameters == 1616
    assert profile.dtypes == ("BF16", "F32")
    assert profile.family is Family.TRANSFORMER


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (nn.LSTM(8, 16), "LSTM"),
        (nn.GRU(8, 16), "GRU"),
        (nn.RNN(8, 16), "RNN"),
        (nn.Linear(8, 4), "Linear"),
        (nn.Conv1d(2, 3, 3), "Conv1d"),
    ],
)
def test_layers_are_recognised_by_names_and_shapes(tmp_path: Path, model: nn.Module, kind: str) -> None:
    torch.save(nn.ModuleDict({"body": model}).state_dict(), tmp_path / "w")
    profile = identify(tmp_path / "w")
    assert [layer.kind for layer in profile.layers] == [kind]
    assert profile.parameters == sum(parameter.numel() for parameter in model.parameters())


def stored(folder: Path, **tensors: torch.Tensor) -> ModelProfile:
    """The profile of a safetensors file; two underscores in a name are a dot."""
    path = folder / "model.safetensors"
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
    return identify(path)


def integers(dtype: torch.dtype, *sizes: int) -> torch.Tensor:
    return torch.zeros(sizes, dtype=dtype)


@pytest.mark.parametrize(
    "packed",
    [
        {"mlp__qweight": integers(torch.int32, 8, 64), "mlp__scales": torch.zeros(1, 64, dtype=torch.half)},
        {"mlp__weight": integers(torch.uint8, 256, 1), "mlp__weight__absmax": torch.zeros(8)},
        {"mlp__weight": integers(torch.int8, 16, 16), "mlp__SCB": torch.zeros(16)},
        {"mlp__weight_packed": integers(torch.int32, 16, 2), "mlp__weight_scale": torch.zeros(16, 1)},
        {"mlp__gate_up_proj_blocks": integers(torch.uint8, 2, 4, 2, 16)},
        {"mlp__weight": integers(torch.float8_e4m3fn, 8, 8), "mlp__weight_scale_inv": torch.zeros(1, 1)},
    ],
    ids=["gptq, awq", "bitsandbytes 4 bits", "bitsandbytes 8 bits", "compressed", "mxfp4", "8 bits with scales"],
)
def test_packed_weights_leave_the_parameters_unknown(tmp_path: Path, packed: dict[str, torch.Tensor]) -> None:
    profile = stored(tmp_path, norm__weight=torch.zeros(64), **packed)
    assert "parameters" in profile.unknown
    assert "quantised weights, e.g. mlp." in profile.notes[0]


def test_integers_that_are_tables_and_eight_bits_alone_are_counted_exactly(tmp_path: Path) -> None:
    profile = stored(
        tmp_path,
        attn__relative_position_index=integers(torch.int64, 9, 9),
        bn__num_batches_tracked=integers(torch.int64),
        body__weight=integers(torch.float8_e4m3fn, 8, 8),
    )
    assert profile.parameters == 64 and "parameters" not in profile.unknown


def test_complex_parameters_count(tmp_path: Path) -> None:
    profile = stored(tmp_path, filter__weight=torch.zeros(4, 5, dtype=torch.complex64), norm__weight=torch.zeros(2))
    assert (profile.parameters, profile.dtypes) == (22, ("C64", "F32"))


def test_the_masks_of_gpt2_are_no_parameters(tmp_path: Path) -> None:
    profile = stored(
        tmp_path,
        h__0__attn__bias=torch.ones(1, 1, 32, 32),
        h__0__attn__masked_bias=torch.tensor(-1e4),
        h__0__attn__c_attn__weight=torch.zeros(8, 24),
        h__0__attn__c_attn__bias=torch.zeros(24),
        mixing__attn__bias=torch.zeros(1, 4, 32, 32),
        style__bias=torch.zeros(1, 1, 3, 3),
    )
    assert profile.parameters == 8 * 24 + 24 + 4 * 32 * 32 + 9
    assert "h.0.attn" not in {layer.name for layer in profile.layers}


@pytest.mark.parametrize("content", ["cat\ndog\n", "(in brackets) a note\n", "cat\ndog\nR" + "x\n" * 30])
def test_text_that_begins_like_an_old_pickle_is_text(tmp_path: Path, content: str) -> None:
    path = tmp_path / "note.txt"
    path.write_text(content)
    profile = identify(path)
    assert (profile.format, profile.trainable) == ("unknown", False)
    path.write_bytes(content.encode() + b"\xff\0")
    with pytest.raises(SpecError, match="pickle inside is damaged"):
        identify(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_is_named_and_refused(tmp_path: Path, zipped: bool) -> None:
    torch.save(cnn(), tmp_path / "module.pt", _use_new_zipfile_serialization=zipped)
    profile = identify(tmp_path / "module.pt")
    assert (profile.framework, profile.format, profile.trainable) == ("pytorch", "pickled_module", False)
    assert "torch.nn.modules.container.Sequential" in profile.notes[0]
    assert profile.parameters == CNN_PARAMETERS
    assert "never unpickles" in profile.why_not
    assert not usable_as_weights(profile)


class _Payload:
    def __init__(self, canary: Path, protocol: int) -> None:
        self.canary = canary
        self.protocol = protocol

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_hostile_pickles_are_refused_and_not_executed(tmp_path: Path, protocol: int) -> None:
    canary = tmp_path / "executed"
    payload = {"weight": _Payload(canary, protocol), "x": 1}
    plain, zipped, legacy = tmp_path / "plain.pt", tmp_path / "zipped.pt", tmp_path / "legacy.pt"
    plain.write_bytes(pickle.dumps(payload, protocol=protocol))
    torch.save(payload, zipped, pickle_protocol=max(protocol, 2))
    torch.save(payload, legacy, pickle_protocol=2, _use_new_zipfile_serialization=False)
    for path in (plain, zipped, legacy):
        with pytest.raises(SpecError, match=r"names (posix|nt)\.system") as caught:
            identify(path)
        assert caught.value.code is ErrorCode.MODEL_UNUSABLE
        assert not canary.exists()
    pickle.loads(plain.read_bytes())  # noqa: S301 - proves that the payload would have fired
    assert canary.exists()


@pytest.mark.filterwarnings("ignore")
def test_other_formats_are_named_with_a_way_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "arrays.npz", x=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    (tmp_path / "model.skops").write_bytes(b"\x1f\x8b\x08" + bytes(20))
    expected = {
        "arrays.npz": "npz",
        "array.npy": "npy",
        "script.pt": "torchscript",
        "model.skops": "gzip",
    }
    for name, file_format in expected.items():
        profile = identify(tmp_path / name)
        assert (profile.format, profile.trainable) == (file_format, False)
        assert "hive trains a Python entry point" in profile.why_not


def test_scikit_learn_pickles_are_named(tmp_path: Path) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(linear_model.LogisticRegression()))
    profile = identify(tmp_path / "model.pkl")
    assert (profile.framework, profile.trainable) == ("scikit-learn", False)
    assert "LogisticRegression" in profile.layers[0].kind


def test_python_source_is_left_to_a_node(tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    (tmp_path / "model.py").write_text(f"open({str(canary)!r}, 'w')\ndef build():\n    return None\n")
    profile = identify(tmp_path / "model.py")
    assert (profile.format, profile.trainable) == ("python_source", True)
    assert "FILE.py:build" in profile.why_not
    assert not canary.exists()
    (tmp_path / "empty.py").write_text("x = 1\n")
    assert not identify(tmp_path / "empty.py").trainable


@pytest.mark.parametrize("content", ["garbage\n", "1, 2, 3\n", '"a sentence in quotes"\n', "# a comment\n"])
def test_text_that_only_happens_to_be_an_expression_is_no_source(tmp_path: Path, content: str) -> None:
    path = tmp_path / "note.txt"
    path.write_text(content)
    profile = identify(path)
    assert (profile.format, profile.trainable) == ("unknown", False)


def test_what_is_not_a_regular_file_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(SpecError, match="not a model file") as caught:
            identify(path)
        assert caught.value.code is ErrorCode.MODEL_UNUSABLE
        assert caught.value.hint
    with pytest.raises(NotFound):
        identify(tmp_path / "missing.pt")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(SpecError, match="is empty"):
        identify(tmp_path / "empty.pt")


def test_a_torch_export_program_is_left_to_a_node(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(nn.Linear(2, 3), (torch.zeros(4, 2),), dynamic_shapes=shapes), path)
    profile = identify(path)
    assert (profile.format, profile.trainable) == ("pytorch_export", True)
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
    old = identify(tmp_path / "old.pt2")
    assert not old.trainable and "older torch" in old.why_not
    with zipfile.ZipFile(tmp_path / "compiled.pt2", "w") as archive:
        archive.writestr("m/archive_format", "pt2")
    assert not identify(tmp_path / "compiled.pt2").trainable


def test_a_configuration_is_known_and_one_that_brings_code_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 8}')
    profile = identify(tmp_path / "config.json")
    assert (profile.format, profile.trainable) == ("hugging_face", True)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "auto_map": {"AutoModel": "x.Y"}}')
    with pytest.raises(SpecError, match="its own code"):
        identify(tmp_path / "config.json")


def test_a_huggingface_folder_gets_its_own_advice(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SpecError) as caught:
        identify(tmp_path)
    assert "Hugging Face" in caught.value.hint


def test_a_small_file_cannot_ask_for_endless_work(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + b"]" * (15 * 1024 * 1024) + b".")
    assert path.stat().st_size < 100_000
    with pytest.raises(SpecError, match="opcodes"):
        identify(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(64 * 1024 * 1024))
    with pytest.raises(SpecError, match="over the limit"):
        identify(path)


@pytest.mark.parametrize(
    "answer",
    [b"", b"{", b"[]", b"null", b"{}", b'{"profile": {}}', b'{"error": 3}', b'{"error": {"code": "model_unusable"}}'],
)
def test_a_child_that_died_or_lies_is_an_ordinary_error(answer: bytes) -> None:
    with pytest.raises(HiveError) as caught:
        confine.decode_answer("model.pt", answer)
    assert caught.value.code is ErrorCode.MODEL_UNUSABLE
    assert caught.value.message.startswith("model.pt: ")


def test_a_deadline_ends_the_child(tmp_path: Path) -> None:
    torch.save(cnn().state_dict(), tmp_path / "w.pt")
    with pytest.raises(SpecError, match="could not be read within 0 s"):
        identify(tmp_path / "w.pt", deadline_s=0.0)

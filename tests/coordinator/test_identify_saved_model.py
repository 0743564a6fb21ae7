"""TensorFlow SavedModels, their graph and their index of variables written here byte by byte."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from public_models import public_files
from wire import Content, cut_everywhere, field, message, outcome, varint

from coordinator.identify import saved_model
from coordinator.identify.confine import identify_folder, identify_path
from coordinator.identify.tensor_bundle import crc32c, masked, read_index
from protos.errors import SpecError
from protos.model import Family, ModelProfile

F32, I64, STRING = 1, 9, 7
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
Entries = dict[str, tuple[int, tuple[int, ...]]]


def shape(*sizes: int) -> bytes:
    return message(*((2, message((1, size))) for size in sizes))


def block(entries: list[tuple[bytes, bytes]], kind: int = 0) -> bytes:
    """A block of the table with its kind and checksum; beginnings of keys are shared."""
    found, before = b"", b""
    for key, value in entries:
        shared = 0
        while shared < min(len(key), len(before)) and key[shared] == before[shared]:
            shared += 1
        found += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    found += bytes(4) + (1).to_bytes(4, "little") + bytes((kind,))
    return found + masked(crc32c(found)).to_bytes(4, "little")


def index(entries: Entries, kind: int = 0, sizes: dict[str, int] | None = None) -> bytes:
    listed = [(b"", message((1, 1), (3, message((1, 1)))))]
    for name, (dtype, dims) in sorted(entries.items()):
        size = {F32: 4, I64: 8}.get(dtype, 1)
        for each in dims:
            size *= each
        size = (sizes or {}).get(name, size)
        listed.append((name.encode(), message((1, dtype), (2, shape(*dims)), (5, size))))
    half = len(listed) // 2
    content, handles = b"", []
    for part in (listed[:half], listed[half:]):
        made = block(part, kind) if part else b""
        if made:
            handles.append((part[-1][0], varint(len(content)) + varint(len(made) - 5)))
            content += made
    empty, lists = block([]), block(handles)
    footer = varint(len(content)) + varint(len(empty) - 5)
    footer += varint(len(content) + len(empty)) + varint(len(lists) - 5)
    return content + empty + lists + footer.ljust(40, b"\0") + (0xDB4775248B80FB57).to_bytes(8, "little")


def node(name: str, operator: str, *attributes: bytes) -> bytes:
    return message((1, name), (2, operator), *((5, each) for each in attributes))


def collection(names: list[str]) -> bytes:
    variables = message(*((1, message((1, f"{name}:0"))) for name in names))
    return message((1, "trainable_variables"), (2, message((2, variables))))


def signature(inputs: bytes, outputs: dict[str, str], method: str) -> bytes:
    made = [(2, message((1, key), (2, message((1, name), (2, F32))))) for key, name in outputs.items()]
    given_ = (1, message((1, "x"), (2, message((1, "x:0"), (2, F32), (3, inputs)))))
    return message((1, "serving_default"), (2, message(given_, *made, (3, f"tensorflow/serving/{method}"))))


def saved(*parts: tuple[int, Content]) -> bytes:
    meta = message((4, "serve"), (5, "2.15.0"))
    return message((1, 1), (2, message((1, meta), *parts)))


def identify(graph: bytes, variables: bytes | None) -> ModelProfile:
    files = [io.BytesIO(graph), io.BytesIO(variables) if variables is not None else None]
    assert files[0] is not None
    return saved_model.identify(files[0], len(graph), files[1], len(variables or b""))


OLD_VARIABLES: Entries = {
    "conv/kernel": (F32, (3, 3, 3, 8)), "conv/kernel/Adam": (F32, (3, 3, 3, 8)),
    "conv/kernel/Adam_1": (F32, (3, 3, 3, 8)), "bn/gamma": (F32, (8,)), "bn/beta": (F32, (8,)),
    "bn/moving_mean": (F32, (8,)), "bn/moving_variance": (F32, (8,)), "dense/kernel": (F32, (128, 10)),
    "dense/bias": (F32, (10,)), "global_step": (I64, ()), "beta1_power": (F32, ()), "beta2_power": (F32, ()),
}  # fmt: skip
TRAINED = ["conv/kernel", "bn/gamma", "bn/beta", "dense/kernel", "dense/bias"]
PARAMETERS = 216 + 16 + 1290
OLD = saved(
    (2, message((1, node("c", "Conv2D")), (1, node("p", "Softmax")))),
    (4, collection(TRAINED)),
    (5, signature(shape(-1, 32, 32, 3), {"probabilities": "p:0"}, "predict")),
)


def test_the_checksum_is_the_published_one() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_a_graph_of_tensorflow_1_names_what_is_trained() -> None:
    profile = identify(OLD, index(OLD_VARIABLES))
    assert (profile.framework, profile.format, profile.trainable) == ("tensorflow", "saved_model", False)
    assert (profile.parameters, profile.family, profile.task) == (PARAMETERS, Family.CNN, "classification")
    assert (profile.input_shape, profile.dtypes) == ((32, 32, 3), ("F32",))
    assert {layer.name: (layer.kind, layer.parameters) for layer in profile.layers} == {
        "conv": ("Conv2d", 216),
        "bn": ("BatchNorm", 16),
        "dense": ("Linear", 1290),
    }
    assert profile.unknown == ("flops_per_sample", "activation_bytes_per_sample")
    assert profile.notes[0] == "SavedModel, tags serve, TensorFlow 2.15.0"


def test_a_directory_is_read_in_the_confined_child(tmp_path: Path) -> None:
    (tmp_path / "variables").mkdir()
    (tmp_path / "saved_model.pb").write_bytes(OLD)
    (tmp_path / "variables" / "variables.index").write_bytes(index(OLD_VARIABLES))
    (tmp_path / "variables" / "variables.data-00000-of-00001").write_bytes(bytes(8000))
    profile = asyncio.run(identify_folder(tmp_path))
    assert (profile.format, profile.parameters) == ("saved_model", PARAMETERS)
    assert profile.bytes == 8000 + len(OLD) + len(index(OLD_VARIABLES))
    assert not any("missing" in note for note in profile.notes)
    (tmp_path / "variables" / "variables.data-00000-of-00001").write_bytes(bytes(1000))
    with pytest.raises(SpecError, match="more than the 1000 bytes of variables"):
        asyncio.run(identify_folder(tmp_path))


def test_without_a_list_names_decide_and_that_is_said() -> None:
    profile = identify(saved((2, message((1, node("c", "Conv2D"))))), index(OLD_VARIABLES))
    assert profile.parameters == PARAMETERS
    assert "parameters" in profile.unknown and any("go" in note for note in profile.notes)


def saved_objects() -> bytes:
    """A root with a layer of an LSTM, an optimizer with a step and slots, and a counter."""

    def child(number: int, name: str) -> tuple[int, bytes]:
        return 1, message((1, number), (2, name))

    def variable(name: str, dims: bytes, trainable: int, dtype: int = F32) -> bytes:
        return message((7, message((1, dtype), (2, dims), (3, trainable), (6, name))))

    objects = [
        message(
            child(1, "layer"), child(5, "optimizer"), child(6, "save_counter"), child(9, "moving"), child(1, "again")
        ),
        message(child(2, "kernel"), child(3, "recurrent_kernel"), child(4, "bias")),
        variable("lstm/cell/kernel", shape(5, 16), 1),
        variable("lstm/cell/recurrent_kernel", shape(4, 16), 1),
        variable("lstm/cell/bias", shape(16), 1),
        message(child(7, "iter"), (3, message((1, 2), (2, "m"), (3, 8)))),
        variable("save_counter", b"", 0, I64),
        variable("iter", b"", 1, I64),
        variable("lstm/cell/kernel/m", shape(5, 16), 1),
        variable("lstm/moving_mean", shape(16), 0),
    ]
    return message(*((1, each) for each in objects))


def test_objects_of_tensorflow_2_say_what_is_trained() -> None:
    graph = saved((7, saved_objects()), (5, signature(shape(-1, -1, 5), {"y": "Softmax:0"}, "predict")))
    stored: Entries = {
        f"v/{at}{VALUE}": (F32, dims) for at, dims in enumerate([(5, 16), (4, 16), (16,), (5, 16), (16,)])
    }
    for variables in (index(stored), None):
        profile = identify(graph, variables)
        assert (profile.parameters, profile.family) == (80 + 64 + 16, Family.RNN)
        assert [(layer.name, layer.kind) for layer in profile.layers] == [("lstm/cell", "LSTM")]
        assert profile.input_shape is None and "parameters" not in profile.unknown
        assert "input x: F32[?, ?, 5]" in profile.notes
    assert any("is missing" in note for note in profile.notes)


def test_a_graph_that_claims_more_than_its_checkpoint_holds_is_refused() -> None:
    graph = saved((7, saved_objects()))
    with pytest.raises(SpecError, match="larger variables than its checkpoint"):
        identify(graph, index({f"v/0{VALUE}": (F32, (5, 16))}))
    huge = message((7, message((1, F32), (2, shape(*[1 << 40] * 3)), (3, 1), (6, "w"))))
    root = message((1, message((1, 1), (2, "w"))))
    with pytest.raises(SpecError, match="impossible shape"):
        identify(saved((7, message((1, root), (1, huge)))), None)


def test_variables_of_the_graph_serve_where_the_index_is_missing() -> None:
    kind = message((1, "shape"), (2, message((7, shape(4, 3)))))
    dtype = message((1, "dtype"), (2, message((6, F32))))
    graph = saved((2, message((1, node("w", "VarHandleOp", kind, dtype)))), (4, collection(["w"])))
    assert identify(graph, None).parameters == 12


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (index(OLD_VARIABLES)[:-1] + b"x", "not those of a table"),
        (b"short", "5 bytes"),
        (index(OLD_VARIABLES, kind=1), "compressed"),
        (index({"w": (F32, (4,))}, sizes={"w": 17}), "listed with 17"),
        (index({"w": (77, (4,))}), "unknown type"),
        (index({"w": (F32, (1 << 50,))}), "impossible shape"),
        (index({"w" * 4000: (F32, (1,))}), "beyond its block"),
        (bytes([index(OLD_VARIABLES)[0] ^ 1]) + index(OLD_VARIABLES)[1:], "checksum"),
    ],
)
def test_lies_in_the_index_are_refused(content: bytes, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        read_index(io.BytesIO(content), len(content))


def test_a_huge_index_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "variables.index"
    with path.open("wb") as file:
        file.truncate(1 << 34)
    with path.open("rb") as file, pytest.raises(SpecError, match="over the limit"):
        read_index(file, 1 << 34)


def test_objects_may_refer_in_circles_and_nowhere() -> None:
    root = message((1, message((1, 0), (2, "self"))), (1, message((1, 1 << 40), (2, "far"))))
    assert identify(saved((7, message((1, root)))), None).parameters == 0


def test_a_constant_of_a_gigabyte_is_stepped_over(tmp_path: Path) -> None:
    size = 1 << 30
    attribute = field(1, "value") + varint(2 << 3 | 2) + varint(size + 6) + varint(8 << 3 | 2) + varint(size)
    constant = message((1, "c"), (2, "Const")) + varint(5 << 3 | 2) + varint(len(attribute) + size) + attribute
    graph = varint(1 << 3 | 2) + varint(len(constant) + size) + constant
    meta = varint(2 << 3 | 2) + varint(len(graph) + size) + graph
    head = message((1, 1)) + varint(2 << 3 | 2) + varint(len(meta) + size) + meta
    path = tmp_path / "saved_model.pb"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    with path.open("rb") as opened:
        assert saved_model.identify(opened, len(head) + size).parameters == 0


def read_graph_only(file: BinaryIO, size: int) -> ModelProfile:
    return saved_model.identify(file, size)


def read_index_only(file: BinaryIO, size: int) -> ModelProfile:
    return saved_model.identify(io.BytesIO(OLD), len(OLD), file, size)


def test_files_cut_anywhere_give_the_typed_error() -> None:
    assert cut_everywhere(read_index_only, index(OLD_VARIABLES)) == []
    assert len(cut_everywhere(read_graph_only, OLD)) == 0


@settings(max_examples=300)
@given(st.sampled_from(["graph", "objects", "index"]), st.data())
def test_damaged_files_give_a_profile_or_the_typed_error(kind: str, data: st.DataObject) -> None:
    whole = {"graph": OLD, "objects": saved((7, saved_objects())), "index": index(OLD_VARIABLES)}[kind]
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    outcome(read_index_only if kind == "index" else read_graph_only, bytes(content))


@pytest.mark.slow
def test_a_public_classifier_of_languages() -> None:
    inside = "guesslang/data/model/"
    sizes = {
        "saved_model.pb": 169_952,
        "variables/variables.index": 541,
        "variables/variables.data-00000-of-00001": 2_698_424,
    }
    folder = public_files("guesslang==2.2.1", {inside + name: size for name, size in sizes.items()}) / inside
    profile = asyncio.run(identify_path(folder))
    assert (profile.framework, profile.format, profile.bytes) == ("tensorflow", "saved_model", sum(sizes.values()))
    assert (profile.parameters, profile.task, profile.family) == (674_604, "classification", Family.MLP)
    assert not {"parameters", "family"} & set(profile.unknown)

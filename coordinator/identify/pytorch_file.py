"""PyTorch's own files: the zip of torch.save, the older plain pickle, and what is inside a checkpoint.

Owns which archive is which (state dict, TorchScript, torch.export, npz, Keras), the check that every tensor's bytes are
really in the file, and the choice of the model's weights inside a checkpoint. Nothing is unpickled: see pickle_walk.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, BinaryIO

from coordinator.identify import pickle_walk
from coordinator.identify.pickle_walk import ITEM_BYTES, Disallowed, Mapping, Storage, Tensor
from coordinator.identify.tensors import (
    MAX_NAME_CHARACTERS,
    MAX_TENSORS,
    WHAT_HIVE_TRAINS,
    foreign,
    profile_of,
    unusable,
)
from protos.model import ModelProfile

MAX_PICKLE_BYTES = 16 * 1024 * 1024
MAX_ENTRIES = 400_000
_DAMAGED = "copy the file again or write it again with torch.save(model.state_dict(), PATH)"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_HEAD = b"\x80\x02\x8a\x0a" + _LEGACY_MAGIC.to_bytes(10, "little")
_MODEL_KEYS = ("model_state_dict", "state_dict", "model_state", "model", "module", "net", "network", "weights")
_OPTIMIZER_KEYS = ("optim", "scheduler", "scaler")
_MAX_DEPTH = 6
EXPORTED = "pytorch_export"

WEIGHTS_ONLY = "a file of weights has no architecture; " + WHAT_HIVE_TRAINS
_PICKLED = (
    "the file pickles whole objects ({what}), and loading it would run code; hive never unpickles. Save the weights "
    "alone, torch.save(model.state_dict(), 'weights.pt') or safetensors.torch.save_model(model, 'w.safetensors'), and "
    "give them as model.weights beside model.source: model.py:build"
)


def identify_zip(file: BinaryIO, size: int) -> ModelProfile:
    """The profile of a zip archive of any kind. Raises SpecError for damaged or hostile ones."""
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError, UnicodeDecodeError):
        raise unusable("the zip archive is damaged or was cut short", _DAMAGED) from None
    entries = archive.infolist()
    names = {entry.filename: entry for entry in entries}
    if len(entries) > MAX_ENTRIES or len(names) != len(entries):
        raise unusable("the zip archive lists too many entries or one entry twice", _DAMAGED)
    if known := _other_archive(set(names)):
        framework, file_format, why_not = known
        profile = foreign(framework, file_format, size, why_not)
        return replace(profile, trainable=file_format == EXPORTED)
    pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        return foreign("unknown", "zip", size, "a zip archive without a PyTorch data.pkl; " + WHAT_HIVE_TRAINS)
    prefix = pickles[0].removesuffix("data.pkl")
    content = _read(archive, names[pickles[0]])

    def stored(storage: Storage) -> int:
        entry = names.get(f"{prefix}data/{storage.key}")
        if entry is None:
            raise unusable(f"the tensor data {storage.key[:40]!r} are missing from the archive", _DAMAGED)
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise unusable("the archive's tensor data are compressed or encrypted: not written by torch.save", _DAMAGED)
        if entry.header_offset + entry.file_size > size or entry.file_size != entry.compress_size:
            raise unusable("the archive's tensor data lie outside the file", _DAMAGED)
        return entry.file_size

    return _profile(lambda: pickle_walk.walk(io.BytesIO(content)), "pytorch_state_dict", size, stored)


def identify_legacy(file: BinaryIO, size: int) -> ModelProfile:
    """The format before zip: magic, protocol, system, object and storage keys as five pickles, then the numbers."""
    file.seek(0)
    content = io.BytesIO(file.read(MAX_PICKLE_BYTES))

    storages: dict[str, Storage] = {}

    def read() -> Any:
        magic, protocol = pickle_walk.walk(content), pickle_walk.walk(content)
        if magic != _LEGACY_MAGIC or protocol != 1001:
            raise unusable("not a PyTorch file of a known protocol", _DAMAGED)
        pickle_walk.walk(content)
        value = pickle_walk.walk(content, storages)
        pickle_walk.walk(content)
        needed = sum(8 + storage.elements * ITEM_BYTES[storage.dtype] for storage in storages.values())
        if content.tell() + needed > size:
            raise unusable("the file is shorter than the tensors it lists", _DAMAGED)
        return value

    def stored(storage: Storage) -> int:
        return storages[storage.key].elements * ITEM_BYTES[storage.dtype]

    return _profile(read, "pytorch_legacy", size, stored)


def identify_pickle(file: BinaryIO, size: int) -> ModelProfile:
    """A plain pickle: never a state dict hive can use; its first global says whose it is."""
    file.seek(0)
    try:
        pickle_walk.walk(io.BytesIO(file.read(MAX_PICKLE_BYTES)))
    except Disallowed as found:
        return _pickled_object(found, size)
    why_not = "a plain pickle, not a file torch.save wrote; " + WHAT_HIVE_TRAINS
    return foreign("python", "pickle", size, why_not)


def _profile(read: Callable[[], Any], file_format: str, size: int, stored: Callable[[Storage], int]) -> ModelProfile:
    try:
        value = read()
    except Disallowed as found:
        return _pickled_object(found, size)
    found_weights = _weights(value)
    if found_weights is None:
        raise unusable(
            "the file holds no state dict: no mapping from names to tensors",
            "write it with torch.save(model.state_dict(), PATH)",
        )
    tensors, checkpoint = found_weights
    checked: dict[str, int] = {}
    for tensor in tensors.values():
        storage = tensor.storage
        needed = storage.elements * ITEM_BYTES[storage.dtype]
        if storage.key not in checked:
            checked[storage.key] = stored(storage)
        if needed > checked[storage.key]:
            raise unusable("the file stores less than the tensors it lists", _DAMAGED)
    return profile_of(
        (tensor.info(name) for name, tensor in tensors.items()),
        framework="pytorch",
        file_format="pytorch_checkpoint" if checkpoint else file_format,
        file_bytes=size,
        why_not=WEIGHTS_ONLY,
    )


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    if entry.file_size > MAX_PICKLE_BYTES:
        raise unusable(f"data.pkl of {entry.file_size} bytes is over the limit of {MAX_PICKLE_BYTES}", _DAMAGED)
    try:
        with archive.open(entry) as part:
            return part.read(MAX_PICKLE_BYTES)
    except Exception as error:  # zipfile raises a dozen kinds for damaged members; all mean the same to the user
        if isinstance(error, MemoryError):
            raise
        raise unusable("data.pkl in the archive is damaged", _DAMAGED) from None


def _weights(value: Any) -> tuple[dict[str, Tensor], bool] | None:
    """The model's tensors by dotted name, and whether they were found beside other state (a checkpoint)."""
    if not isinstance(value, Mapping):
        return None
    direct = dict(_flatten(value))
    beside = [key for key in value.items if isinstance(key, str) and _is_training_state(key)]
    inner = {
        key: dict(_flatten(item))
        for key, item in value.items.items()
        if isinstance(key, str) and isinstance(item, Mapping) and not _is_training_state(key)
    }
    for key in _MODEL_KEYS:
        if inner.get(key):
            return inner[key], True
    if beside or any(not isinstance(item, (Tensor, Mapping)) for item in value.items.values()):
        best = max(inner.values(), key=_bytes, default={})
        if best and _bytes(best) >= _bytes({k: t for k, t in value.items.items() if isinstance(t, Tensor)}):
            return best, True
        direct = {name: tensor for name, tensor in direct.items() if not _is_training_state(name.partition(".")[0])}
        return (direct, True) if direct else None
    return (direct, False) if direct else None


def _is_training_state(key: str) -> bool:
    return any(word in key.lower() for word in _OPTIMIZER_KEYS)


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.info(name).bytes for name, tensor in tensors.items())


def _flatten(value: Mapping, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if depth > _MAX_DEPTH:
        return
    if len(value.items) > MAX_TENSORS:
        raise unusable(f"a mapping of {len(value.items)} entries is over the limit of {MAX_TENSORS}")
    for key, item in value.items.items():
        name = f"{prefix}{key}"
        if len(name) > MAX_NAME_CHARACTERS:
            raise unusable(f"a tensor name is over the limit of {MAX_NAME_CHARACTERS} characters", _DAMAGED)
        if isinstance(item, Tensor):
            yield name, item
        elif isinstance(item, Mapping):
            yield from _flatten(item, name + ".", depth + 1)


def _pickled_object(found: Disallowed, size: int) -> ModelProfile:
    what = f"{found.module}.{found.name}".encode("ascii", "replace").decode()
    root = found.module.partition(".")[0]
    if root in ("sklearn", "joblib"):
        return foreign("scikit-learn", "sklearn_pickle", size, _PICKLED.format(what=what), architecture=what)
    return foreign("pytorch", "pickled_module", size, _PICKLED.format(what=what), architecture=what)


def _other_archive(names: set[str]) -> tuple[str, str, str] | None:
    """Framework, format and why not, of the archives that are known by the names of their entries."""
    leaves = {name.partition("/")[2] or name for name in names}
    if "constants.pkl" in leaves and any("code/" in name for name in names):
        return "pytorch", "torchscript", _convert("TorchScript")
    if "serialized_exported_program.json" in leaves:
        again = "load it with the torch that wrote it, and write it with torch.export.save of torch 2.10 or newer"
        return "pytorch", "pytorch_export_old", f"a torch.export program of an older torch: {again}"
    if "archive_format" in leaves and "models/model.json" in leaves:
        return "pytorch", EXPORTED, "a torch.export program; what it holds is found out on a node"
    if "archive_format" in leaves:
        return "pytorch", "pt2", _convert("a compiled package")
    if "model.weights.h5" in leaves and "config.json" in leaves:
        return "keras", "keras", "Keras is not trained by hive: rebuild the model in PyTorch. " + WHAT_HIVE_TRAINS
    if "schema.json" in leaves and not any(name.endswith("data.pkl") for name in names):
        return "scikit-learn", "skops", "scikit-learn models are not trained by hive. " + WHAT_HIVE_TRAINS
    if names and all(name.endswith(".npy") for name in names):
        return "numpy", "npz", "an npz holds arrays, not a model: use it as data.source. " + WHAT_HIVE_TRAINS
    return None


def _convert(what: str) -> str:
    return (
        f"{what} carries its own code, which hive does not train yet: give the Python function that builds the module "
        f"and save its weights with torch.save(model.state_dict(), 'weights.pt'). {WHAT_HIVE_TRAINS}"
    )

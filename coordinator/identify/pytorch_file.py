"""PyTorch's own files: the zip of torch.save and the older plain pickle.

Owns the check that every tensor's bytes are really in the file, and the profile of weights, checkpoints and pickled
modules. Nothing is unpickled: see pickle_walk. What else the file needs to be loaded decides: names outside torch's
weights-only allow-list make it a file that hive looks into and never loads.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import BinaryIO

from coordinator.identify.archive import Archive
from coordinator.identify.checkpoint_content import content_of
from coordinator.identify.layers import Description, describe
from coordinator.identify.pickle_values import Global, Object, Storage, Tensor
from coordinator.identify.pickle_walk import Walked, walk
from coordinator.identify.pytorch_module import module_content
from coordinator.identify.tensors import WHAT_HIVE_TRAINS, foreign, profile_of, unusable
from protos.model import ModelProfile

MAX_PICKLE_BYTES = 16 * 1024 * 1024
_DAMAGED = "copy the file again or write it again with torch.save(model.state_dict(), PATH)"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_HEAD = b"\x80\x02\x8a\x0a" + _LEGACY_MAGIC.to_bytes(10, "little")
MODULE = "pickled_module"
CHECKPOINT_WITH_OBJECTS = "pickled_checkpoint"

WEIGHTS_ONLY = "a file of weights has no architecture; " + WHAT_HIVE_TRAINS
PICKLED = (
    "the file pickles whole objects ({what}), and loading it would run code; hive never unpickles. Save the weights "
    "alone, torch.save(model.state_dict(), 'weights.pt') or safetensors.torch.save_model(model, 'w.safetensors'), and "
    "give them as model.weights beside model.source: model.py:build"
)


def identify_archive(archive: Archive) -> ModelProfile:
    """The zip of torch.save. Raises SpecError for damaged or hostile ones."""
    pickles = [name for name in archive.entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise unusable("the archive holds more than one data.pkl", _DAMAGED)
    prefix = pickles[0].removesuffix("data.pkl")
    walked = walk(io.BytesIO(archive.read(pickles[0], MAX_PICKLE_BYTES)))

    def stored(storage: Storage) -> int:
        return archive.stored_bytes(f"{prefix}data/{storage.key}")

    return _profile(walked, "pytorch_state_dict", archive.size, stored)


def identify_legacy(file: BinaryIO, size: int) -> ModelProfile:
    """The format before zip: magic, protocol, system, object and storage keys as five pickles, then the numbers."""
    file.seek(0)
    content = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    magic, protocol = walk(content).value, walk(content).value
    if magic != _LEGACY_MAGIC or protocol != 1001:
        raise unusable("not a PyTorch file of a known protocol", _DAMAGED)
    walk(content)
    walked = walk(content)
    walk(content)
    needed = sum(8 + storage.bytes for storage in walked.storages.values())
    if content.tell() + needed > size:
        raise unusable("the file is shorter than the tensors it lists", _DAMAGED)
    return _profile(walked, "pytorch_legacy", size, lambda storage: walked.storages[storage.key].bytes)


def is_of_pytorch(walked: Walked) -> bool:
    """Whether a pickle that torch.save did not write holds something of torch or of a library around it."""
    return any("torch" in name.module.partition(".")[0] for name in walked.foreign.values())


def pickled_objects(walked: Walked, size: int) -> ModelProfile:
    """A pickle of torch's objects that are no model hive knows: named, and nothing claimed about their inside."""
    what = names_of(walked.foreign.values())
    return foreign("pytorch", MODULE, size, PICKLED.format(what=what), architecture=what.partition(",")[0])


def _profile(walked: Walked, file_format: str, size: int, stored: Callable[[Storage], int]) -> ModelProfile:
    content = content_of(walked.value)
    if content is not None and content.module is not None:
        return _module(content.module, content.notes, size, stored)
    if content is None and walked.foreign:
        return pickled_objects(walked, size)
    if content is None:
        raise unusable(
            "the file holds no state dict: no mapping from names to tensors",
            "write it with torch.save(model.state_dict(), PATH)",
        )
    _check_storages(content.tensors.values(), stored)
    why_not = WEIGHTS_ONLY
    if content.is_checkpoint:
        file_format = "pytorch_checkpoint"
    if walked.foreign:
        file_format, why_not = CHECKPOINT_WITH_OBJECTS, PICKLED.format(what=names_of(walked.foreign.values()))
    profile = profile_of(
        (tensor.info(name) for name, tensor in content.tensors.items()),
        framework="pytorch",
        file_format=file_format,
        file_bytes=size,
        why_not=why_not,
    )
    return replace(profile, notes=(*profile.notes, *content.notes))


def _module(module: Object, notes: list[str], size: int, stored: Callable[[Storage], int]) -> ModelProfile:
    found = module_content(module)
    _check_storages(found.tensors.values(), stored)
    return describe(
        Description(
            framework="pytorch",
            file_format=MODULE,
            file_bytes=size,
            why_not=PICKLED.format(what=found.architecture),
            layers=list(found.layers),
            parameters=found.parameters,
            dtypes=set(found.dtypes),
            family=(found.family, found.confidence),
            notes=[f"a pickled {found.architecture}", *notes],
        )
    )


def _check_storages(tensors: Iterable[Tensor], stored: Callable[[Storage], int]) -> None:
    """Raises SpecError when a tensor's numbers are not all in the file."""
    checked: dict[str, int] = {}
    for tensor in tensors:
        storage = tensor.storage
        if storage.key not in checked:
            checked[storage.key] = stored(storage)
        if storage.bytes > checked[storage.key]:
            raise unusable("the file stores less than the tensors it lists", _DAMAGED)


def names_of(names: Iterable[Global]) -> str:
    """The first few names that a pickle uses, for a sentence."""
    listed = [str(name)[:120] for name in names]
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")

"""The initial values of a part of a model, without the whole model in memory.

The user's function runs as always, so the random numbers are the same; but every large tensor it makes lives in a file
that has no name, and its pages are dropped after each operation. What stays resident is the part that is asked for, and
while it is built the largest tensor and the largest value in between. Weights are read tensor by tensor.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from protos.errors import ErrorCode, Exhausted, SpecError
from protos.jobspec import ModelSpec
from strategies import model_torch

_LARGE_BYTES = 1 << 20  # smaller tensors stay in memory


def build_part(
    spec: ModelSpec,
    code_dir: Path | None,
    weights_path: Path | None,
    seed: int,
    names: Collection[str],
    scratch_dir: Path | None = None,
) -> dict[str, Tensor]:
    """The initial values of the named parameters, buffers and tensor attributes, bit-equal to model_torch.build's.

    `scratch_dir`: a folder on a disk with room for the model; the system's temporary folder when it is not given.
    Raises what model_torch.build raises, SpecError for a name the model does not have, and Exhausted for a full disk.
    """
    if model_torch.exported_file(spec, code_dir, weights_path) is not None:
        model = model_torch.build(spec, code_dir, weights_path, seed)
        return {name: _kept(model, name) for name in names}
    model_torch.prepare(spec, code_dir, weights_path)
    with file_backed(scratch_dir):
        model = model_torch.build_unloaded(spec, code_dir, weights_path, seed)
    with model_torch.starting_values(spec, model, code_dir, weights_path) as readers:
        return {name: readers[name]() if name in readers else _kept(model, name) for name in names}


def _kept(model: nn.Module, name: str) -> Tensor:
    value = _attribute(model, name)
    if value is None:
        raise SpecError(f"the model has no tensor {name!r}", "build it as it was traced", code=ErrorCode.MODEL_UNUSABLE)
    if not _is_large(value.untyped_storage()) or value.untyped_storage().nbytes() != value.numel() * value.itemsize:
        return value.detach().clone()
    kept = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
    _copy_storage(value.untyped_storage(), kept.untyped_storage())
    return kept


def _attribute(model: nn.Module, name: str) -> Tensor | None:
    """Parameter, buffer or plain attribute: model.blocks[0].mask under "blocks.0.mask"."""
    owner, _, leaf = name.rpartition(".")
    try:
        value = getattr(model.get_submodule(owner), leaf, None)
    except AttributeError:
        return None
    return value if isinstance(value, Tensor) else None


@contextmanager
def file_backed(scratch_dir: Path | None = None) -> Iterator[None]:
    """Large tensors made inside lie in nameless files, which end with the tensors."""
    with _FileBacked(scratch_dir):
        yield


_FRESH_EMPTY = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_strided,
    torch.ops.aten.empty_like,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}
_PIECE_BYTES = 16 << 20  # copied at a time, so that source and copy are never both resident


class _FileBacked(TorchDispatchMode):
    """Moves what an operation made into a file, and drops the resident pages of what it touched."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._folder = folder

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten.set_.source_Storage_storage_offset and _is_large(args[1]):
            args = (args[0], self._moved_storage(args[1]), *args[2:])  # a deep copy makes storages by itself
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        known = {value.untyped_storage()._cdata for value in given if value.device.type == "cpu"}
        result = function(*args, **kwargs)
        empty = function._overloadpacket in _FRESH_EMPTY

        def moved(value: Tensor) -> Tensor:
            if (
                value.device.type != "cpu"
                or value.layout is not torch.strided
                or not _is_large(value.untyped_storage())
            ):
                return value
            if value.untyped_storage()._cdata in known or value.untyped_storage().data_ptr() in _maps:
                return value
            return self._moved(value, copy=not empty)

        result = tree_map_only(Tensor, moved, result)
        for value in given:
            _drop(value)
        return result

    def _moved(self, value: Tensor, *, copy: bool) -> Tensor:
        storage = value.untyped_storage()
        new = torch.empty(0, dtype=value.dtype)
        new.set_(self._file(storage.nbytes()), value.storage_offset(), value.size(), value.stride())
        if copy:
            _copy_storage(storage, new.untyped_storage())
        return new

    def _moved_storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        if storage.data_ptr() in _maps:
            return storage
        new = self._file(storage.nbytes())
        _copy_storage(storage, new)
        return new

    def _file(self, size_bytes: int) -> torch.UntypedStorage:
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                os.posix_fallocate(file.fileno(), 0, size_bytes)  # a full disk is an error here, not a signal later
                mapped = mmap.mmap(file.fileno(), size_bytes)
        except OSError as error:
            folder = self._folder or Path(tempfile.gettempdir())
            raise Exhausted(
                f"no room for {size_bytes} bytes in {folder} to build a part of the model: {error.strerror}",
                "free disk space: building a part needs about the size of the whole model",
            ) from None
        storage = torch.frombuffer(mapped, dtype=torch.uint8).untyped_storage()
        _maps[storage.data_ptr()] = mapped
        return storage


_maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by the address of the storage that keeps it


def _is_large(storage: torch.UntypedStorage) -> bool:
    return storage.device.type == "cpu" and storage.nbytes() >= _LARGE_BYTES


def _drop(value: Tensor) -> None:
    """The pages of a tensor in a file are not resident any more; the file has them."""
    if value.device.type == "cpu" and value.layout is torch.strided:
        mapped = _maps.get(value.untyped_storage().data_ptr())
        if mapped is not None:
            mapped.madvise(mmap.MADV_DONTNEED)


def _copy_storage(source: torch.UntypedStorage, target: torch.UntypedStorage) -> None:
    """Bytes, piece by piece, dropping the pages of files behind."""
    flat, copy = (torch.empty(0, dtype=torch.uint8).set_(storage) for storage in (source, target))
    for start in range(0, source.nbytes(), _PIECE_BYTES):
        copy[start : start + _PIECE_BYTES] = flat[start : start + _PIECE_BYTES]
        _drop(flat)
        _drop(copy)

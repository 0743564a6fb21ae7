"""A model that is a directory, as its readers see it: files that were opened for them, and the sizes of all others.

Owns which files are worth opening. The confined child opens nothing itself: open_folder.py does, in the parent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from coordinator.identify.tensors import unusable

OPENED_NAMES = frozenset(
    {
        "config.json", "adapter_config.json", "model.safetensors.index.json", "saved_model.pb", "keras_metadata.pb",
        "variables/variables.index",
    }
)  # fmt: skip
OPENED_SUFFIXES = (".safetensors", ".onnx")
FOLDERS = frozenset({"variables"})  # that are looked into
MAX_OPENED = 400  # the largest public models have about 200 shards
MAX_SEEN = 4_000


def worth_opening(name: str) -> bool:
    return name in OPENED_NAMES or ("/" not in name and name.endswith(OPENED_SUFFIXES))


@dataclass(frozen=True, slots=True)
class Folder:
    """`files`: what `worth_opening` names, by name; `sizes`: bytes of every regular file in it, opened or not."""

    files: Mapping[str, BinaryIO]
    sizes: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes.values())

    def read(self, name: str, limit_bytes: int) -> bytes:
        """Raises SpecError for a file that is larger."""
        if self.sizes[name] > limit_bytes:
            raise unusable(f"{name} of {self.sizes[name]} bytes is over the limit of {limit_bytes}")
        file = self.files[name]
        file.seek(0)
        return file.read(limit_bytes)

    def read_json(self, name: str, limit_bytes: int) -> dict[str, Any]:
        """Raises SpecError for what is no JSON object."""
        try:
            content = json.loads(self.read(name, limit_bytes))
        except (ValueError, RecursionError):
            raise unusable(f"{name} is not JSON that can be read", "fetch the directory again") from None
        if not isinstance(content, dict):
            raise unusable(f"{name} does not hold a mapping", "fetch the directory again")
        return content

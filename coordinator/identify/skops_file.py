"""scikit-learn models that skops wrote: schema.json says what the objects are, their arrays are .npy files beside it.

The schema is turned into the records of pickle_values, and sklearn_file reads those. No class it names is looked up.
"""

from __future__ import annotations

import json
from typing import Any

from coordinator.identify import numpy_file, sklearn_file
from coordinator.identify.archive import Archive
from coordinator.identify.pickle_harm import check_name
from coordinator.identify.pickle_values import Array, DType, Global, Mapping, Object
from coordinator.identify.pickle_walk import Walked
from coordinator.identify.tensors import WHAT_HIVE_TRAINS, foreign, unusable
from protos.model import ModelProfile

_SCHEMA = "schema.json"
_MAX_SCHEMA_BYTES = 32 * 1024 * 1024
_MAX_DEPTH = 200
_MAX_RATIO = 1100  # of deflate
_AGAIN = "the file is damaged: write it again with skops.io.dump"


def matches(leaves: frozenset[str]) -> bool:
    return _SCHEMA in leaves and "data.pkl" not in leaves


def read(archive: Archive) -> ModelProfile:
    """Raises SpecError for a schema that is none, and for arrays that are not there."""
    prefix = next(name for name in archive.entries if name.endswith(_SCHEMA)).removesuffix(_SCHEMA)
    try:
        schema = json.loads(archive.read(prefix + _SCHEMA, _MAX_SCHEMA_BYTES))
    except (ValueError, RecursionError):
        raise unusable("the schema of the skops file is not valid JSON", _AGAIN) from None
    if not isinstance(schema, dict) or "__loader__" not in schema:
        return foreign(
            "unknown", "zip", archive.size, f"a zip archive with a schema.json of its own. {WHAT_HIVE_TRAINS}"
        )
    walked = Walked()
    walked.value = _Schema(archive, prefix, walked).value(schema, 0)
    if sklearn_file.is_estimator(walked.value):
        return sklearn_file.profile(walked, "skops", archive.size)
    why_not = f"a skops file without an estimator. {WHAT_HIVE_TRAINS}"
    return foreign("scikit-learn", "skops", archive.size, why_not)


class _Schema:
    def __init__(self, archive: Archive, prefix: str, walked: Walked) -> None:
        self._archive = archive
        self._prefix = prefix
        self._walked = walked
        self._known: dict[int, Any] = {}

    def value(self, node: Any, depth: int) -> Any:
        """The record of a node of the schema. Raises SpecError for one that is nested too deeply."""
        if depth > _MAX_DEPTH:
            raise unusable("the schema of the skops file is nested too deeply", _AGAIN)
        if not isinstance(node, dict):
            return None
        identity = node.get("__id__")
        if node.get("__loader__") == "CachedNode":
            return self._known.get(identity) if isinstance(identity, int) else None
        made = self._made(node, depth)
        if isinstance(identity, int):
            self._known[identity] = made
        return made

    def _made(self, node: dict[str, Any], depth: int) -> Any:
        content = node.get("content")
        match node.get("__loader__"):
            case "JsonNode":
                return _plain(content)
            case "ListNode" | "SetNode":
                return [self.value(item, depth + 1) for item in _listed(content)]
            case "TupleNode":
                return tuple(self.value(item, depth + 1) for item in _listed(content))
            case "DictNode" | "DefaultDictNode" | "OrderedDictNode":
                items = content.items() if isinstance(content, dict) else ()
                return Mapping({key: self.value(item, depth + 1) for key, item in items})
            case "NdArrayNode" | "MaskedArrayNode":
                return self._array(node, depth)
            case _:
                name = Global(str(node.get("__module__"))[:200], str(node.get("__class__"))[:200])
                check_name(name.module, name.name)
                self._walked.foreign.setdefault(str(name), name)
                return Object(name, state=self.value(content, depth + 1))

    def _array(self, node: dict[str, Any], depth: int) -> Array:
        if isinstance(content := node.get("content"), dict):  # of Python objects, one after the other
            objects = self.value(content, depth + 1)
            listed = objects if isinstance(objects, list) else []
            return Array((len(listed),), DType("O8", 8), listed)
        name = f"{self._prefix}{node.get('file')}"
        dtype, shape = numpy_file.array_in(self._archive, name)
        entry = self._archive.entries[name]
        if entry.file_size > entry.compress_size * _MAX_RATIO + 4096:
            raise unusable(f"the array {name[:80]!r} claims more than is stored", _AGAIN)
        return Array(shape, _type(dtype))


def _type(name: str) -> DType:
    """From safetensors' name; anything but numbers has no size of interest."""
    if name == "BOOL":
        return DType("b1", 1)
    bits = name[1:]
    return DType(f"{name[0].lower()}{int(bits) // 8}", int(bits) // 8) if bits.isdecimal() else DType(name, 0)


def _listed(content: Any) -> list[Any]:
    return content if isinstance(content, list) else []


def _plain(content: Any) -> Any:
    try:
        return json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        return content

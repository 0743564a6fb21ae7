"""Whether a torch.export archive can be read without running code that lies in it.

torch's reader unpickles some entries, evaluates the expressions of sizes as Python, looks operators up by dotted name,
and writes the names of values into source that it compiles. Everything is read here first, with torch's own archive
reader, and refused unless: each entry is one of a plain program's, no tensor is pickled, the example inputs load with
`weights_only`, and names, expressions, operators and trees of inputs are of the kinds that export writes for a model.
"""

from __future__ import annotations

import io
import json
import math
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive._package import PT2ArchiveReader

from protos.errors import ErrorCode, SpecError

_PROGRAM = "models/model.json"
_EXAMPLES = "data/sample_inputs/model.pt"
_PAYLOADS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_ENTRIES = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/(weights/(weight_\d+|model_weights_config\.json)|constants/(tensor_\d+|model_constants_config\.json))"
    r"|extra/[\w.-]+"
)
_MAX_DOCUMENT_BYTES = 256 << 20
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NAMED_KEYS = ("name", "as_name", "class_fqn")
_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_]\w*)|'[\w.+-]*'|\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.])|[()=,+*/<>!&|~-])")
_MAX_EXPRESSION_CHARACTERS = 4_000
_SYMBOL = re.compile(r"[suzf]+\d+")
_EXPRESSION_WORDS = """
    Symbol Integer Float Rational Add Mul Pow Max Min Mod And Or Not Eq Ne Lt Le Gt Ge Abs floor ceiling
    Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan true false True False oo int_oo
    Half One Zero NegativeOne FloorDiv ModularIndexing Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv LShift
    RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat
    Identity IsNonOverlappingAndDenseIndicator integer positive negative nonnegative nonpositive nonzero zero real
    finite precision evaluate
"""
_EXPRESSION_NAMES = frozenset(_EXPRESSION_WORDS.split())
_OPERATOR_WORDS = """
    add sub mul truediv floordiv mod pow neg pos abs and_ or_ xor not_ invert lshift rshift eq ne lt le gt ge
    getitem
"""
_OPERATOR_NAMES = frozenset(_OPERATOR_WORDS.split())
_SYMBOL_OPERATORS = re.compile(r"_?sym_[a-z0-9_]+")
_LIBRARIES = ("aten", "prims")
_FILE_OPERATORS = ("from_file", "save", "load", "_print", "warn")
_HIGHER_ORDER = ("cond", "wrap_with_set_grad_enabled", "wrap_with_autocast")
_TREES = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def check_archive(path: Path) -> None:
    """Raises SpecError for what would run code, and what torch's reader raises for a file that is no archive."""
    with PT2ArchiveReader(str(path)) as archive:
        names = archive.get_file_names()
        for name in names:
            if not _ENTRIES.fullmatch(name):
                raise _refused(path, f"it holds {name[:80]!r}, which is no part of a plain torch.export program")
        if _PROGRAM not in names or len(set(names)) != len(names):
            raise _refused(path, "it is not one torch.export program")
        for name in _PAYLOADS:
            for tensor, payload in _document(path, archive, name).get("config", {}).items():
                if payload.get("use_pickle") is not False or "/" in str(payload.get("path_name", "/")):
                    raise _refused(path, f"its tensor {str(tensor)[:80]!r} is pickled or lies elsewhere")
        if _EXAMPLES in names:
            try:
                torch.load(io.BytesIO(archive.read_bytes(_EXAMPLES)), weights_only=True)
            except Exception:  # whatever a hostile file provokes in the reader
                raise _refused(path, "its example inputs hold more than tensors and plain values") from None
        _check_program(path, _document(path, archive, _PROGRAM))


def _document(path: Path, archive: PT2ArchiveReader, name: str) -> dict[str, Any]:
    content = archive.read_bytes(name)
    if len(content) > _MAX_DOCUMENT_BYTES:
        raise _refused(path, f"{name} is too large")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise _refused(path, f"{name} is not a JSON object")
    return document


def _check_program(path: Path, program: dict[str, Any]) -> None:
    for here in _objects(program):
        for key in _NAMED_KEYS:
            value = here.get(key)
            if isinstance(value, str) and value and not _NAME.fullmatch(value):
                raise _refused(path, f"{value[:80]!r} is not the name of a value")
        if not is_plain_expression(here.get("expr_str", "0")):
            raise _refused(path, f"the size {str(here['expr_str'])[:80]!r} is not a plain expression")
        if here.get("as_operator") is not None or here.get("as_custom_obj") is not None:
            raise _refused(path, "it passes operators or objects as values")
        if "target" in here and "inputs" in here and not _is_plain_operator(here["target"]):
            raise _refused(path, f"it calls {str(here['target'])[:80]!r}, which is no operator of torch's own")
        for key in ("in_spec", "out_spec"):
            if here.get(key) is not None and not _is_plain_tree(here[key]):
                raise _refused(path, "its inputs or outputs are objects", _PLAIN_OUTPUTS)
        for key in ("forward_arg_names", "inputs_names"):
            if not all(isinstance(each, str) and _NAME.fullmatch(each) for each in here.get(key) or []):
                raise _refused(path, "an argument has a name that is none")


_PLAIN_OUTPUTS = "export a module that takes and returns tensors, tuples or dicts of them"


def _objects(document: Any) -> Iterator[dict[str, Any]]:
    todo = [document]
    while todo:
        here = todo.pop()
        if isinstance(here, dict):
            yield here
            todo.extend(here.values())
        elif isinstance(here, list):
            todo.extend(here)


def is_plain_expression(text: object) -> bool:
    """Numbers, symbols and the functions of sizes: what can be evaluated as Python and is nothing but arithmetic."""
    if not isinstance(text, str) or len(text) > _MAX_EXPRESSION_CHARACTERS or "**" in text:
        return False
    position, text = 0, text.rstrip()
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            return False
        name = token["name"]
        if name is not None and name not in _EXPRESSION_NAMES and not _SYMBOL.fullmatch(name):
            return False
        position = token.end()
    return True


def _is_plain_operator(target: object) -> bool:
    """Resolved as torch does, and then looked at."""
    if not isinstance(target, str):
        return False
    library, _, name = target.partition(".")
    if library == "_operator":
        return name in _OPERATOR_NAMES and hasattr(operator, name)
    if library == "math":
        return not name.startswith("_") and callable(getattr(math, name, None))
    parts = target.split(".")
    if len(parts) == 2 and library == "torch":
        return _SYMBOL_OPERATORS.fullmatch(name) is not None and callable(getattr(torch, name, None))
    if parts[:2] != ["torch", "ops"] or not all(_NAME.fullmatch(part) for part in parts):
        return False
    if parts[2:3] == ["higher_order"]:
        return len(parts) == 4 and parts[3] in _HIGHER_ORDER
    if len(parts) != 5 or parts[2] not in _LIBRARIES or parts[3] in _FILE_OPERATORS:
        return False
    found = getattr(getattr(getattr(torch.ops, parts[2]), parts[3], None), parts[4], None)
    return isinstance(found, torch._ops.OpOverload) and found.namespace in _LIBRARIES


def _is_plain_tree(text: object) -> bool:
    try:
        tree = json.loads(text) if isinstance(text, str) and "__enum__" not in text else None
    except (ValueError, RecursionError):
        return False
    return isinstance(tree, list) and all(here.get("type") in _TREES for here in _objects(tree))


def _refused(path: Path, why: str, hint: str = "") -> SpecError:
    return SpecError(
        f"{path.name} is not loaded: {why}",
        hint or "hive reads programs written by torch.export.save that hold tensors and torch's own operators only",
        code=ErrorCode.MODEL_UNUSABLE,
    )

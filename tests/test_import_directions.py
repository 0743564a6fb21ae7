"""The import law of docs/architecture.md, read from the sources, and what the daemons really load."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT: dict[str, frozenset[str]] = {
    "protos": frozenset(),
    "qtable": frozenset(),
    "strategies": frozenset({"protos"}),
    "node": frozenset({"protos", "strategies"}),
    "coordinator": frozenset({"protos", "strategies", "qtable"}),
}
NEVER = frozenset({"tests", "bench", "examples", "hive"})
TORCH = ("torch", "torchvision", "safetensors.torch")


def sources(room: str) -> list[Path]:
    return sorted(path for path in (ROOT / room).rglob("*.py") if "gen" not in path.parts)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also inside functions; `from a import b` gives both a and a.b."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.lineno, node.module or ""
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and _is_import_call(node):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value


def _is_import_call(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("import_module", "__import__")


def is_torch(name: str) -> bool:
    return any(name == torch or name.startswith(f"{torch}.") for torch in TORCH)


def broken(room: str) -> list[str]:
    """Every import of a room that the law forbids, as FILE:LINE imports NAME."""
    found = []
    for path in sources(room):
        for line, name in imports(path):
            top = name.split(".")[0]
            foreign = top in MAY_IMPORT and top != room and top not in MAY_IMPORT[room]
            half = room == "coordinator" and any(part.endswith("_torch") for part in name.split("."))
            torch = is_torch(name) and not path.name.endswith("_torch.py")
            if foreign or half or torch or top in NEVER:
                found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    assert sources(room)
    assert broken(room) == []


@pytest.mark.parametrize("room", ["protos", "qtable"])
def test_the_lowest_rooms_have_no_half_that_needs_torch(room: str) -> None:
    assert [path.name for path in sources(room) if path.name.endswith("_torch.py")] == []


@pytest.mark.parametrize("package", ["grpc", "sqlalchemy", "fastapi", "pickle"])
def test_the_learning_room_is_pure(package: str) -> None:
    used = {name.split(".")[0] for path in sources("qtable") for _, name in imports(path)}
    assert package not in used


def test_only_one_side_of_each_seam_opens_it() -> None:
    """One file talks SQL per kind of statement: SQLAlchemy stays below coordinator/store."""
    outside = [
        f"{path.relative_to(ROOT)}:{line}"
        for room in MAY_IMPORT
        for path in sources(room)
        for line, name in imports(path)
        if name.split(".")[0] in ("sqlalchemy", "alembic", "sqlite3") and "store" not in path.parts
    ]
    assert outside == []


def test_pickle_is_nowhere_loaded() -> None:
    readers = [
        f"{path.relative_to(ROOT)}:{line}"
        for room in MAY_IMPORT
        for path in sources(room)
        for line, name in imports(path)
        if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
    ]
    assert readers == []


def test_the_sdk_only_re_exports() -> None:
    tops = {name.split(".")[0] for _, name in imports(ROOT / "hive.py")}
    assert tops <= {"__future__", "coordinator", "protos", "typing"}


def test_the_law_sees_what_it_forbids(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("def f():\n    import torch.nn\n    from safetensors.torch import load\n    __import__('torch')\n")
    assert [(line, name) for line, name in imports(path) if is_torch(name)] == [
        (2, "torch.nn"), (3, "safetensors.torch"), (3, "safetensors.torch.load"), (4, "torch")
    ]  # fmt: skip


def loaded(statement: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("coordinator.cli.main", {"torch", "numpy", "grpc", "pydantic", "rich", "sqlalchemy", "node"}),
        ("coordinator.app", {"torch", "safetensors", "node"}),
        ("node.daemon", {"torch", "numpy", "coordinator", "sqlalchemy"}),
        ("node.cli", {"torch", "numpy", "coordinator", "grpc"}),
        ("hive", {"torch", "node"}),
    ],
)
def test_importing_it_leaves_out(module: str, absent: set[str]) -> None:
    assert loaded(f"import {module}") & absent == set()


@pytest.mark.parametrize(("module", "program"), [("coordinator.cli.main", "hive"), ("node.cli", "hive-node")])
def test_help_needs_neither_grpc_nor_pydantic_nor_rich(module: str, program: str) -> None:
    statement = (
        f"import sys; sys.argv = [{program!r}, '--help']\n"
        f"from {module} import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    )
    assert loaded(statement) & {"grpc", "pydantic", "rich", "torch", "numpy", "sqlalchemy", "yaml"} == set()

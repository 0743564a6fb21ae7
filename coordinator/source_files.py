"""Which Python files an entry point needs: found by syntax tree, nothing is imported or executed.

Owns: following imports from a file to the .py files beside it. Refuses: source that does not parse. Imports that are
made at run time (importlib, __import__) are not seen.
"""

from __future__ import annotations

import ast
from pathlib import Path

from protos.errors import ErrorCode, SpecError


def imported_files(entry: Path, folder: Path) -> list[Path]:
    """The entry file and every .py file that it imports, transitively, from its own folder or from the job's."""
    found: list[Path] = []
    todo = [entry]
    while todo:
        file = todo.pop()
        if file in found:
            continue
        found.append(file)
        for root in {entry.parent, folder} & set(file.parents):
            for module in _imports(file, root):
                todo.extend(_module_files(root, module))
    return found


def _tree(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes(), filename=str(file))
    except SyntaxError as error:
        raise SpecError(
            f"{file}, line {error.lineno}: {error.msg}",
            "fix the syntax; nothing was submitted",
            code=ErrorCode.MODEL_UNUSABLE,
        ) from None
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{file} is not Python source: {error}", "", code=ErrorCode.MODEL_UNUSABLE) from None


def names_defined(file: Path) -> set[str]:
    """Top-level names, also those bound by an import or an assignment, in if and try blocks too."""
    names: set[str] = set()
    blocks: list[ast.AST] = [_tree(file)]
    while blocks:
        for node in ast.iter_child_nodes(blocks.pop()):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    names.add(name)
                case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                    names.update((alias.asname or alias.name).partition(".")[0] for alias in aliases)
                case ast.Name(id=name, ctx=ast.Store()):
                    names.add(name)
                case ast.expr():
                    pass
                case _:
                    blocks.append(node)
            if isinstance(node, ast.Tuple | ast.List):
                blocks.append(node)
    return names


def _imports(file: Path, root: Path) -> set[tuple[str, ...]]:
    """Absolute module paths that a file may mean, relative imports resolved against its place below root."""
    package = file.parent.relative_to(root).parts
    modules: set[tuple[str, ...]] = set()
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            modules.update(tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            modules.update((*base, alias.name) for alias in node.names)
            modules.add(base)
    return modules


def _module_files(root: Path, module: tuple[str, ...]) -> list[Path]:
    """Files of a dotted module below root: the packages on the way and the module; none when it lies elsewhere."""
    files = []
    here = root
    for part in module:
        package, file = here / part / "__init__.py", here / f"{part}.py"
        if file.is_file() and not package.is_file():
            files.append(file.resolve())
            break
        if package.is_file():
            files.append(package.resolve())
        here = here / part
        if not here.is_dir():
            break
    return [file for file in files if file.is_relative_to(root)]

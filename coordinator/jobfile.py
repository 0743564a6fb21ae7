"""The job file as a person wrote it, with `--set` applied, as a JobSpec. Nothing else of the disk is touched here."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from protos import limits
from protos.errors import NotFound, SpecError
from protos.jobspec import JobSpec, parse


def read_job(path: Path, overrides: Iterable[str] = ()) -> JobSpec:
    """The job file with `key.path=value` overrides (values are YAML). Raises SpecError or NotFound."""
    try:
        text = _text(path)
    except FileNotFoundError:
        raise NotFound(f"there is no job file {path}", "give the path of a YAML file; see examples/digits") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"the job file {path} cannot be read: {error}", "give a text file") from None
    document = _yaml(text, f"the job file {path}")
    for override in overrides:
        document = overridden(document, override)
    return parse(document)


def _text(path: Path) -> str:
    """Never reads without an end: devices and pipes are refused before they are opened."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise SpecError(f"the job file {path} is not a file", "give the path of a YAML file; see examples/digits")
    with path.open("rb") as file:
        content = file.read(limits.MAX_JOB_SPEC_BYTES + 1)
    if len(content) > limits.MAX_JOB_SPEC_BYTES:
        raise SpecError(f"the job file is over {limits.MAX_JOB_SPEC_BYTES} bytes", "put data into a file of its own")
    return content.decode()


def overridden(document: Any, override: str) -> Any:
    """The document with one `a.b.c=value` applied; missing mappings on the way are made."""
    key, equals, raw = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise SpecError(f"--set {override}: not KEY=VALUE", "for example --set train.epochs=5")
    value = _yaml(raw, f"--set {key}")
    if not isinstance(document, dict):
        return document
    changed = dict(document)
    here = changed
    for part in parts[:-1]:
        below = here.get(part)
        if below is not None and not isinstance(below, dict):
            raise SpecError(f"--set {key}: {part} is a value, not a section", "set it as a whole")
        here[part] = dict(below or {})
        here = here[part]
    here[parts[-1]] = value
    return changed


def _yaml(text: str, what: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise SpecError(f"{what} is not valid YAML{place}: {problem}", "check indentation and colons") from None
    except RecursionError:
        raise SpecError(f"{what} is nested too deeply", "flatten it") from None

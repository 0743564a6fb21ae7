"""Layered settings: flags over environment over a TOML file over defaults, and each value knows where it came from.

Owns: the order of the layers, HIVE_HOME, and the sentence that names the layer a wrong value came from. Refuses:
unknown keys in a file (the nearest valid one is named). Pure but for reading the file it is given; logs no value.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from protos.errors import ErrorCode, HiveError


class Source(StrEnum):
    FLAG = "flag"
    ENVIRONMENT = "environment"
    FILE = "file"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Setting:
    """One value: its key in files, how text or a TOML value becomes it, and what it is without any layer."""

    key: str
    parse: Callable[[Any], Any]
    default: Any = None
    variable: str = ""  # environment variable; HIVE_<KEY> when empty
    secret: bool = False

    @property
    def environment(self) -> str:
        return self.variable or "HIVE_" + self.key.upper()


@dataclass(frozen=True, slots=True)
class Resolved:
    values: Mapping[str, Any]
    sources: Mapping[str, str] = field(default_factory=dict)  # key -> "flag", "environment HIVE_NAME", "file PATH"...


def home_folder(flag: str | os.PathLike[str] | None, environment: Mapping[str, str]) -> tuple[Path, str]:
    """HIVE_HOME, the one folder hive writes in, and which layer named it."""
    if flag:
        return Path(flag).expanduser().resolve(), Source.FLAG.value
    if named := environment.get("HIVE_HOME"):
        return Path(named).expanduser().resolve(), f"{Source.ENVIRONMENT} HIVE_HOME"
    import platformdirs

    return Path(platformdirs.user_data_dir("hive", appauthor=False)), Source.DEFAULT.value


def resolve(
    settings: Sequence[Setting], flags: Mapping[str, Any], environment: Mapping[str, str], file: Path
) -> Resolved:
    """Each setting from the first layer that has it. A flag that is None (or an empty tuple) was not given."""
    document = _read(file, [setting.key for setting in settings])
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for setting in settings:
        raw, source = _first_layer(setting, flags, environment, document, file)
        if source == Source.DEFAULT:
            values[setting.key] = setting.default
        else:
            try:
                values[setting.key] = setting.parse(raw)
            except HiveError as error:  # already a whole sentence; a flag is where one looks first
                where = "" if source == Source.FLAG else f"{source}: {setting.key}: "
                raise HiveError(where + error.message, error.hint, code=ErrorCode.USAGE) from None
            except (TypeError, ValueError) as error:
                raise HiveError(f"{source}: {setting.key}: {error}", "", code=ErrorCode.USAGE) from None
        sources[setting.key] = source
    return Resolved(values, sources)


def _first_layer(
    setting: Setting,
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    document: Mapping[str, Any],
    file: Path,
) -> tuple[Any, str]:
    flag = flags.get(setting.key)
    if flag is not None and flag != ():
        return flag, Source.FLAG.value
    if environment.get(setting.environment, "") != "":
        return environment[setting.environment], f"{Source.ENVIRONMENT} {setting.environment}"
    if setting.key in document:
        return document[setting.key], f"{Source.FILE} {file}"
    return None, Source.DEFAULT.value


def _read(file: Path, keys: list[str]) -> Mapping[str, Any]:
    try:
        document = tomllib.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise HiveError(f"{file} cannot be read: {error}", "fix or remove the file", code=ErrorCode.USAGE) from None
    except tomllib.TOMLDecodeError as error:
        raise HiveError(f"{file} is not valid TOML: {error}", "fix or remove the file", code=ErrorCode.USAGE) from None
    for key in document:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise HiveError(f"{file}: unknown key {key!r}{meant}", f"known: {', '.join(keys)}", code=ErrorCode.USAGE)
    return document


def boolean(raw: Any) -> bool:
    """true/false, yes/no, on/off, 1/0."""
    if isinstance(raw, bool):
        return raw
    text = str(raw).strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{raw!r} is not true or false")


def text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError(f"{raw!r} is not text")
    return raw.strip()


def port(raw: Any) -> int:
    """0 (any free port) to 65535."""
    if isinstance(raw, bool):
        raise ValueError(f"{raw!r} is not a port number")
    try:
        number = int(raw)
    except (TypeError, ValueError):
        raise ValueError(f"{raw!r} is not a port number") from None
    if not 0 <= number <= 65535:
        raise ValueError(f"port {number} is not between 0 and 65535")
    return number


def listing(raw: Any) -> tuple[str, ...]:
    """A comma-separated text, a TOML list or a tuple of flags, as a tuple without empty parts."""
    parts = raw.split(",") if isinstance(raw, str) else raw
    if not isinstance(parts, list | tuple):
        raise ValueError(f"{raw!r} is not a list")
    return tuple(text(part) for part in parts if text(part))

"""The pages say what is so: files, functions, commands and flags exist; diagrams, keys and reasons are complete."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click
import pytest
from pydantic import BaseModel

from coordinator.cli.main import cli as hive
from node.cli import cli as hive_node
from protos import states
from protos.jobspec import JobSpec, parse_text

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
PROGRAMS: dict[str, click.Command] = {"hive": hive, "hive-node": hive_node}

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#:]+)\)")
SOURCE = re.compile(r"^(?:[\w.-]+/)*[\w.-]+\.(?:py|proto|md|yaml)$")  # not what hive writes below HIVE_HOME
FOLDER = re.compile(r"^(?:tests|docs|examples|bench|coordinator/(?:cli|control|store)|strategies/data)(?:/\w+)*/?$")
NAMED = re.compile(r"`([A-Za-z_][\w.]*)`(?:,| of| \()\s*`([\w/]+\.py)`")  # `Function`, `file.py` and the like
WRITTEN_BY_USERS = {"model.py", "job.yaml", "strategies/NAME.py"}


def spans(page: Path) -> Iterator[str]:
    yield from SPAN.findall(FENCE.sub("", page.read_text()))


def commands(page: Path) -> Iterator[list[str]]:
    """Every command line in code, as words: of spans, of fenced blocks, and of tables headed by a program."""
    text = page.read_text()
    lines = [span for span in spans(page) if span.split()[0] in PROGRAMS]
    lines += [line for block in FENCE.findall(text) for line in block.splitlines()]
    program = ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")]
        if not line.startswith("|"):
            program = ""
        elif cells[0].strip("`") in PROGRAMS and cells[0].startswith("`"):
            program = cells[0].strip("`")
        elif program:
            lines += [f"{program} {span}" for span in SPAN.findall(cells[0])]
    for line in lines:
        words = re.sub(r"\s(?:#|&&|\().*", "", line).replace("\0", "|").replace("\\|", "|").split()
        while words and re.match(r"^HIVE_\w+=", words[0]):
            words.pop(0)
        if len(words) > 1 and words[0] in PROGRAMS:
            yield [word.strip("[],") for word in words]


def command_of(words: list[str]) -> click.Command:
    command = PROGRAMS[words[0]]
    for word in words[1:]:
        if not isinstance(command, click.Group) or word.startswith("-") or word == "...":
            break
        for name in word.split("|"):
            found = command.get_command(click.Context(command), name)
            assert found is not None, f"there is no command {' '.join(words)!r}"
        command = found
    return command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_folder_that_a_page_names_exists(page: Path) -> None:
    named = [span for span in spans(page) if span not in WRITTEN_BY_USERS]
    missing = [span for span in named if SOURCE.match(span) and not (ROOT / span).is_file()]
    missing += [span for span in named if FOLDER.match(span) and not (ROOT / span).exists()]
    missing += [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_flag_that_a_page_names_exists(page: Path) -> None:
    for words in commands(page):
        command = command_of(words)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        wrong = {word for word in words if word.startswith("--")} - known - {"--help"}
        assert not wrong, f"{' '.join(words)}: no {', '.join(sorted(wrong))}"


def test_the_journey_names_functions_where_they_are() -> None:
    named = NAMED.findall((ROOT / "docs" / "journey.md").read_text())
    assert len(named) > 30
    for name, file in named:
        last = name.rpartition(".")[2]
        assert re.search(rf"(?:def|class) {last}\b", (ROOT / file).read_text()), f"{name} is not in {file}"


def test_the_architecture_page_has_the_diagrams_of_the_state_tables() -> None:
    assert states.diagram() in (ROOT / "docs" / "architecture.md").read_text()


def test_the_operations_page_explains_every_reason() -> None:
    explained = set(spans(ROOT / "docs" / "operations.md"))
    assert {reason.value for reason in states.Reason} <= explained


def described_keys() -> dict[str, str]:
    """Key -> default, from the tables of docs/jobspec.md that are headed `key`."""
    found: dict[str, str] = {}
    inside = False
    for line in (ROOT / "docs" / "jobspec.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        inside = line.startswith("|") and (inside or cells[0] == "key")
        if inside and cells[0].startswith("`"):
            found[cells[0].strip("`")] = cells[1].strip("`")
    return found


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if nested:
            yield from keys_of(nested[0], f"{prefix}{name}.")
        elif field.is_required():
            yield prefix + name, "required"
        else:
            yield prefix + name, json.dumps(field.get_default(call_default_factory=True))


def test_the_job_file_page_lists_every_key_with_its_default() -> None:
    assert described_keys() == dict(keys_of(JobSpec))


def test_the_readme_s_own_job_file_is_valid() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert [parse_text(block).name for block in blocks] == ["flowers"]

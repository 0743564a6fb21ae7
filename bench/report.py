"""What a benchmark found: figures with their gates, as a table for people and as one JSON document. Pure.

Invariant: a figure with a gate says pass or fail; one without is printed and judged by nobody.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from bench.paired import Comparison, Estimate

SCHEMA = "hive-bench/v1"


class Bound(StrEnum):
    AT_LEAST = ">="
    BELOW = "<"
    EXACTLY = "="


@dataclass(frozen=True, slots=True)
class Gate:
    bound: Bound
    limit: float

    def passes(self, value: float) -> bool:
        match self.bound:
            case Bound.AT_LEAST:
                return value >= self.limit
            case Bound.BELOW:
                return value < self.limit
            case Bound.EXACTLY:
                return value == self.limit

    def __str__(self) -> str:
        return f"{self.bound.value} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number. `low` and `high` are an interval or a range, as `note` says."""

    name: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    gate: Gate | None = None
    note: str = ""

    @property
    def passed(self) -> bool | None:
        return None if self.gate is None else self.gate.passes(self.value)


@dataclass(frozen=True, slots=True)
class Finding:
    """One benchmark's figures; `detail` holds the single measurements, for the JSON document only."""

    name: str
    figures: tuple[Figure, ...]
    detail: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""  # why it could not be measured: then it has not passed

    @property
    def passed(self) -> bool:
        return not self.error and all(figure.passed is not False for figure in self.figures)


def figure_of(name: str, found: Estimate, unit: str = "", gate: Gate | None = None, note: str = "") -> Figure:
    return Figure(name, found.median, unit, found.low, found.high, gate, note)


def ratio_figures(name: str, found: Comparison, gate: Gate | None) -> tuple[Figure, Figure]:
    """The ratio and its A/A control."""
    note = "noisy machine: see the control" if found.noisy else ""
    return (
        figure_of(f"{name}: ratio", found.ratio, "x", gate, note),
        figure_of(f"{name}: A/A control", found.control, "x", None, f"{found.rounds} rounds"),
    )


def machine() -> dict[str, Any]:
    """Where the figures were measured, and how busy it was."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "load": list(os.getloadavg()),
    }


def document(findings: Sequence[Finding], options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "options": dict(options),
        "passed": all(finding.passed for finding in findings),
        "benchmarks": [_plain(finding) for finding in findings],
    }


def _plain(finding: Finding) -> dict[str, Any]:
    figures = [
        asdict(figure) | {"gate": None if figure.gate is None else str(figure.gate), "passed": figure.passed}
        for figure in finding.figures
    ]
    return {
        "name": finding.name,
        "passed": finding.passed,
        "seconds": round(finding.seconds, 1),
        "error": finding.error,
        "figures": figures,
        "detail": dict(finding.detail),
    }


def table(findings: Sequence[Finding]) -> str:
    """One line per figure, aligned."""
    head = ("benchmark", "figure", "value", "interval", "gate", "", "note")
    rows = [head]
    for finding in findings:
        rows += [_row(finding.name, figure) for figure in finding.figures]
        if finding.error:
            rows.append((finding.name, "not measured", "", "", "", "FAIL", finding.error.splitlines()[0][:200]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(findings: Sequence[Finding]) -> str:
    """The same as a table of Markdown, without notes; what could not be measured is a row, too."""
    lines = ["| figure | value | interval | gate |", "|---|---|---|---|"]
    for finding in findings:
        for _, name, value, interval, gate, verdict, _ in (_row(finding.name, figure) for figure in finding.figures):
            said = {"": "", "pass": f"{gate}, met", "FAIL": f"{gate}, **not met**"}[verdict]
            lines.append(f"| {name} | {value} | {interval} | {said} |")
        if finding.error:
            lines.append(f"| {finding.name} | not measured | | {finding.error.splitlines()[0][:200]} |")
    return "\n".join(lines)


def _row(benchmark: str, figure: Figure) -> tuple[str, str, str, str, str, str, str]:
    interval = "" if figure.low is None or figure.high is None else f"{_short(figure.low)} .. {_short(figure.high)}"
    verdict = {None: "", True: "pass", False: "FAIL"}[figure.passed]
    value = f"{_short(figure.value)} {figure.unit}".strip()
    return (benchmark, figure.name, value, interval, str(figure.gate or ""), verdict, figure.note)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}"

"""A model's profile as text for people. Pure: the document of docs/json.md in, lines out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.cli.render import safe
from protos.command_line import human_bytes, table

_WHERE_FROM = {
    "table": "from the table of sizes",
    "layers": "from its layers",
    "unknown": "",
}
_PREFIXES = ("", " k", " M", " G", " T", " P")


def model(row: Mapping[str, Any], layers: int) -> str:
    """One fact a line, then the first `layers` layers."""
    row = safe(row)
    facts: list[tuple[str, str]] = [
        ("model", row.get("source", "")),
        ("format", _format(row)),
        ("family", _family(row)),
        ("parameters", _parameters(row)),
        (
            "bytes",
            ", ".join(part for part in (human_bytes(row.get("bytes")), " ".join(row.get("dtypes") or ())) if part),
        ),
        ("input", str(tuple(row["input_shape"])) if row.get("input_shape") else ""),
        ("work", _work(row.get("layers") or ())),
        ("needs", _needs(row.get("requirements") or {})),
        ("confidence", f"{row.get('confidence', 0.0):.0%}"),
        ("not known", ", ".join(name.replace("_", " ") for name in row.get("unknown") or ())),
        *(("note", note) for note in row.get("notes") or ()),
        ("trainable", _trainable(row)),
        ("seen by", row.get("seen_by", "")),
        ("hint", row.get("hint", "")),
    ]
    lines = [f"{name:<11}{value}" for name, value in facts if value]
    return "\n".join([*lines, *_layers(row.get("layers") or (), layers)])


def _format(row: Mapping[str, Any]) -> str:
    return f"{row.get('format')} of {row.get('framework')}" if row.get("format") != "unknown" else "unknown"


def _family(row: Mapping[str, Any]) -> str:
    task = row.get("task") or "unknown"
    return str(row.get("family")) + ("" if task == "unknown" else f", for {task.replace('_', ' ')}")


def _parameters(row: Mapping[str, Any]) -> str:
    if "parameters" in (row.get("unknown") or ()):
        return ""
    return f"{row.get('parameters', 0):,} ({row.get('complexity')})"


def _work(layers: Sequence[Mapping[str, Any]]) -> str:
    flops = sum(layer.get("flops_per_sample") or 0.0 for layer in layers)
    kept = sum(layer.get("activation_bytes_per_sample") or 0.0 for layer in layers)
    said = [f"{amount(flops)}FLOP forward"] if flops else []
    said += [f"{human_bytes(kept)} kept for backward"] if kept else []
    return ", ".join(said) + (", each of one sample" if said else "")


def _needs(need: Mapping[str, Any]) -> str:
    """The numbers, those from one source together."""
    if not need.get("memory_bytes"):
        return ""
    numbers = [
        (f"{need['cores']:g} cores", "cores_source"),
        (f"{human_bytes(need['memory_bytes'])} memory", "source"),
        (f"{human_bytes(need.get('gpu_memory_bytes'))} on a GPU", "source"),
        (f"{need.get('hours', 0.0):g} h", "hours_source"),
    ]
    said: dict[str, list[str]] = {}
    for number, source in numbers:
        said.setdefault(_WHERE_FROM.get(str(need.get(source)), ""), []).append(number)
    return "; ".join(", ".join(those) + (f" ({where})" if where else "") for where, those in said.items())


def _trainable(row: Mapping[str, Any]) -> str:
    why_not = row.get("why_not") or ""
    if row.get("trainable"):
        return "yes" + (f": {why_not}" if why_not else "")
    return f"no: {why_not}" if why_not else "no"


def _layers(layers: Sequence[Mapping[str, Any]], shown: int) -> list[str]:
    if not layers or not shown:
        return []
    cells = [
        (
            layer.get("name"),
            layer.get("kind"),
            f"{layer.get('parameters', 0):,}",
            amount(layer["flops_per_sample"]) if layer.get("flops_per_sample") else None,
            human_bytes(layer["activation_bytes_per_sample"]) if layer.get("activation_bytes_per_sample") else None,
            "x".join(map(str, layer.get("output_shape") or ())),
        )
        for layer in layers[:shown]
    ]
    lines = ["", table(["LAYER", "KIND", "PARAMETERS", "FLOP", "KEPT", "OUTPUT"], cells)]
    left = len(layers) - shown
    return [*lines, f"and {left} more: --layers {len(layers)}, or -o json"] if left > 0 else lines


def amount(number: float) -> str:
    """1.8 G of 1.8e9."""
    step = 0
    while number >= 1000 and step < len(_PREFIXES) - 1:
        number, step = number / 1000, step + 1
    return f"{number:.3g}{_PREFIXES[step]}"

"""Documents as text for people. Pure: a document in, lines out; a field that is missing is shown as a dash.

Names and messages come from others: no character of theirs that a terminal would obey gets through.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from protos.command_line import human_bytes, human_seconds, paint, table
from protos.printable import printable

_NAMED = 3
_STATE_COLOURS = {
    "SUCCEEDED": "green",
    "FAILED": "red",
    "CANCELLED": "yellow",
    "RUNNING": "cyan",
    "CONNECTED": "green",
    "LOST": "red",
}


def safe(value: Any) -> Any:
    """A document of others with every text of it printable; tabs stay, for the lines of a traceback."""
    if isinstance(value, str):
        return printable(value, "\t")
    if isinstance(value, Mapping):
        return {safe(key): safe(part) for key, part in value.items()}
    return [safe(part) for part in value] if isinstance(value, list | tuple) else value


def state(name: str | None) -> str:
    name = name or "-"
    return paint(name, _STATE_COLOURS[name]) if name in _STATE_COLOURS else name


def number(value: Any, digits: int = 4) -> str | None:
    return None if value is None else f"{float(value):.{digits}g}"


def clock(unix_s: float | None) -> str | None:
    return None if not unix_s else datetime.fromtimestamp(unix_s).strftime("%Y-%m-%d %H:%M:%S")


def jobs(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no jobs; submit one with hive submit JOB.yaml"
    cells = [
        (
            row.get("id"),
            row.get("name"),
            row.get("state"),
            row.get("message") or row.get("reason"),
            row.get("strategy"),
            len(row.get("nodes") or ()) or None,
            row.get("step"),
            number((row.get("metrics") or {}).get("loss")),
            clock(row.get("submitted_s")),
        )
        for row in rows
    ]
    return table(["JOB", "NAME", "STATE", "WHY", "STRATEGY", "NODES", "STEP", "LOSS", "SUBMITTED"], cells)


def job(row: Mapping[str, Any]) -> str:
    """One job as name: value lines."""
    row = safe(row)
    metrics = row.get("metrics") or {}
    steps = row.get("step")
    if steps is not None and row.get("steps_total"):
        steps = f"{steps} of {row['steps_total']}"
    lines: list[tuple[str, Any]] = [
        ("job", f"{row.get('id')}  {row.get('name', '')}"),
        ("state", state(row.get("state")) + (f" ({row['reason']})" if row.get("reason") not in (None, "none") else "")),
        ("message", row.get("message")),
        ("hint", row.get("hint")),
        ("blame", row.get("blame") if row.get("state") == "FAILED" else None),
        ("strategy", row.get("strategy")),
        ("nodes", ", ".join(str(node) for node in row.get("nodes") or ())),
        ("steps", steps),
        ("samples", row.get("samples")),
        ("time", human_seconds(row.get("seconds"))),
        *((name, number(value, 6)) for name, value in metrics.items() if isinstance(value, int | float)),
    ]
    for artifact in row.get("artifacts") or ():
        lines.append(("artifact", f"{artifact['name']}  {human_bytes(artifact.get('bytes'))}"))
    shown = [(name, value) for name, value in lines if value not in (None, "")]
    width = max(len(name) for name, _ in shown)
    said = [f"    {line}" for line in row.get("last_lines") or ()]
    return "\n".join([*(f"{name.ljust(width)}  {value}" for name, value in shown), *said])


def model(row: Mapping[str, Any]) -> str:
    row = safe(row)
    parts = [
        f"{row.get('family', 'unknown')} for {row.get('task') or 'an unknown task'}",
        f"{row.get('parameters', 0):,} parameters ({row.get('complexity', '-')})",
        human_bytes(row.get("bytes")) or "",
        f"{len(row.get('layers') or ())} layers",
        f"input {tuple(row['input_shape'])}" if row.get("input_shape") else "",
        f"{row.get('framework', '')} {row.get('format', '')}".strip(),
    ]
    return "model     " + ", ".join(part for part in parts if part)


def nodes(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no nodes; on each machine: hive-node start (hive token create prints the whole command)"
    cells = []
    for row in rows:
        capacity = row.get("capacity") or {}
        gpus = capacity.get("gpus") or ()
        activity = row.get("activity")
        why = row.get("reason") or capacity.get("activity_reason")
        eligibility = row.get("eligibility")
        status = " ".join(
            str(part) for part in (row.get("link"), eligibility if eligibility != "OK" else "", activity) if part
        )
        cells.append(
            (
                row.get("id"),
                row.get("name"),
                status,
                number(capacity.get("cores")),
                human_bytes(capacity.get("memory_bytes")),
                f"{len(gpus)}x {gpus[0].get('name', 'GPU')}" if gpus else None,
                _gigaflops(capacity.get("flops") or {}),
                number(row.get("bandwidth_mbps")),
                human_seconds(row.get("rtt_s")),
                _peer(row, capacity),
                why,
            )
        )
    headers = ["NODE", "NAME", "STATE", "CORES", "MEMORY", "GPU", "GFLOP/S", "MBIT/S", "RTT", "PEER", "WHY"]
    return table(headers, cells)


def _peer(row: Mapping[str, Any], capacity: Mapping[str, Any]) -> str:
    """The port at which others reach it, and who cannot; `relayed`: it works alone, and all goes by the coordinator."""
    port, others = capacity.get("peer_port"), [str(each.get("node")) for each in row.get("apart") or ()]
    if port is None:
        return "relayed"
    more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
    return f"{port}, not with {', '.join(others[:_NAMED])}{more}" if others else str(port)


def _gigaflops(flops: Mapping[str, Any]) -> str | None:
    rate = flops.get("fp32", flops.get("float32")) or next(iter(flops.values()), None)
    if isinstance(rate, Mapping):
        rate = rate.get("p50")
    return None if rate is None else number(float(rate) / 1e9, 3)


def lan(rows: list[dict[str, Any]], problem: str = "") -> str:
    """Machines seen that have not joined. `problem`: why the coordinator sees nothing, or not all."""
    waiting = [row for row in rows if not row.get("joined")]
    if not waiting:
        return printable(problem) or "no other machines on this LAN announce themselves"
    cells = [
        (
            row.get("name"),
            row.get("address"),
            number(row.get("cores")),
            human_bytes(row.get("memory_bytes")),
            row.get("gpu"),
            number(row.get("gflops"), 3),
            row.get("join"),
        )
        for row in waiting
    ]
    headers = ["SEEN, NOT JOINED", "ADDRESS", "CORES", "MEMORY", "GPU", "GFLOP/S", "TO JOIN, TYPE THERE"]
    return "\n".join(filter(None, (table(headers, cells), printable(problem))))


def checks(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in safe(rows):
        mark = paint("ok  ", "green") if row.get("ok") else paint("fail", "red")
        lines.append(f"{mark}  {row.get('name')}: {row.get('message', '')}")
        if row.get("hint") and not row.get("ok"):
            lines.append(f"      hint: {row['hint']}")
    return "\n".join(lines)

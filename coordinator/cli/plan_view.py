"""A plan for people: what was considered, the choice and why, who does what, and what came of it. Text only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.cli.render import number, safe
from protos.command_line import human_bytes, human_seconds, table
from protos.printable import printable


def named(value: Any, names: Mapping[str, str]) -> Any:
    """The same with every node id replaced by the node's name, also where it is a key."""
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, Mapping):
        return {named(key, names): named(each, names) for key, each in value.items()}
    return [named(each, names) for each in value] if isinstance(value, list) else value


def plan(
    row: Mapping[str, Any], measured: Mapping[str, Any] | None = None, names: Mapping[str, str] | None = None
) -> str:
    """The choice and why, what was considered, the subtasks; with `measured`, what came of the chosen one beside it.

    `names`: node id -> name; a node of an old plan that has left keeps its id.
    """
    row = safe(named(row, names or {}))
    chosen = row.get("strategy")
    lines = [f"plan      {row.get('id')}", f"strategy  {chosen}", f"because   {row.get('reason')}", ""]
    lines.append(_candidates(row))
    lines += ["", chance] if (chance := _chance(row)) else []
    if measured is not None:
        lines += ["", "measured  " + _measured(measured)]
        lines += ["", beside] if (beside := comparison(measured.get("nodes") or {})) else []
    lines += ["", corrections] if (corrections := _corrections(row)) else []
    lines += ["", _subtasks(row)]
    for part in (_links(row), _spares(row)):
        lines += ["", part] if part else []
    coordination = row.get("coordination_plan") or {}
    if coordination.get("rendezvous"):  # one rank has no group
        lines += [
            "",
            f"group     {coordination.get('rendezvous')}; deadline {human_seconds(coordination.get('deadline_s'))}, "
            f"{coordination.get('retries')} retries",
        ]
    return "\n".join(lines)


def unplanned(document: Mapping[str, Any]) -> str:
    """Of a job without a plan, the answer to `explain`: where it stands, and what stands against each strategy."""
    job = safe(document.get("job") or {})
    lines = [f"no plan   {job.get('message') or job.get('state')}"]
    lines += [f"hint      {job['hint']}"] if job.get("hint") else []
    if document.get("candidates"):
        row = {"candidates": document["candidates"]}
        lines += ["", _candidates(safe(named(row, document.get("names") or {})))]
    return "\n".join(lines)


def _candidates(row: Mapping[str, Any]) -> str:
    """What was considered, the chosen one marked."""
    cells, chosen = [], row.get("strategy")
    for each in row.get("candidates") or ():
        mark = "*" if each.get("strategy") == chosen and each.get("feasible") else ""
        cells.append(
            (
                mark + str(each.get("strategy")),
                len(each.get("nodes") or ()) or None,
                _give_or_take(each),
                human_seconds(each.get("step_s")),
                human_bytes(each.get("bytes")),
                human_bytes(each.get("memory_bytes")),
                number(each.get("q"), 3),
                _learned(each),
                each.get("visits"),
                "; ".join(each.get("reasons") or ()),
            )
        )
    headers = ["CANDIDATE", "NODES", "TIME", "STEP", "BYTES", "MEMORY", "Q", "LEARNED", "SEEN", "WHY (NOT)"]
    return table(headers, cells)


def _give_or_take(candidate: Mapping[str, Any]) -> str | None:
    """26 min 01 s +-20%: one standard deviation of what is not known of the prediction."""
    if candidate.get("seconds") is None:
        return None
    return f"{human_seconds(candidate['seconds'])} +-{100 * (candidate.get('deviation') or 0.0):.0f}%"


def _learned(candidate: Mapping[str, Any]) -> str | None:
    """What the table makes of the time; a step that was measured in this very combination needs no correction."""
    if candidate.get("seconds") is None:
        return None
    if candidate.get("measured"):
        return "measured"
    return f"{100 * (math.exp(-(candidate.get('residual') or 0.0)) - 1):+.0f}%"


def _chance(row: Mapping[str, Any]) -> str:
    """What may be lost by the choice, and how it is found out."""
    loss_s, trials = row.get("expected_loss_s") or 0.0, row.get("trials") or ()
    said = []
    if loss_s:
        said.append(f"if wrong  {human_seconds(loss_s)} are lost on average, for what is not known of the predictions")
    if trials:
        said.append(f"trials    {', then '.join(trials)}: {row.get('trial_steps')} steps each, then the quickest stays")
    return "\n".join(said)


def ranks(rows: Sequence[Mapping[str, Any]]) -> str:
    """Who holds up the group that runs now: the rank that waits least."""
    cells = []
    for each in safe(rows):
        computes, waits = human_seconds(each.get("step_compute_s")), human_seconds(each.get("step_wait_s"))
        cells.append((each.get("rank"), each.get("node"), computes, waits))
    return "\nNOW, IN A STEP\n" + table(["RANK", "NODE", "COMPUTES", "WAITS"], cells)


def hindsight(seen: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Every choice of a job that made several, the groups that worked on it, and what another one might have saved."""
    seen = safe(named(seen, names))
    decisions, groups, regret = seen.get("decisions") or (), seen.get("groups") or (), seen.get("regret")
    lines = []
    if len(decisions) > 1 or any(each.get("trials") for each in decisions):
        left_out = seen.get("decisions_left_out") or 0
        for at, each in enumerate(decisions, 1):
            number_of_it = at + (left_out if at > 1 else 0)
            lines += ["", f"DECISION {number_of_it}: {each.get('strategy')}", f"because   {each.get('reason')}", ""]
            lines.append(_candidates(each))
            lines += [chance] if (chance := _chance(each)) else []
    if len(groups) > 1:
        cells = [
            (
                number + 1,
                each.get("strategy"),
                ", ".join(each.get("nodes") or ()),
                each.get("steps"),
                human_seconds(each.get("predicted_step_s")),
                human_seconds(each.get("measured_step_s")),
                each.get("why") or ("finished the job" if each.get("finished") else "gave way to the next"),
            )
            for number, each in enumerate(groups)
        ]
        lines += ["", table(["GROUP", "STRATEGY", "NODES", "STEPS", "STEP PREDICTED", "MEASURED", "THEN"], cells)]
    if regret:
        other, other_s = regret.get("best_other"), human_seconds(regret.get("best_other_s"))
        off, lost = f"{100 * (regret.get('deviation') or 0.0):.0f}%", human_seconds(regret.get("regret_s"))
        lines += ["", f"regret    {lost}: {other} was expected to take {other_s} +-{off}"]
        lines += [f"          {more}"] if (more := _on_the_way(regret)) else []
    return "\n".join(lines)


def _on_the_way(regret: Mapping[str, Any]) -> str:
    """Of what the job took: what trials and changes of plan cost it."""
    earlier_s, switching_s = regret.get("earlier_groups_s") or 0.0, regret.get("switching_s") or 0.0
    said = []
    if earlier_s:
        than = "longer" if earlier_s > 0 else "less"
        said.append(f"steps of earlier groups took {human_seconds(abs(earlier_s))} {than} than the last one's")
    if switching_s:
        said.append(f"changes of group took {human_seconds(switching_s)}")
    return f"counted in: {'; '.join(said)}" if said else ""


def _subtasks(row: Mapping[str, Any]) -> str:
    """Who does what: of a model that is cut, which layers, from the first to the last by name."""
    memory = (row.get("estimate") or {}).get("memory_bytes") or {}
    cut = (row.get("layout") or {}).get("cut_after") or ()
    cells = []
    for each in row.get("subtasks") or ():
        stage = each.get("stage") or 0
        upto = f" (to {cut[stage]})" if stage < len(cut) else f" (after {cut[-1]})" if cut else ""
        cells.append(
            (
                each.get("rank"),
                f"{each.get('type')} stage {stage}, replica {each.get('replica') or 0}" if cut else each.get("type"),
                each.get("node_id"),
                _range(each.get("data_range")),
                f"{_range(each.get('layer_range'))}{upto}",
                each.get("accumulate"),
                human_bytes(memory.get(each.get("node_id"))),
                each.get("synchronization"),
            )
        )
    headers = ["RANK", "SUBTASK", "NODE", "SAMPLES OF A BATCH", "LAYERS", "MICRO-BATCHES", "NODE MEMORY", "SYNC"]
    return table(headers, cells)


def _links(row: Mapping[str, Any]) -> str:
    cells = [
        (
            f"{each.get('a')} - {each.get('b')}",
            human_bytes(each.get("bytes_per_step")),
            human_seconds(each.get("seconds")),
        )
        for each in row.get("links") or ()
    ]
    return table(["LINK", "BYTES OF A STEP", "TIME"], cells) if cells else ""


def _spares(row: Mapping[str, Any]) -> str:
    """What was planned beforehand for the loss of nodes."""
    said = []
    for each in row.get("spares") or ():
        lost = " and ".join(each.get("lost") or ()) + (" are" if len(each.get("lost") or ()) > 1 else " is")
        if each.get("strategy"):
            where = ", ".join(each.get("nodes") or ())
            said.append(f"if {lost} lost: {each['strategy']} on {where}, {human_seconds(each.get('seconds'))}")
        else:
            said.append(f"if {lost} lost: waits ({each.get('reason')})")
    return "\n".join(said)


def comparison(by_node: Mapping[str, Any]) -> str:
    """Per node: predicted, measured, and how many times more was measured. "" without nodes."""
    kinds = [
        ("step", "step_s", human_seconds),
        ("of it computing", "compute_s", human_seconds),
        ("bytes sent", "bytes", human_bytes),
        ("memory", "memory_bytes", human_bytes),
    ]
    cells = []
    for name, sides in safe(by_node).items():
        predicted, measured = sides.get("predicted") or {}, sides.get("measured") or {}
        for what, key, form in kinds:
            before, after = predicted.get(key), measured.get(key)
            if before or after:
                ratio = f"{after / before:.2f}" if before and after else None
                cells.append((name, what, form(before), form(after), ratio))
    return table(["NODE", "OF A STEP", "PREDICTED", "MEASURED", "RATIO"], cells) if cells else ""


def _corrections(row: Mapping[str, Any]) -> str:
    """What earlier jobs have changed in the prediction of the chosen plan."""
    estimate = row.get("estimate") or {}
    basis = estimate.get("basis") or {}
    said = []
    for node, rank in {each.get("node_id"): each for each in estimate.get("ranks") or ()}.items():
        factors = rank.get("learned") or {}
        work, overhead = factors.get("work", 1.0), factors.get("overhead", 1.0)
        if (work, overhead) != (1.0, 1.0):
            said.append(f"{node} takes {work:.2f} times as long ({rank.get('family')}, each pass {overhead:.2f})")
        if (memory := rank.get("memory_factor") or 1.0) != 1.0:
            said.append(f"{node} needs {memory:.2f} times the memory of the formulas ({rank.get('family')})")
    if basis.get("remembered"):
        modelled = human_seconds(basis.get("modelled_step_s"))
        said.append(f"this very job ran before: its step is taken instead of {modelled} by the formulas")
    return f"learned   {'; '.join(said)}" if said else ""


def _measured(measured: Mapping[str, Any]) -> str:
    forms = {"seconds": human_seconds, "step_s": human_seconds, "bytes": human_bytes, "memory_bytes": human_bytes}
    parts = [
        f"{printable(name)} {forms[name](value) if name in forms else number(value)}"
        for name, value in measured.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return ", ".join(parts) or "nothing yet"


def _range(pair: Any) -> str | None:
    return f"{pair[0]}..{pair[1]}" if pair and len(pair) == 2 else None

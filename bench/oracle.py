"""What the choice is worth on real jobs: `python -m bench.oracle [--network NAME] [--rounds N] [--json FILE]`.

Every job runs under `auto` and under every strategy that is possible, in turn, three times over, on four machines of
unlike caps and shaped links (network namespaces: needs root). Time counts from the submission until the end of a job
whose validation loss is where it should be, so planning, trials and starting are in it. In the first round `auto` goes
first: it has never seen the job. single_node runs twice in each round: the one over the other is the A/A control.

What is known is written after every job; `--resume FILE` goes on after the jobs that such a file has. A job that `auto`
or single_node does not end is told, left out of the figures, and the run has not passed.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:  # run as a script: what is imported lies beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.oracle_jobs import CPUS, MODELS, NETWORKS, NODES, STRATEGIES, OracleJob, file_of
from bench.paired import Estimate, estimate
from bench.report import Bound, Figure, Finding, Gate, document, figure_of
from bench.runner import options, perform
from bench.stage import Stage
from bench.workloads import Workload
from strategies.cost import COST_MODEL_VERSION
from tests.e2e.cluster import until
from tests.netns.lan_cluster import LanCluster
from tests.netns.machines import lan, why_not

AUTO, SINGLE, CONTROL = "auto", "single_node", "single_node again"
MEMORY = "2GiB"
LOSS_SLACK = 0.02  # of the validation loss: the same steps in another order of additions
WARM = (
    f"nodes.min={len(NODES)}",
    "train.steps=8",
)  # the first worker of a node imports torch: no job is charged with it
GIVEN_UP = 2.0  # times the quickest so far: a strategy that is slower is ended, and not run again
FAR_BEHIND = 1.5  # the same of its first run: its one time stands in the table, it is not run again
LEAST_DEADLINE_S = 15.0
LONGEST_S = 900.0
OF_BEST, OF_BEST_SHARE, OF_SINGLE = 1.10, 0.90, 1.05
JOBS, OTHERS_WIN, WINNERS = 20, 5, 3  # fewer, or won by fewer, and the jobs prove nothing


@dataclass(slots=True)
class Measured:
    """One job. `seconds`: by what it ran as, a value a round; `taken`: what `auto` ended with, round by round;
    `cost_model`: the version that chose."""

    job: OracleJob
    seconds: dict[str, list[float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # not possible, or given up, with the reason
    taken: list[str] = field(default_factory=list)
    target: float | None = None
    cost_model: int = COST_MODEL_VERSION

    @property
    def strategies(self) -> dict[str, float]:
        """Median seconds of every strategy that was run to its end in every round."""
        return {name: median(each) for name, each in self.seconds.items() if name in STRATEGIES}

    @property
    def winner(self) -> str:
        return min(self.strategies, key=lambda name: self.strategies[name])

    def auto_over(self, seconds: float) -> float:
        return median(self.seconds[AUTO]) / seconds

    @property
    def of_best(self) -> float:
        return self.auto_over(self.strategies[self.winner])

    @property
    def of_single(self) -> float:
        return self.auto_over(self.strategies[SINGLE])

    @property
    def first_of_best(self) -> float:
        """What `auto` took when it had not seen the job."""
        return self.seconds[AUTO][0] / self.strategies[self.winner]


@dataclass(slots=True)
class Record:
    """What is known so far, in a file that is replaced as a whole after every job: the form of any benchmark's."""

    file: Path
    measured: list[Measured] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def has(self, job: OracleJob) -> bool:
        return any(each.job == job for each in self.measured)

    def finding(self, error: str = "") -> Finding:
        detail = {"jobs": [asdict(each) for each in self.measured], "markdown": markdown(self.measured)}
        found = figures(self.measured) if self.measured else ()
        return Finding("oracle", found, detail, error="; ".join([*self.failed, *filter(None, [error])]))

    def save(self) -> None:
        content = document([self.finding("not all jobs have run")], {})
        beside = self.file.with_name(f"{self.file.name}.part")
        beside.write_text(json.dumps(content, indent=1) + "\n")
        beside.replace(self.file)


def recorded(content: Mapping[str, Any]) -> list[Measured]:
    """The jobs of such a file that are still jobs of this benchmark, as they are now, and were chosen for by formulas
    as they are now."""
    now = {job.name: job for network in NETWORKS for job in (OracleJob(network, model) for model in MODELS)}
    found = []
    for each in (job for benchmark in content["benchmarks"] for job in benchmark["detail"].get("jobs", ())):
        job = OracleJob(each["job"]["network"], Workload(**each["job"]["model"]))
        if now.get(job.name) == job and each.get("cost_model") == COST_MODEL_VERSION:
            found.append(Measured(job, each["seconds"], each["refused"], each["taken"], each["target"]))
    return found


def oracle(networks: Sequence[str], record: Record, stage: Stage) -> Finding:
    if reason := why_not():
        raise RuntimeError(reason)
    stage.tell(f"{len(record.measured)} jobs known; after every job all of them are in {record.file}")
    error = ""
    try:
        for name in networks:
            _on(name, record, stage)
    except Exception as failure:  # what was measured is worth having
        traceback.print_exc()
        error = str(failure).strip() or type(failure).__name__
    stage.tell(markdown(record.measured))
    return record.finding(error)


def _on(name: str, record: Record, stage: Stage) -> None:
    jobs = [OracleJob(name, model) for model in (MODELS[:2] if stage.quick else MODELS)]
    jobs = [job for job in jobs if not record.has(job)]
    if not jobs:
        return
    folder = stage.subfolder(f"oracle/{len(list(stage.subfolder('oracle').iterdir()))}")
    with lan(1 + len(NODES)) as made:
        office = LanCluster(folder, stage.folder / "calibration", lan=made)
        try:
            for number, rate in enumerate(NETWORKS[name], 1):
                made.shape(number, rate)
            office.coordinator_on(made[0], "--no-advertise")
            for number, node in enumerate(NODES, 1):
                flags = ("--no-advertise", "--trusted-lan", made[number].interface)
                office.start_node(node, CPUS[node], MEMORY, *flags, prefix=made[number].prefix)
            office.wait_ready(len(NODES), 300.0)
            pairs = len(NODES) * (len(NODES) - 1) // 2
            until(lambda: len(office.ask("nodes")["links"]) == pairs, "every pair of nodes is measured", 120.0)
            warm = office.submit(file_of(MODELS[0], "data_parallel", stage.subfolder("warm")), *WARM)
            office.wait(warm)
            for job in jobs:
                try:
                    record.measured.append(_job(stage, office, job))
                except AssertionError as failure:  # the other jobs are worth measuring
                    stage.tell(f"{job.name}: FAILED: {failure}")
                    record.failed.append(str(failure))
                record.save()
        finally:
            office.close()


def _job(stage: Stage, office: LanCluster, job: OracleJob) -> Measured:
    found = Measured(job)
    files = {name: file_of(job.model, name, stage.subfolder("jobs")) for name in (AUTO, *STRATEGIES)}
    for name, file in files.items():
        if why := _why_not(office, file):  # it also identifies the model, which no run is then charged with
            found.refused[name] = why
    for needed in (AUTO, SINGLE):
        if needed in found.refused:
            raise AssertionError(f"{job.name}, {needed}: {found.refused[needed]}")
    for number in range(stage.rounds):
        forced = [SINGLE, *(name for name in STRATEGIES if name != SINGLE), CONTROL]
        order = [AUTO, *forced] if not number else [*forced[number:], *forced[:number], AUTO]
        for name in order:
            if name not in found.refused and not (number and _hopeless(found, name)):
                _run(stage, office, found, name, files[SINGLE if name == CONTROL else name])
    stage.tell(line_of(found))
    return found


def _why_not(office: LanCluster, file: Path) -> str:
    done = office.hive("plan", str(file), "-o", "json", check=False)
    answer: dict[str, Any] = json.loads(done.stdout)
    return str(answer["error"]["message"]) if "error" in answer else ""


def _hopeless(found: Measured, name: str) -> bool:
    """Whether its first run was so far behind that no other round makes it the best."""
    first_s = found.seconds[name][0]
    return name not in (AUTO, SINGLE, CONTROL) and first_s > FAR_BEHIND * min(
        each[0] for each in found.seconds.values()
    )


def _run(stage: Stage, office: LanCluster, found: Measured, name: str, file: Path) -> None:
    best_s = min((min(each) for each in found.seconds.values()), default=math.inf)
    others = name not in (AUTO, SINGLE, CONTROL)
    deadline_s = max(LEAST_DEADLINE_S, GIVEN_UP * best_s) if others and found.seconds else LONGEST_S
    job_id = office.submit(file)
    try:
        job = json.loads(office.hive("wait", job_id, "-o", "json", check=False, deadline_s=deadline_s).stdout)["job"]
    except subprocess.TimeoutExpired:
        office.hive("cancel", job_id, check=False)  # it may have ended just now
        office.wait(job_id)
        job = {"state": "CANCELLED", "message": f"over {deadline_s:.0f} s: given up"}
    if job["state"] != "SUCCEEDED":
        if not others:
            raise AssertionError(f"{found.job.name}, {name}: {job['state']}: {job['message']}")
        if name in found.seconds:  # of three rounds one went wrong: the others count
            found.seconds[name].append(math.inf)
        else:
            found.refused[name] = str(job["message"])
        return
    loss = float(job["metrics"]["test_loss"])
    if found.target is None:
        found.target = loss
    if loss > found.target * (1 + LOSS_SLACK):
        raise AssertionError(f"{found.job.name}, {name}: validation loss {loss:.4f} instead of {found.target:.4f}")
    found.seconds.setdefault(name, []).append(float(job["finished_s"]) - float(job["submitted_s"]))
    if name == AUTO:
        found.taken.append(str(job["strategy"]))
    stage.tell(
        f"  {found.job.name}: {name} {found.seconds[name][-1]:.1f} s, {job['strategy']} on {' '.join(job['nodes'])}"
    )


def line_of(found: Measured) -> str:
    """One job in a line: what auto took, the best, the winner, the first round."""
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.strategies.items())
    best_s = found.strategies[found.winner]
    return (
        f"{found.job.name}: auto {median(found.seconds[AUTO]):.1f} s ({' '.join(found.taken)}), best {best_s:.1f} s "
        f"({found.winner}): {found.of_best:.2f} of the best, {found.of_single:.2f} of single_node, first round "
        f"{found.seconds[AUTO][0]:.1f} s: {found.first_of_best:.2f}; {times}"
    )


def control(measured: Sequence[Measured]) -> Estimate:
    """One run of single_node over another one of the same round, larger over smaller by chance: around 1."""
    ratios = [
        again / first
        for each in measured
        for first, again in zip(each.seconds[SINGLE], each.seconds[CONTROL], strict=False)
    ]
    return estimate(ratios)


def figures(measured: Sequence[Measured]) -> tuple[Figure, ...]:
    """The gates are widened by what the control says two equal runs differ."""
    noise = control(measured)
    wider = max(1.0, noise.high, 1 / noise.low)
    near = sum(each.of_best <= OF_BEST * wider for each in measured) / len(measured)
    at_once = sum(each.first_of_best <= OF_BEST * wider for each in measured) / len(measured)
    worst = max(measured, key=lambda each: each.of_single)
    winners = [each.winner for each in measured]
    found = [
        Figure(
            each.job.name,
            each.of_best,
            "x the best",
            note=f"{each.winner} wins; auto: {', '.join(each.taken)}; first time {each.first_of_best:.2f}",
        )
        for each in measured
    ]
    return (
        *found,
        figure_of("A/A control", noise, "x", note="single_node beside itself"),
        Figure(
            f"share of jobs where auto takes at most {OF_BEST * wider:.2f} times the best",
            near,
            gate=Gate(Bound.AT_LEAST, OF_BEST_SHARE),
        ),
        Figure("the same of its first run, which knew nothing of the job", at_once),
        Figure(
            "auto beside the best single node, worst job",
            worst.of_single,
            "x",
            gate=Gate(Bound.BELOW, OF_SINGLE * wider),
            note=worst.job.name,
        ),
        Figure("jobs", len(measured), gate=Gate(Bound.AT_LEAST, JOBS)),
        Figure(
            "jobs won by something else than single_node",
            sum(name != SINGLE for name in winners),
            gate=Gate(Bound.AT_LEAST, OTHERS_WIN),
        ),
        Figure(
            "strategies that win somewhere",
            len(set(winners)),
            gate=Gate(Bound.AT_LEAST, WINNERS),
            note=", ".join(sorted(set(winners))),
        ),
    )


def markdown(measured: Sequence[Measured]) -> str:
    """Seconds, medians; the best strategy in bold."""
    head = ["network", "model", *STRATEGIES, "`auto`", "took", "of the best", "the first time"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for each in measured:
        cells = [_cell(each, name) for name in STRATEGIES]
        auto = f"{median(each.seconds[AUTO]):.1f}"
        tail = [auto, ", ".join(each.taken), f"{each.of_best:.2f}", f"{each.first_of_best:.2f}"]
        lines.append(f"| {' | '.join([each.job.network, each.job.model.name, *cells, *tail])} |")
    reasons = {f"{name}: {why}" for each in measured for name, why in each.refused.items()}
    return "\n".join([*lines, "", *(f"- {reason}" for reason in sorted(reasons))])


def _cell(measured: Measured, name: str) -> str:
    seconds = measured.strategies.get(name)
    if seconds is None:
        return "-"
    return f"**{seconds:.1f}**" if name == measured.winner else f"{seconds:.1f}"


def main() -> int:
    parser = options(__doc__.splitlines()[0] if __doc__ else "", {"oracle": partial(oracle, (), Record(Path()))})
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="only this one; several times")
    parser.add_argument("--resume", metavar="FILE", help="go on after the jobs of this file, in it without --json")
    chosen = parser.parse_args()
    chosen.rounds = chosen.rounds or (1 if chosen.quick else 3)
    networks = chosen.network or list(NETWORKS)[-1 if chosen.quick else 0 :]
    known = recorded(json.loads(Path(chosen.resume).read_text())) if chosen.resume else []
    if chosen.json is None:
        chosen.json = Path(chosen.resume or Path(tempfile.mkdtemp(prefix="hive-oracle-")) / "oracle.json")
    return perform({"oracle": partial(oracle, networks, Record(chosen.json, known))}, chosen)


if __name__ == "__main__":
    sys.exit(main())

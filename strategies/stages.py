"""Which hosts take which stage of a pipeline, in which order, and where the model is cut: dynamic programme.

Answers with a few chains per question: for every number of stages the one whose slowest stage is fastest, and around
the least bottleneck those with the least sum; the caller weighs them exactly. A step takes
sum c_s + sum p_s + (m - 1) max q_s, with q_s = mix(c_s, p_s), p_s what stage s sends and gets back.

Works from the last stage backwards over (hosts used, first host, first piece), so the stages behind, and with them the
micro-batches in flight, are known. Near-identical hosts count as one kind once there are too many to tell apart.
Invariants: no stage is empty, no host has two stages, every stage fits its host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from types import EllipsisType

import numpy as np

from protos.plan import Schedule
from strategies.cost import OVERLAP
from strategies.links import Link
from strategies.segments import Array, Load, Segments, stage_bytes

SLACK = (1.0, 1.05, 1.15, 1.3, 1.6, 2.5, math.inf)  # of the least bottleneck, at which the sum is minimised
ROUGH_SLACK = (1.05, 1.3)  # to compare questions before one of them is answered in full
MOST_STATES = 16_384  # hosts used x pairs of kinds: eight hosts that are all different


@dataclass(frozen=True, slots=True, eq=False)
class Host:
    """Where a stage may run: training time of one sample in pieces [i, j), what a micro-batch costs whatever its rows
    (anywhere, and in pieces [i, j)), memory."""

    seconds: Array
    overhead_s: float
    pass_s: Array
    budget_bytes: float

    def compute_s(self, rows: float, piece: tuple[int, int] | EllipsisType = ...) -> Array:
        """[i, j], or of one `piece`: one micro-batch, forward and backward."""
        return np.asarray(self.overhead_s + self.pass_s[piece] + rows * self.seconds[piece])

    @property
    def sample_s(self) -> float:
        """Of one sample through the whole model."""
        return float(self.compute_s(1.0, (0, -1)))


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """`links[a][b]` joins host a with host b; a chain takes one of `required`, unless there are none."""

    segments: Segments
    hosts: tuple[Host, ...]
    links: Sequence[Sequence[Link]]
    load: Load
    most_stages: int
    least_stages: int = 2
    required: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Chain:
    """Stage s runs pieces [cuts[s], cuts[s + 1]) on hosts[s]."""

    hosts: tuple[int, ...]
    cuts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Kind:
    members: tuple[int, ...]  # fastest first
    host: Host  # the slowest and smallest of them


def transfer_s(link: Link, size_bytes: float) -> float:
    """One micro-batch over a border: the activation there, its gradient back."""
    return 2 * (link.rtt_s / 2 + size_bytes / link.bytes_per_s)


def chain_s(question: Question, chain: Chain) -> float:
    """Time of a step without what follows the last micro-batch; infinite when a stage does not fit."""
    load, segments = question.load, question.segments
    total, slowest = 0.0, 0.0
    for stage, host in enumerate(chain.hosts):
        first, last = chain.cuts[stage], chain.cuts[stage + 1]
        behind = len(chain.hosts) - stage
        if stage_bytes(segments, load, behind, (first, last)) > question.hosts[host].budget_bytes:
            return math.inf
        compute_s = float(question.hosts[host].compute_s(load.rows, (first, last)))
        sent_s = 0.0
        if behind > 1:
            link = question.links[host][chain.hosts[stage + 1]]
            sent_s = transfer_s(link, load.rows * float(segments.cut_bytes[last]))
        total += compute_s + sent_s
        slowest = max(slowest, _mixed(compute_s, sent_s))
    return total + (load.micro_batches - 1) * slowest


def _mixed(compute_s: float, sent_s: float) -> float:
    return float((compute_s**OVERLAP + sent_s**OVERLAP) ** (1 / OVERLAP))


@dataclass(frozen=True, slots=True, eq=False)
class _Moves:
    """Which hosts may be in use after so many stages, counted by kind, and how one more in front changes that."""

    states: tuple[tuple[tuple[int, ...], ...], ...]  # by the number of stages
    index: tuple[dict[tuple[int, ...], int], ...]
    steps: tuple[tuple[int, int, list[int], list[int]], ...]  # level, kind in front, rows before, rows after


@lru_cache(maxsize=16)
def _moves(sizes: tuple[int, ...], most: int) -> _Moves:
    states: list[list[tuple[int, ...]]] = [[] for _ in range(most + 1)]
    for state in product(*(range(size + 1) for size in sizes)):
        if sum(state) <= most:
            states[sum(state)].append(state)
    index = tuple({state: row for row, state in enumerate(level)} for level in states)
    steps = []
    for level in range(2, most + 1):
        for kind, size in enumerate(sizes):
            before = [row for row, state in enumerate(states[level - 1]) if state[kind] < size]
            after = [index[level][_changed(states[level - 1][row], kind, 1)] for row in before]
            if before:
                steps.append((level, kind, before, after))
    return _Moves(tuple(map(tuple, states)), index, tuple(steps))


@dataclass(frozen=True, slots=True, eq=False)
class _Solution:
    """What one more stage adds in front of another, `stage` [kind, first piece, kind behind, first piece of that], is
    joined to the `best` [state, kind in front, its first piece] of so many stages behind it."""

    stage: Array
    join: np.ufunc  # add, or maximum
    best: list[Array]


class Solver:
    """One question: minimises the slowest stage, then for each slack the sum over chains whose stages are within it."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self._kinds = _kinds(question)
        count = question.segments.count
        most = min(question.most_stages, count, len(question.hosts))
        if question.load.schedule is Schedule.ONE_F_ONE_B:
            most = min(most, question.load.micro_batches)
        self._moves = _moves(tuple(len(kind.members) for kind in self._kinds), most)
        self._prepare(count, most)
        self._quickest = self._solve(self._slowest, np.maximum, self._compute)

    def chains(self, slacks: Sequence[float] = SLACK) -> tuple[Chain, ...]:
        """Candidates with `least_stages` or more; empty when nothing fits."""
        least_s = min((float(self._whole(self._quickest, level).min()) for level in self._allowed), default=math.inf)
        if not math.isfinite(least_s):
            return ()
        found = dict.fromkeys(self._read(self._quickest))
        for slack in slacks:
            limit = least_s * slack * (1 + 1e-9)
            stage = np.where(self._slowest <= limit, self._total, math.inf)
            last = np.where(self._compute <= limit, self._compute, math.inf)
            found |= dict.fromkeys(self._read(self._solve(stage, np.add, last)))
        return tuple(found)

    def _prepare(self, count: int, most: int) -> None:
        """Tables of every kind and pair of kinds: time, slowest, and whether a stage with so many behind it fits."""
        load, segments = self._question.load, self._question.segments
        empty = np.tri(count + 1, count + 1, dtype=bool)
        compute = np.array([kind.host.compute_s(load.rows) for kind in self._kinds])
        self._compute = np.where(empty, math.inf, compute)
        links = [[self._link(a, b) for b in self._kinds] for a in self._kinds]
        rtt_s = np.array([[link.rtt_s for link in row] for row in links])[:, :, None]
        bytes_per_s = np.array([[link.bytes_per_s for link in row] for row in links])[:, :, None]
        sent = 2 * (rtt_s / 2 + load.rows * segments.cut_bytes / bytes_per_s)
        # [kind, first piece, kind behind, first piece of that]
        self._total = self._compute[:, :, None, :] + sent[:, None, :, :]
        work = np.where(empty, 0.0, compute) ** OVERLAP
        mixed = (work[:, :, None, :] + (sent**OVERLAP)[:, None, :, :]) ** (1 / OVERLAP)
        self._slowest = np.where(empty[:, None, :], math.inf, mixed)
        budgets = np.array([kind.host.budget_bytes for kind in self._kinds])[:, None, None]
        # [kind, first piece, first piece of the kind behind], by the number of stages behind
        self._unfit = [stage_bytes(segments, load, behind) > budgets for behind in range(1, most + 1)]

    def _link(self, a: _Kind, b: _Kind) -> Link:
        links = [self._question.links[x][y] for x in a.members for y in b.members if x != y]
        if not links:
            return Link(math.inf, 1.0)  # one host is not followed by itself
        return Link(max(link.rtt_s for link in links), min(link.bytes_per_s for link in links))

    def _solve(self, stage: Array, join: np.ufunc, last: Array) -> _Solution:
        """`last` [kind, piece, piece]: a stage with none behind it."""
        kinds, width = stage.shape[:2]
        best = [np.full((len(states), kinds, width), math.inf) for states in self._moves.states]
        for kind in range(kinds):
            row = self._moves.index[1][tuple(int(other == kind) for other in range(kinds))]
            best[1][row, kind] = np.where(self._unfit[0][kind], math.inf, last[kind])[:, -1]
        for level, kind, sources, targets in self._moves.steps:
            before = best[level - 1][sources].reshape(len(sources), 1, kinds * width)
            added = np.where(self._unfit[level - 1][kind, :, None, :], math.inf, stage[kind])
            best[level][targets, kind] = join(before, added.reshape(width, kinds * width)).min(axis=2)
        return _Solution(stage, join, best)

    @property
    def _allowed(self) -> range:
        return range(max(2, self._question.least_stages), len(self._moves.states))

    def _whole(self, solution: _Solution, level: int) -> Array:
        """[state, kind] of chains of the whole model that take a required host."""
        whole, required = solution.best[level][..., 0], self._question.required
        if not required:
            return whole
        kinds = [index for index, kind in enumerate(self._kinds) if required.intersection(kind.members)]
        taken = [any(state[kind] for kind in kinds) for state in self._moves.states[level]]
        return np.where(np.array(taken)[:, None], whole, math.inf)

    def _read(self, solution: _Solution) -> list[Chain]:
        """The best chain for each allowed number of stages."""
        found = []
        for level in self._allowed:
            whole = self._whole(solution, level)
            row, kind = divmod(int(whole.argmin()), len(self._kinds))
            if math.isfinite(whole[row, kind]):
                found.append(self._trace(solution, level, row, kind))
        return found

    def _trace(self, solution: _Solution, level: int, row: int, kind: int) -> Chain:
        kinds, cuts = [kind], [0]
        state = self._moves.states[level][row]
        while level > 1:
            state = _changed(state, kind, -1)
            behind = solution.best[level - 1][self._moves.index[level - 1][state]]
            unfit, stage = self._unfit[level - 1][kind, cuts[-1]], solution.stage[kind, cuts[-1]]
            value = solution.join(np.where(unfit, math.inf, stage), behind)
            kind, cut = divmod(int(value.argmin()), behind.shape[1])
            kinds.append(kind)
            cuts.append(cut)
            level -= 1
        required = self._question.required
        left = [sorted(each.members, key=lambda host: host not in required) for each in self._kinds]
        return Chain(tuple(left[each].pop(0) for each in kinds), (*cuts, self._question.segments.count))


def _changed(state: tuple[int, ...], kind: int, by: int) -> tuple[int, ...]:
    return (*state[:kind], state[kind] + by, *state[kind + 1 :])


def _kinds(question: Question) -> list[_Kind]:
    """Each host a kind of its own, or the most alike merged until few enough are left."""
    hosts = question.hosts
    groups = [[index] for index in range(len(hosts))]
    while math.prod(len(group) + 1 for group in groups) * len(groups) ** 2 > MOST_STATES:
        pairs = [(a, b) for a in range(len(groups)) for b in range(a)]
        a, b = min(pairs, key=lambda pair: _unlike(question, groups[pair[0]], groups[pair[1]]))
        groups[b] += groups.pop(a)
    kinds = []
    for group in groups:
        members = tuple(sorted(group, key=lambda index: (hosts[index].sample_s, index)))
        slowest = Host(
            np.max([hosts[index].seconds for index in members], axis=0),
            max(hosts[index].overhead_s for index in members),
            np.max([hosts[index].pass_s for index in members], axis=0),
            min(hosts[index].budget_bytes for index in members),
        )
        kinds.append(_Kind(members, slowest if len(members) > 1 else hosts[members[0]]))
    return kinds


def _unlike(question: Question, a: Sequence[int], b: Sequence[int]) -> float:
    """How much is lost by treating all of them alike: the spread of speeds, of memory and of links to the others."""
    members = [*a, *b]
    if question.required.intersection(a) or question.required.intersection(b):
        return 1e9  # the last to be merged
    hosts = [question.hosts[index] for index in members]
    times = [max(host.sample_s, 1e-12) for host in hosts]
    budgets = [max(host.budget_bytes, 1.0) for host in hosts]
    rates = [
        math.log(max(question.links[index][other].bytes_per_s for index in members if index != other))
        - math.log(min(question.links[index][other].bytes_per_s for index in members if index != other))
        for other in range(len(question.hosts))
    ]
    spread = math.log(max(times) / min(times)) + math.log(max(budgets) / min(budgets)) / 4
    return spread + sum(rates) / len(rates) / 2

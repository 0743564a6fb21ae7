"""The stage partitioner against every chain there is, on cases small enough to list them all."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.model import Complexity, Family, LayerProfile, ModelProfile, Requirements
from protos.plan import Schedule
from strategies.links import Link
from strategies.memory import RESERVE_BYTES
from strategies.segments import Load, Segments, segments_of, stage_bytes
from strategies.stages import MOST_STATES, Chain, Host, Question, Solver, _kinds, chain_s

MIB = 1024**2


def layer(flops: float, parameters: int = 1000, cut: float | None = 1e4, **more: float) -> LayerProfile:
    kept = more.get("kept", 1e4)
    return LayerProfile("", "Linear", parameters, flops, kept, 4e3, (10,), cut, int(more.get("borrowed", 0)))


def model(*layers: LayerProfile) -> ModelProfile:
    named = tuple(
        LayerProfile(
            str(index), one.kind, one.parameters, one.flops_per_sample, one.activation_bytes_per_sample,
            one.output_bytes_per_sample, one.output_shape, one.cut_bytes_per_sample, one.borrowed_parameters,
        )
        for index, one in enumerate(layers)
    )  # fmt: skip
    parameters = sum(one.parameters for one in layers)
    return ModelProfile(
        "pytorch", "source", Family.MLP, "", parameters, 4 * parameters, True, ("float32",), (64,), Complexity.SMALL,
        named, Requirements(1, 0, 0, 1, "layers"), 1.0, why_not_cut="",
    )  # fmt: skip


def host(segments: Segments, profile: ModelProfile, flops: float, spare_bytes: float, overhead_s: float = 1e-4) -> Host:
    seconds = segments.sums([3 * one.flops_per_sample / flops for one in profile.layers])
    return Host(seconds, overhead_s, np.zeros_like(seconds), RESERVE_BYTES + spare_bytes)


def every_chain(question: Question) -> list[Chain]:
    count, found = question.segments.count, []
    for stages in range(2, min(count, len(question.hosts), question.most_stages) + 1):
        if question.load.schedule is Schedule.ONE_F_ONE_B and stages > question.load.micro_batches:
            break
        for hosts in permutations(range(len(question.hosts)), stages):
            for inner in combinations(range(1, count), stages - 1):
                found.append(Chain(hosts, (0, *inner, count)))
    return found


def slowest_s(question: Question, chain: Chain) -> float:
    """By the difference of two numbers of micro-batches of the same size."""
    load = question.load
    more = Question(
        question.segments, question.hosts, question.links,
        Load(load.micro_batches + 1, load.rows, load.schedule, load.parameter_bytes), question.most_stages,
    )  # fmt: skip
    roomy = [replace(one, budget_bytes=math.inf) for one in question.hosts]
    less = Question(question.segments, tuple(roomy), question.links, load, question.most_stages)
    more = Question(more.segments, tuple(roomy), more.links, more.load, more.most_stages)
    return chain_s(more, chain) - chain_s(less, chain)


@st.composite
def questions(draw: st.DrawFn) -> Question:
    pieces = draw(st.integers(2, 5))
    rates = st.floats(0.2, 5.0)
    profile = model(
        *(
            layer(
                draw(rates) * 1e7,
                draw(st.integers(1, 20)) * 10_000,
                draw(st.sampled_from([None, 1e3, 1e5])) if index else 1e4,
                borrowed=draw(st.sampled_from([0, 0, 100_000])),
            )
            for index in range(pieces)
        )
    )
    segments = segments_of(profile)
    count = draw(st.integers(2, 4))
    hosts = [
        host(segments, profile, draw(rates) * 1e9, draw(st.sampled_from([1, 4, 1000])) * MIB, draw(rates) * 1e-4)
        for _ in range(count)
    ]
    links = [[Link(0.0, math.inf)] * count for _ in range(count)]
    for a, b in combinations(range(count), 2):
        links[a][b] = links[b][a] = Link(draw(rates) * 1e-4, draw(rates) * 1e7)
    load = Load(draw(st.sampled_from([1, 2, 4, 8])), draw(rates) * 4, draw(st.sampled_from(list(Schedule))), 16)
    return Question(segments, tuple(hosts), links, load, 8)


@given(questions(), st.integers(1, 4), st.floats(0.0, 8.0))
def test_one_piece_is_what_the_whole_table_says_of_it(question: Question, behind: int, rows: float) -> None:
    segments, load, any_host = question.segments, question.load, question.hosts[0]
    for piece in combinations(range(segments.count + 1), 2):
        assert stage_bytes(segments, load, behind, piece) == stage_bytes(segments, load, behind)[piece]
        assert any_host.compute_s(rows, piece) == any_host.compute_s(rows)[piece]


@settings(max_examples=150, deadline=None)
@given(questions())
def test_the_slowest_stage_is_the_least_possible_and_the_step_near_it(question: Question) -> None:
    """The sum is least for a bottleneck within the grid of slacks, so a step costs at most the widest of its gaps."""
    everything = [chain for chain in every_chain(question) if math.isfinite(chain_s(question, chain))]
    found = Solver(question).chains()
    assert bool(found) == bool(everything)
    if not everything:
        return
    assert all(math.isfinite(chain_s(question, chain)) for chain in found)
    least = min(slowest_s(question, chain) for chain in everything)
    assert min(slowest_s(question, chain) for chain in found) == pytest.approx(least, rel=1e-6)
    best = min(chain_s(question, chain) for chain in everything)
    assert best <= min(chain_s(question, chain) for chain in found) * (1 + 1e-9)
    assert min(chain_s(question, chain) for chain in found) <= best * 2.5 / 1.6 * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(questions())
def test_a_single_micro_batch_leaves_only_the_sum_which_is_least(question: Question) -> None:
    load = Load(1, question.load.rows, Schedule.GPIPE, 16)
    alone = Question(question.segments, question.hosts, question.links, load, 8)
    times = [chain_s(alone, chain) for chain in every_chain(alone)]
    best = min((chain_s(alone, chain) for chain in Solver(alone).chains()), default=math.inf)
    assert best == pytest.approx(min(times), rel=1e-9)


def even(count: int, pieces: int, **changes: float) -> Question:
    profile = model(*(layer(1e7) for _ in range(pieces)))
    segments = segments_of(profile)
    hosts = tuple(host(segments, profile, 1e9 * (1 + changes.get("spread", 0.0) * k), 1e12) for k in range(count))
    links = [[Link(1e-4, 1e9)] * count for _ in range(count)]
    return Question(segments, hosts, links, Load(32, 1.0, Schedule.ONE_F_ONE_B, 16), count)


def test_more_hosts_than_pieces_give_no_empty_stage() -> None:
    for chain in Solver(even(6, 3)).chains():
        assert len(chain.hosts) <= 3
        assert all(a < b for a, b in zip(chain.cuts[:-1], chain.cuts[1:], strict=True))


def test_a_host_twice_as_fast_gets_twice_the_pieces() -> None:
    question = even(2, 12, spread=1.0)
    best = min(Solver(question).chains(), key=lambda chain: chain_s(question, chain))
    pieces = {h: b - a for h, a, b in zip(best.hosts, best.cuts[:-1], best.cuts[1:], strict=True)}
    assert pieces == {0: 4, 1: 8}


def test_the_first_stage_holds_the_most_micro_batches_and_gpipe_all_of_them() -> None:
    segments = segments_of(model(*(layer(1e7, kept=1e6) for _ in range(4))))
    load = Load(8, 2.0, Schedule.ONE_F_ONE_B, 16)
    assert [load.held(behind) for behind in (1, 2, 4)] == [1, 2, 4]
    assert Load(8, 2.0, Schedule.GPIPE, 16).held(1) == 8
    first, last = stage_bytes(segments, load, 2)[0, 2], stage_bytes(segments, load, 1)[2, 4]
    assert first - last == pytest.approx(2 * 2 * 1e6)  # two pieces, one more micro-batch of two rows


def test_a_borrowed_tensor_counts_on_both_stages_but_once_where_its_owner_is() -> None:
    segments = segments_of(model(layer(1e7, 50_000), layer(1e7), layer(1e7, 10, borrowed=50_000)))
    assert segments.parameters[0, 3] == 51_010
    assert segments.parameters[2, 3] == 50_010
    assert segments.borrowed[2, 3] == 50_000


def test_borders_keep_a_buffer_for_every_micro_batch() -> None:
    segments = segments_of(model(*(layer(1e7, cut=1e6) for _ in range(3))))
    few, many = (stage_bytes(segments, Load(m, 1.0, Schedule.ONE_F_ONE_B, 16), 1)[1, 2] for m in (4, 8))
    assert many - few == pytest.approx(4 * 2 * 1e6)


def test_a_model_with_many_cuts_is_coarsened_at_the_cheap_ones() -> None:
    profile = model(*(layer(1e7, cut=1e3 if index % 4 == 3 else 1e6) for index in range(400)))
    segments = segments_of(profile)
    assert segments.count <= 32
    assert max(segments.cut_bytes) == 1e3
    assert segments.bounds[-1] == 400


@pytest.mark.parametrize(("hosts", "kinds"), [(8, 8), (16, 4)])
def test_many_unlike_hosts_are_merged_until_the_tables_are_small(hosts: int, kinds: int) -> None:
    question = even(hosts, 4, spread=0.3)
    found = _kinds(question)
    assert len(found) <= kinds
    assert sorted(index for kind in found for index in kind.members) == list(range(hosts))
    assert math.prod(len(kind.members) + 1 for kind in found) * len(found) ** 2 <= MOST_STATES


def test_merged_hosts_are_still_told_apart_in_the_answer() -> None:
    question = even(12, 24, spread=0.05)
    for chain in Solver(question).chains():
        assert len(set(chain.hosts)) == len(chain.hosts)
        assert math.isfinite(chain_s(question, chain))

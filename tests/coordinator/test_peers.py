"""Which links are probed when, and which nodes are on which roster: no network, a clock that is told the time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.authority import Authority, open_authority
from coordinator.cluster import cluster_view
from coordinator.control.state import NodeStatus, State
from coordinator.peers import PROBE_S, ROSTER_S, Peers, link_of, worth_asking_for
from coordinator.probe_pairs import (
    AGAIN_S,
    FIRST_RETRY_S,
    LONGEST_RETRY_S,
    Attempted,
    Pair,
    Party,
    next_pairs,
    shared_networks,
)
from coordinator.sessions import Session, Sessions
from protos import limits
from protos import roster as rosters
from protos.artifact import FileEntry, Manifest
from protos.capacity import Capacity, LinkEstimate, Rate, TrustedNetwork
from protos.errors import DeadlineExceeded
from protos.gen import membership_pb2 as pb
from protos.ids import Digest, Fence, JobId, NodeId
from protos.roster import Action, Roster
from protos.states import Activity, NodeLink

LOOPBACK = TrustedNetwork("loopback", "lo", "127.0.0.1")
RATE = Rate(1e9, 1e9, 0.0)
BASE = Capacity("h", "", "linux", "3.11", 1.0, 1, 1, 1, 1, flops={"fp32": RATE}, networks=(LOOPBACK,), peer_port=4000)
A, B, C = NodeId("n-a"), NodeId("n-b"), NodeId("n-c")
JOB = JobId("j-1")
BIG, SMALL = Digest("b" * 64), Digest("5" * 64)
FILES = Manifest((FileEntry("big", BIG, limits.CHUNK_BYTES), FileEntry("small", SMALL, limits.CHUNK_BYTES - 1)))


def lan(number: int, machine: str = "", port: int | None = 4000) -> Capacity:
    network = TrustedNetwork("10.0.0.0/24", "eth0", f"10.0.0.{number}")
    return replace(BASE, machine_id=machine or f"m{number}", networks=(LOOPBACK, network), peer_port=port)


def due(
    capacities: Sequence[Capacity],
    occupied: Sequence[int] = (),
    known: dict[Pair, Attempted] | None = None,
    now_s: float = 0.0,
    idle: Sequence[int] | None = None,
) -> list[tuple[str, str]]:
    """Nodes are called 0, 1, 2..."""
    parties = [Party(NodeId(str(number)), capacity) for number, capacity in enumerate(capacities)]
    free = {NodeId(str(n)) for n in (range(len(capacities)) if idle is None else idle)} - {
        NodeId(str(n)) for n in occupied
    }
    return next_pairs(parties, free, {NodeId(str(n)) for n in occupied}, known or {}, now_s)


def test_every_pair_that_shares_a_network_is_probed_one_at_a_time_per_machine() -> None:
    nodes = [lan(n) for n in range(4)]
    assert due(nodes) == [("0", "1"), ("2", "3")]
    assert due([lan(n, "one machine") for n in range(4)]) == [("0", "1")]
    assert due([BASE, BASE]) == [], "loopback of machines that are not known to be one"
    assert due([replace(BASE, machine_id="m"), replace(BASE, machine_id="m")]) == [("0", "1")]


def test_the_one_that_listens_is_called_and_two_that_do_not_are_not_probed() -> None:
    assert due([lan(0), lan(1, port=None)]) == [("1", "0")]
    assert due([lan(0, port=None), lan(1, port=None)]) == []


def test_nothing_is_probed_where_a_job_runs_also_on_another_node_of_the_machine() -> None:
    nodes = [lan(0, "m"), lan(1), lan(2, "m"), lan(3)]
    assert due(nodes, occupied=(2,)) == [("1", "3")]
    assert due(nodes, idle=(0, 1, 3)) == [("0", "1")], "a node that is only paused leaves its machine quiet"


def test_a_pair_is_probed_again_after_ten_minutes_when_its_networks_change_and_soon_after_a_failure() -> None:
    nodes = [lan(0), lan(1)]
    pair, shared = (NodeId("0"), NodeId("1")), frozenset({"10.0.0.0/24"})
    good, bad = Attempted(0.0, shared), Attempted(0.0, shared, failures=2)
    assert due(nodes, known={pair: good}, now_s=AGAIN_S - 1) == []
    assert due(nodes, known={pair: good}, now_s=AGAIN_S) == [("0", "1")]
    assert due(nodes, known={pair: Attempted(0.0, frozenset({"10.9.0.0/24"}))}) == [("0", "1")]
    assert due(nodes, known={pair: bad}, now_s=2 * FIRST_RETRY_S - 1) == []
    assert due(nodes, known={pair: bad}, now_s=2 * FIRST_RETRY_S) == [("0", "1")]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), max_size=8),
    st.sets(st.integers(0, 7)),
)
def test_no_machine_is_ever_in_two_probes(shape: list[tuple[int, bool, bool]], occupied: set[int]) -> None:
    nodes = [lan(n, f"m{m}", 4000 if listens else None) for n, (m, listens, _) in enumerate(shape)]
    busy = [n for n in occupied if n < len(nodes)]
    found = due(nodes, occupied=busy)
    machines: list[str] = []
    for caller, called in found:
        assert nodes[int(called)].peer_port is not None
        machines += {nodes[int(caller)].machine_id, nodes[int(called)].machine_id}
    assert len(machines) == len(set(machines))
    assert not {nodes[n].machine_id for n in busy} & set(machines)
    assert all(shared_networks(nodes[int(a)], nodes[int(b)]) for a, b in found)


class House:
    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.now_s = 1000.0
        self.sessions = Sessions()
        self.state = State()
        self.current: set[tuple[JobId, Fence]] = set()
        self.peers = Peers(
            authority, self.sessions, lambda: self.state, lambda *key: key in self.current, lambda: self.now_s
        )

    def join(self, node_id: NodeId, capacity: Capacity, key: str = "k") -> Session:
        session = Session(node_id, node_id, "s", capacity, key)
        self.sessions.add(session)
        node = NodeStatus(node_id, node_id, NodeLink.CONNECTED, activity=Activity.IDLE)
        self.state = State(MappingProxyType({**self.state.nodes, node_id: node}))
        return session

    def admit(self, fence: int, *nodes: NodeId) -> None:
        self.current = {(JOB, Fence(fence))}
        self.peers.admit(JOB, Fence(fence), nodes, [FILES])

    def heard(self, session: Session) -> list[Roster]:
        """The rosters a node was sent since it was last asked, each properly signed."""
        found = []
        while not session.outgoing.empty():
            message = session.outgoing.get_nowait()
            assert message is not None
            signed = message.roster
            found.append(rosters.verify(signed.roster_json, signed.signature, self.authority.certificate_pem))
        return found


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(open_authority(tmp_path))


def test_a_generation_gets_its_roster_once_with_the_files_that_are_worth_it(house: House) -> None:
    a, b = house.join(A, lan(1)), house.join(B, lan(2))
    house.admit(1, A, B)
    house.admit(1, A, B)
    (roster,) = house.heard(a)
    assert house.heard(b) == [roster] and (roster.subject, roster.fence, roster.digests) == (JOB, 1, (BIG,))
    assert [(m.node_id, m.may) for m in roster.members] == [(A, (Action.FETCH,)), (B, (Action.FETCH,))]
    assert [address.address for address in roster.members[1].addresses] == ["127.0.0.1:4000", "10.0.0.2:4000"]
    assert roster.expires_unix_s == house.now_s + ROSTER_S
    assert worth_asking_for([FILES, FILES]) == (BIG,)


def test_a_new_fence_or_the_end_of_the_job_ends_the_roster_before_it(house: House) -> None:
    a, b, c = house.join(A, lan(1)), house.join(B, lan(2)), house.join(C, lan(3))
    house.admit(1, A, B)
    house.heard(a), house.heard(b)
    house.admit(2, A, C)
    ended, roster = house.heard(a)
    assert (ended.fence, ended.expires_unix_s, ended.digests) == (1, house.now_s, ())
    assert roster.fence == 2 and {m.node_id for m in roster.members} == {A, B, C}
    assert roster.member(B).may == () and roster.member(B).addresses, "it has the files, and gives them"  # type: ignore[union-attr]
    assert [r.fence for r in house.heard(b)] == [1, 2] and [r.fence for r in house.heard(c)] == [2]
    house.current.clear()
    house.peers.keep_rosters()
    assert [r.expires_unix_s for r in house.heard(c)] == [house.now_s]
    house.peers.keep_rosters()
    assert house.heard(c) == []


def test_it_is_renewed_at_half_life_and_when_a_member_goes_or_comes_back(house: House) -> None:
    a, b = house.join(A, lan(1)), house.join(B, lan(2))
    house.admit(1, A, B)
    house.heard(a)
    house.peers.keep_rosters()
    assert house.heard(a) == []
    house.now_s += ROSTER_S / 2 + 1
    house.peers.keep_rosters()
    assert [r.issued_unix_s for r in house.heard(a)] == [house.now_s]
    house.sessions.remove(b)
    house.peers.keep_rosters()
    assert [[m.node_id for m in r.members] for r in house.heard(a)] == [[A]], "who is gone is served no more"
    again = house.join(B, lan(2))
    house.peers.keep_rosters()
    assert len(house.heard(again)) == 1


def test_a_port_that_is_announced_later_is_on_the_roster_within_a_tick(house: House) -> None:
    a, b = house.join(A, lan(1)), house.join(B, lan(2, port=None))
    house.admit(1, A, B)
    house.heard(a)
    b.capacity = lan(2, port=4001)
    house.peers.keep_rosters()
    (roster,) = house.heard(a)
    member = roster.member(B)
    assert member is not None and [each.address for each in member.addresses] == ["127.0.0.1:4001", "10.0.0.2:4001"]
    b.capacity = replace(b.capacity, rtt_s=0.5)
    house.peers.keep_rosters()
    assert house.heard(a) == [], "what is not on it does not renew it"


def probe(house: House, found: pb.ProbeResult) -> None:
    """The probe that is due, answered so by the one who is asked."""

    async def body() -> None:
        ((caller, called),) = house.peers.due()
        under_way = asyncio.create_task(house.peers.probe(caller, called))
        for _ in range(5):  # the question goes through a task
            await asyncio.sleep(0)
        (found.call_id,) = house.sessions[caller].probes
        house.sessions.answer_probe(caller, found)
        await under_way

    asyncio.run(asyncio.wait_for(body(), 30))
    house.now_s += 2 * FIRST_RETRY_S


SILENT = pb.ProbeResult(problem="n-b does not answer (10.0.0.2:4000)", unanswered=True)


def test_a_pair_that_did_not_answer_twice_is_apart_until_it_does(house: House) -> None:
    house.join(A, lan(1)), house.join(B, lan(2))
    probe(house, SILENT)
    assert cluster_view(house.sessions, (A, B)).apart == {}, "it may have been busy"
    probe(house, SILENT)
    assert cluster_view(house.sessions, (A, B)).apart == {(A, B): "n-b does not answer n-a"}
    house.now_s += LONGEST_RETRY_S
    probe(house, answer())
    view = cluster_view(house.sessions, (A, B))
    assert view.apart == {} and view.link(A, B) is not None


def test_a_refused_probe_or_one_that_took_too_long_says_nothing_about_who_can_be_reached(house: House) -> None:
    house.join(A, lan(1)), house.join(B, lan(2))
    for _ in range(3):
        probe(house, pb.ProbeResult(problem="a job runs here"))
        house.now_s += LONGEST_RETRY_S
    assert cluster_view(house.sessions, (A, B)).apart == {}


def test_who_does_not_listen_is_apart_from_every_other_machine_and_who_leaves_is_forgotten(house: House) -> None:
    house.join(A, lan(1, "one")), house.join(B, lan(2, "two"))
    house.join(C, lan(3, "one", port=None))
    assert cluster_view(house.sessions, (A, B, C)).apart == {(B, C): "n-c does not listen for other nodes"}
    house.sessions.unanswered[A, B] = 2
    house.sessions.remove(house.sessions[B])
    house.peers.due()
    assert house.sessions.unanswered == {} and cluster_view(house.sessions, (A, C)).apart == {}
    old = house.join(B, lan(2, "two", port=None), key="")
    assert not old.key_sha256 and (A, B) not in cluster_view(house.sessions, (A, B)).apart, "nothing is known of it"


def test_whom_nobody_reaches_is_apart_also_from_those_it_reaches_itself(house: House) -> None:
    """A firewall lets it call others: the probe that it makes works, a group with it would not."""
    d = NodeId("n-d")
    for number, node_id in enumerate((A, B, C, d), start=1):
        house.join(node_id, lan(number))
    house.sessions.unanswered |= {(A, C): 2, (B, C): 3}
    house.sessions.links[C, d] = LinkEstimate(0.001, 1e8, "10.0.0.0/24")
    view = cluster_view(house.sessions, (A, B, C, d))
    assert set(view.apart) == {(A, C), (B, C), (C, d)} and view.link(C, d) is None
    house.sessions.unanswered[d, C] = 0
    assert set(cluster_view(house.sessions, (A, B, C, d)).apart) == {(A, C), (B, C)}, "somebody does reach it"


def test_older_nodes_are_left_out_and_capped_or_deaf_ones_are_not_asked(house: House) -> None:
    a, old = house.join(A, lan(1)), house.join(B, lan(2), key="")
    house.admit(1, A, B)
    assert house.heard(a) == house.heard(old) == []
    capped = house.join(B, replace(lan(2), max_upload_bytes_per_s=1e6))
    deaf = house.join(C, lan(3, port=None))
    house.admit(2, A, B, C)
    roster = house.heard(capped)[-1]
    assert {m.node_id: bool(m.addresses) for m in roster.members} == {A: True, B: False, C: False}
    assert house.heard(deaf)[-1] == roster


def answer(**changes: float | str) -> pb.ProbeResult:
    good: dict[str, float | str] = {"rtt_minimum_s": 0.001, "rtt_median_s": 0.002, "network": "10.0.0.0/24"}
    good |= {"upload_bytes_per_s": 3e6, "download_bytes_per_s": 2e6, **changes}
    return pb.ProbeResult(**good)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"problem": "no"},
        {"network": "10.1.0.0/24"},
        {"rtt_median_s": float("nan")},
        {"upload_bytes_per_s": 0.0},
        {"download_bytes_per_s": float("inf"), "upload_bytes_per_s": float("inf")},
        {"rtt_minimum_s": -1.0},
    ],
)
def test_a_result_that_makes_no_sense_is_no_link(changes: dict[str, float | str]) -> None:
    shared = frozenset({"10.0.0.0/24"})
    assert link_of(answer(), shared) == LinkEstimate(0.002, 2e6, "10.0.0.0/24")
    assert link_of(answer(**changes), shared) is None


def test_a_probe_is_asked_for_under_a_roster_of_its_own_and_becomes_a_link_of_the_view(house: House) -> None:
    """1 both are idle and a probe is due 2 both get the roster, one the order 3 its answer is the link, nothing is due
    4 one goes away and the link with it."""

    async def body() -> None:
        a, b = house.join(A, lan(1)), house.join(B, lan(2))
        running = asyncio.create_task(house.peers.run())
        try:
            signed, order = (await a.outgoing.get()), (await a.outgoing.get())
            assert signed is not None and order is not None
            roster = rosters.verify(signed.roster.roster_json, signed.roster.signature, house.authority.certificate_pem)
            assert house.heard(b) == [roster] and roster.subject == order.probe_order.subject
            assert [(m.node_id, m.may) for m in roster.members] == [(A, (Action.PROBE,)), (B, ())]
            assert house.peers.due() == [], "it is under way"
            result = answer()
            result.call_id = order.probe_order.call_id
            house.sessions.answer_probe(B, result)  # not the one who was asked
            assert house.sessions.links == {}
            house.sessions.answer_probe(A, result)
            for _ in range(10):  # the answer goes through two tasks
                await asyncio.sleep(0)
            assert house.peers.due() == []
        finally:
            running.cancel()
            await asyncio.wait({running})
        assert cluster_view(house.sessions, (A, B)).link(B, A) == LinkEstimate(0.002, 2e6, "10.0.0.0/24")
        assert cluster_view(house.sessions, (A,)).links == {}
        house.sessions.links[(A, B)] = LinkEstimate(0.002, 2e6, "loopback")
        assert cluster_view(house.sessions, (A, B)).links == {}, "gloo's loopback is known better"
        house.sessions.remove(b)
        house.peers.due()
        assert house.sessions.links == {}

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_node_that_is_measured_or_was_asked_a_task_is_not_probed(house: House) -> None:
    house.join(A, lan(1))
    b = house.join(B, replace(lan(2), flops={}))
    assert house.peers.due() == []
    b.capacity = lan(2)
    assert house.peers.due() == [(A, B)]
    b.tasks[1] = asyncio.Future(loop=asyncio.new_event_loop())
    assert house.peers.due() == []
    b.tasks.clear()
    house.state = house.state.with_node(replace(house.state.nodes[B], activity=Activity.BUSY))
    assert house.peers.due() == []


def test_a_probe_that_is_never_answered_ends() -> None:
    async def body() -> None:
        sessions = Sessions()
        sessions.add(Session(A, A, "s", BASE, "k"))
        with pytest.raises(DeadlineExceeded):
            await sessions.probe(A, "r-1", B, 0.01)
        assert not sessions[A].probes and PROBE_S < 120

    asyncio.run(body())

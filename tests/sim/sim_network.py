"""The wires between nodes and coordinator: what is delayed, doubled, lost, and what comes late.

One stream never changes its own order, because gRPC runs over TCP; neither does this. Order is lost between streams:
when a wire is cut, the first few messages under way in each direction (or all, with what is still written before the
sender has learnt of the cut) may lie in a buffer of the end they were sent to, and the rest is lost. They are read late
and in order, from the old wire, for as long as its reader lives: after the cut, after the node has died and started
again, after its new stream has said hello. What the old stream's end makes of them is decided by the real code
(MembershipService.take) or as node/session.py does (one reader at a time: what is left of a stream it has given up is
never read).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim_coordinator import SimCoordinator
    from sim_node import SimNode
    from sim_world import World

LATE_SHARE = 0.8  # of the cuts, for each direction
LATE_S = 0.5  # at most between two late messages


@dataclass(eq=False)
class Way:
    """One direction of a wire."""

    under_way: deque[Any] = field(default_factory=deque)
    last_s: float = 0.0  # when the last message that was sent arrives
    leaks: bool = False  # cut, yet all that its sender still writes arrives
    read_late: Callable[[Any], Any] = lambda message: None


@dataclass(eq=False)
class Wire:
    """One stream. Each direction keeps its order; both ends learn of a break at their own time."""

    node: SimNode
    coordinator: SimCoordinator
    life: int
    broken: bool = False
    unread: bool = False  # the coordinator's handler of it has ended
    up: Way = field(default_factory=Way)
    down: Way = field(default_factory=Way)
    session: Any = None
    welcomed: bool = False


class Network:
    def __init__(self, world: World) -> None:
        self._world = world
        self.late_up = 0  # read by the coordinator after the cut
        self.late_down = 0  # read by the node after the cut
        self.superseded = 0  # reached the old stream after a newer one of the same node had said hello

    def send_up(self, wire: Wire, message: Any) -> None:
        world = self._world
        copies = 2 if hasattr(message, "seq") and world.faulty(world.faults.duplicate) else 1
        for _ in range(copies):
            self._send(wire.up, message, lambda: wire.broken, lambda message: self._read_up(wire, message))

    def send_down(self, wire: Wire, message: Any) -> None:
        self._send(wire.down, message, lambda: wire.broken, lambda message: self._read_down(wire, message))

    def _send(self, way: Way, message: Any, broken: Callable[[], bool], read: Callable[[Any], Any]) -> None:
        world = self._world
        if broken():
            if way.leaks:
                self._deliver_late(way, [message])
            return
        way.under_way.append(message)
        way.last_s = max(way.last_s, world.clock.now_s + world.random.uniform(0.001, 0.3))
        world.clock.at(way.last_s, lambda: None if broken() else read(way.under_way.popleft()))

    async def _read_up(self, wire: Wire, message: Any) -> None:
        if not wire.unread and self._world.coordinator is wire.coordinator:
            await wire.coordinator.receive(wire, message)

    def _read_down(self, wire: Wire, message: Any) -> None:
        wire.node.when_awake(lambda: wire.node.receive(wire, message))

    def cut(self, wire: Wire) -> None:
        """Some of what is under way comes late, the rest is lost; each end finds out when it does."""
        if wire.broken:
            return
        wire.broken = True
        world = self._world
        wire.up.read_late = lambda message: self._read_late_up(wire, message)
        wire.down.read_late = lambda message: self._read_late_down(wire, message)
        for way, stall_s in (wire.up, 4.0), (wire.down, 1.0):
            way.last_s = world.clock.now_s + world.random.uniform(0.0, stall_s)
            self._deliver_late(way, self._some(way))

        async def coordinator_learns() -> None:
            wire.unread = True
            if world.coordinator is wire.coordinator:
                await wire.coordinator.gone(wire)

        world.clock.at(wire.up.last_s + world.random.uniform(0.0, 10.0 if wire.up.leaks else 2.0), coordinator_learns)
        delay_s = world.random.uniform(0.0, 2.0)
        world.clock.after(delay_s, lambda: wire.node.when_awake(lambda: wire.node.lost_wire(wire)))

    def _some(self, way: Way) -> list[Any]:
        """The first of them: a stream has no gaps. Only where none is lost, what is sent from now on can come too."""
        random = self._world.random
        if random.random() >= LATE_SHARE:
            return []
        way.leaks = random.random() < 0.5
        messages = list(way.under_way)
        return messages if way.leaks else messages[: random.randint(0, len(messages))]

    def _deliver_late(self, way: Way, messages: list[Any]) -> None:
        clock = self._world.clock
        for message in messages:
            way.last_s = max(way.last_s, clock.now_s) + self._world.random.uniform(0.0, LATE_S)
            clock.at(way.last_s, lambda message=message: way.read_late(message))

    async def _read_late_up(self, wire: Wire, message: Any) -> None:
        if not wire.unread and self._world.coordinator is wire.coordinator:
            self.late_up += 1
            current = wire.coordinator.sessions.get(wire.node.node_id)
            self.superseded += wire.session is not None and current is not None and current is not wire.session
        await self._read_up(wire, message)

    def _read_late_down(self, wire: Wire, message: Any) -> None:
        self.late_down += wire.node.dialled is wire
        self._read_down(wire, message)

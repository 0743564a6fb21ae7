"""How long each node stays, on average, before it is lost: from the `node` events of the log, in the order of seq.

MTBF = (seconds it was connected + PRIOR_S) / (losses + 1): a node of which nothing is known counts as one that is lost
once in PRIOR_S. Losses are what nobody announced: a node that leaves or is drained hands over first and is none. A node
that is connected again within the grace of a lease was cut off, not lost, and the events show it as such.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from coordinator.recovery import RESTARTED
from coordinator.store.protocol import Store
from protos.ids import NodeId
from protos.log import Log
from protos.states import NodeLink

log = Log("hive.coordinator.reliability")

PRIOR_S = 3 * 86_400.0
KIND = "node"
_PAGE = 1000
_STEPS = 4
_HERE = frozenset({NodeLink.CONNECTED, NodeLink.DISCONNECTED})  # cut off for less than a lease: it may work on


@dataclass(frozen=True, slots=True)
class Stay:
    """`since_s`: when it came, None while it is not here."""

    here_s: float = 0.0
    losses: int = 0
    since_s: float | None = None


@dataclass(slots=True)
class Reliability:
    _stays: dict[NodeId, Stay] = field(default_factory=dict)
    _seq: int = 0  # of the last event that was read

    def apply(self, time_s: float, payload: Mapping[str, Any]) -> None:
        """One `node` event. Raises KeyError or ValueError for one that is odd."""
        node_id, link = NodeId(str(payload["node_id"])), NodeLink(payload["link"])
        stay = self._stays.get(node_id, Stay())
        if payload.get("reason") == RESTARTED:
            stay = replace(stay, since_s=None)  # nobody looked meanwhile: neither time nor a loss
        elif link in _HERE:
            if stay.since_s is None:
                stay = replace(stay, since_s=time_s)
        elif stay.since_s is not None:
            here_s = stay.here_s + max(0.0, time_s - stay.since_s)
            stay = Stay(here_s, stay.losses + (link is NodeLink.LOST), None)
        self._stays[node_id] = stay

    def mtbf_s(self, node_id: NodeId, now_s: float) -> float:
        """In steps of a fifth: what it says of a plan does not change with every second that passes."""
        stay = self._stays.get(node_id, Stay())
        here_s = stay.here_s + (max(0.0, now_s - stay.since_s) if stay.since_s is not None else 0.0)
        known_s = (here_s + PRIOR_S) / (stay.losses + 1)
        return float(2 ** (round(_STEPS * math.log2(known_s)) / _STEPS))

    async def catch_up(self, store: Store) -> None:
        """What the log holds beyond the last event that was read."""
        while page := await store.events(self._seq, None, (KIND,), _PAGE):
            for event in page:
                self._seq = event.seq
                try:
                    self.apply(event.time_s, json.loads(event.payload_json))
                except (KeyError, ValueError) as error:  # written by another version
                    log.warning("a node event teaches nothing", seq=event.seq, reason=str(error))

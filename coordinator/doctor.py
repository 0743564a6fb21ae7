"""What the coordinator can say about its own health: `hive doctor` shows it beside the client's own checks."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.controller import Controller
from coordinator.learning import Learner
from coordinator.sessions import Sessions
from coordinator.store.protocol import Store
from protos.states import NodeLink

_CHAIN_S = 15.0  # the caller waits for all checks at most twice as long
_ENOUGH_BYTES = 2 * 1024**3


@dataclass(slots=True)
class Doctor:
    home: Path
    store: Store
    controller: Controller
    sessions: Sessions
    learner: Learner
    lan_problem: Callable[[], str]
    address: str
    started_s: float
    advertise: bool = True

    async def checks(self) -> list[dict[str, Any]]:
        chain = await self._chain()
        free_bytes = shutil.disk_usage(self.home).free
        nodes = self.controller.state.nodes.values()
        connected = [node.name for node in nodes if node.link is NodeLink.CONNECTED]
        away = [f"{node.name} ({node.reason})" for node in nodes if node.link in (NodeLink.DISCONNECTED, NodeLink.LOST)]
        networks = {network.cidr for session in self.sessions.values() for network in session.capacity.networks} - {
            "loopback"
        }
        machines = {session.capacity.machine_id for session in self.sessions.values()}
        problem = self.lan_problem()
        announced = "announced" if self.advertise else "not announced (--no-advertise)"
        return [
            _check("running", True, f"{self.address}, since {time.time() - self.started_s:.0f} s"),
            chain,
            _check(
                "disk",
                free_bytes > _ENOUGH_BYTES,
                f"{free_bytes / 1e9:.1f} GB free for {self.home}",
                "free some space: checkpoints and results are kept there",
            ),
            _check(
                "nodes",
                bool(connected),
                f"connected: {', '.join(sorted(connected)) or 'none'}" + (f"; away: {', '.join(away)}" if away else ""),
                "start one with hive-node start; hive token create prints the command",
            ),
            _check(
                "trusted links",
                len(machines) < 2 or bool(networks),
                "one machine: loopback" if len(machines) < 2 else f"networks: {', '.join(sorted(networks)) or 'none'}",
                "name the LAN on each machine: hive-node start --trusted-lan IFACE|CIDR",
            ),
            self._peer_links(),
            _check("zeroconf", not problem, problem or announced, "use --coordinator HOST:PORT on the nodes"),
            _check("learning", True, f"when it started: {self.learner.notes}"),
        ]

    def _peer_links(self) -> dict[str, Any]:
        relayed = sorted(each.name for each in self.sessions.values() if each.capacity.peer_port is None)
        others = f"; by way of the coordinator: {', '.join(relayed)}" if relayed else ""
        return _check("peer links", True, f"{len(self.sessions.links)} pairs of nodes measured{others}")

    def lan_obstacle(self) -> str:
        """Why there is nothing, or less, to see on the LAN; or nothing."""
        return self.lan_problem() if self.advertise else "this coordinator does not look at the LAN (--no-advertise)"

    async def _chain(self) -> dict[str, Any]:
        try:
            async with asyncio.timeout(_CHAIN_S):
                chain = await self.store.verify_chain()
        except TimeoutError:
            return _check("event log", True, f"too long to be verified within {_CHAIN_S:.0f} s")
        return _check("event log", chain.broken_at is None, chain.message, "restore the database from a backup")


def _check(name: str, ok: bool, message: str, hint: str = "") -> dict[str, Any]:
    return {"name": name, "ok": ok, "message": message, "hint": "" if ok else hint}

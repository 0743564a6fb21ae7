"""What others see of this node: its owner in `hive-node status` and `doctor`, the LAN by zeroconf. Changes nothing."""

from __future__ import annotations

import asyncio
import os
import pwd
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from node.discovery import Advertiser
from node.fitness import Fitness
from node.peering import Peering
from node.runner import Runner
from node.session import Session
from node.spool import Spool
from protos import documents, version
from protos.announcement import NodeAnnouncement
from protos.log import Log
from protos.states import Activity
from protos.work import HeldLease

log = Log("hive.node.owner_view")

_ANNOUNCE_S = 15.0


@dataclass(frozen=True, slots=True)
class OwnerView:
    name: str
    fitness: Fitness
    session: Session
    spool: Spool
    runner: Runner
    peering: Peering

    def announcement(self, node_id: str) -> NodeAnnouncement:
        capacity = self.fitness.capacity
        best = max((rate.best for rate in capacity.flops.values()), default=0.0)
        return NodeAnnouncement(
            id=node_id,
            name=self.name,
            version=version.SOFTWARE,
            cores=capacity.cores,
            memory_bytes=capacity.memory_bytes,
            gpu=capacity.gpus[0].name if capacity.gpus else "",
            gflops=best / 1e9,
            joined=bool(node_id),
        )

    async def keep_announced(self, advertiser: Advertiser | None, node_id: str) -> None:
        """What is announced follows what is known, within seconds; the same again sends nothing."""
        while advertiser is not None:
            try:
                await advertiser.update(self.announcement(node_id))
            except Exception:  # a network that went away under zeroconf is no reason to stop working
                log.exception("not announced")
            await asyncio.sleep(_ANNOUNCE_S if self.fitness.capacity.flops else 1.0)

    def status(self, node_id: str, activity: Activity, reason: str, leases: Sequence[HeldLease]) -> dict[str, Any]:
        return {
            "id": node_id,
            "name": self.name,
            "link": "CONNECTED" if self.session.is_connected else "DISCONNECTED",
            "activity": activity.value,
            "reason": reason or self.session.problem,
            "user": _user(),
            "cpu_mechanism": self.runner.cpu_limit.mechanism,
            "pid": os.getpid(),
            "jobs": documents.plain_as(tuple[HeldLease, ...], tuple(leases)),
        }

    def checks(self, unfit: str, advertiser: Advertiser | None) -> list[dict[str, Any]]:
        limit = self.runner.cpu_limit
        capacity = self.fitness.capacity
        lan = advertiser.problem if advertiser is not None else "not announced (--no-advertise)"
        trusted = [network.cidr for network in capacity.networks if network.cidr != "loopback"]
        measured = {name: f"{rate.best / 1e9:.1f}" for name, rate in capacity.flops.items()}
        unmeasured = unfit or self.fitness.obstacle or "not measured"
        return [
            _check("session", self.session.is_connected, self.session.problem or "connected"),
            _check("workers", not unfit, unfit or "start on demand"),
            _check("cpu cap", True, f"{limit.mechanism}: {limit.reason}"),
            _check("memory cap", True, f"{capacity.memory_bytes / 2**30:.1f} GiB, watched on the worker tree"),
            _check("speed", bool(measured), f"GFLOP/s: {measured}" if measured else unmeasured),
            _check("trusted networks", True, ", ".join(trusted) or "none but loopback (see --trusted-lan)"),
            self._peer_check(),
            _check("zeroconf", not (advertiser and lan), lan or "announced"),
            _check("spool", True, f"{len(self.spool.waiting())} messages wait for the coordinator"),
        ]

    def _peer_check(self) -> dict[str, Any]:
        """Not to listen is the owner's choice; not to be able to is a fault."""
        peering = self.peering
        ok = peering.port is not None or not peering.wanted or not self.fitness.capacity.networks
        where = "" if peering.port is None else f"other nodes reach this one at port {peering.port}"
        return _check("peers", ok, "; ".join(filter(None, (where, peering.problem))))


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container without this user in its passwd
        return str(os.geteuid())


def _check(name: str, ok: bool, message: str) -> dict[str, Any]:
    return {"name": name, "ok": ok, "message": message, "hint": ""}

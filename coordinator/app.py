"""The coordinator put together: store, authority, control loop, services on their two ports, beacon and clock.

`serve` runs until it is cancelled and then lets go in order, within seconds: first the doors, so that nothing new is
begun, then what is under way, then the store. Everything it needs after a kill -9 is below HIVE_HOME/coordinator.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator import listeners, qtable_events
from coordinator.artifacts import ArtifactsService
from coordinator.authority import Authority, open_authority
from coordinator.beacon import Beacon
from coordinator.blobs import BlobStore
from coordinator.cluster import away, nobody
from coordinator.config import CoordinatorConfig
from coordinator.control.state import Timing
from coordinator.controller import Controller
from coordinator.doctor import Doctor
from coordinator.effects import Effects
from coordinator.enrolment import EnrolmentService
from coordinator.event_tail import EventTail
from coordinator.garbage import Garbage
from coordinator.identification import Identifier
from coordinator.job_folder import JobFolders
from coordinator.jobs_service import JobsService
from coordinator.join_token import JoinToken
from coordinator.learning import Learner
from coordinator.membership import MembershipService
from coordinator.peers import Peers
from coordinator.placement import Placement
from coordinator.qtable_service import QTableService
from coordinator.reliability import Reliability
from coordinator.rendezvous import Rendezvous
from coordinator.reviewing import Reviewer
from coordinator.sessions import Sessions
from coordinator.spares import keep_prepared
from coordinator.store.protocol import Store
from coordinator.store.sqlite import SqliteStore
from coordinator.token_book import TokenBook
from protos import credentials, enrol, limits, version
from protos.announcement import CoordinatorAnnouncement
from protos.dial import join_address
from protos.errors import HiveError
from protos.gen import (
    artifacts_pb2,
    artifacts_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    membership_pb2,
    membership_pb2_grpc,
    qtable_pb2,
    qtable_pb2_grpc,
)
from protos.log import Log
from protos.token import Role, Token

log = Log("hive.coordinator.app")

TICK_S = 0.25
_GRACE_S = 0.5  # for calls under way; followers and nodes come back by themselves


@dataclass(frozen=True, slots=True)
class Ready:
    """What a person needs to go on: printed by `hive coordinator start`."""

    address: str  # of the enrolment port
    session_port: int
    home: Path
    token: str
    join: str


def join_command(address: str, token: str, role: Role) -> str:
    if role is Role.NODE:
        return f"hive-node start --coordinator {address} --token {token}"
    return f"HIVE_COORDINATOR={address} HIVE_TOKEN={token} hive nodes"


def reachable_host(host: str) -> str:
    """The address to tell others: the one we listen on, or for all interfaces the first that is not loopback."""
    if host not in ("0.0.0.0", "::"):
        return host
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        for address in addresses:
            if address.family.name == "AF_INET" and not address.address.startswith(("127.", "169.254.")):
                if name.startswith(("docker", "br-", "veth", "virbr")):
                    continue
                return str(address.address)
    return "127.0.0.1"


async def serve(config: CoordinatorConfig, on_ready: Callable[[Ready], None] = lambda ready: None) -> None:
    """Run until cancelled. Raises HiveError when it cannot start (port taken, already running, disk full)."""
    folder = config.home / "coordinator"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    store = await SqliteStore.open(folder, config.database_url or None)
    try:
        authority = open_authority(folder)
        async with asyncio.TaskGroup() as tasks, contextlib.AsyncExitStack() as doors:
            on_ready(await _start(config, folder, store, authority, tasks, doors))
            await asyncio.Event().wait()
    except* HiveError as failures:
        raise _first(failures) from None
    finally:
        await store.close()


def _first(failures: BaseExceptionGroup[HiveError]) -> HiveError:
    error = failures.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def _start(
    config: CoordinatorConfig,
    folder: Path,
    store: Store,
    authority: Authority,
    tasks: asyncio.TaskGroup,
    doors: contextlib.AsyncExitStack,
) -> Ready:
    blobs = BlobStore(folder / "blobs")
    folders = JobFolders(folder / "jobs")
    tokens = TokenBook(store)
    join_token = JoinToken(folder, tokens)
    garbage = Garbage(store, blobs)
    tail = EventTail(store)
    sessions = Sessions()
    learner = Learner(folder / "qtable.json", origin=await qtable_events.origin_of(store))
    await learner.catch_up(store)
    reliability = Reliability()
    await reliability.catch_up(store)
    controller: Controller
    placement = Placement(
        sessions,
        learner,
        random.Random(),
        lambda: nobody(controller.state.nodes.values()),
        lambda: away(controller.state.nodes.values(), controller.capacity),
        lambda node_id: reliability.mtbf_s(node_id, time.time()),
    )
    identifier = Identifier(sessions, lambda digest: blobs.path(digest))
    rendezvous = Rendezvous(lambda job_id, fence: controller.is_current(job_id, fence))
    peers = Peers(
        authority,
        sessions,
        lambda: controller.state,
        lambda job_id, fence: controller.is_current(job_id, fence),
    )
    effects = Effects(store, sessions, rendezvous, identifier, placement, learner, folders, blobs, peers, tasks)
    controller = Controller(store, placement.plan_for, effects.perform, effects.supplement, time.time, Timing())
    effects.controller = controller
    await controller.recover()
    effects.take_up()

    session_server = listeners.session_server(tokens.is_member)
    session_port = listeners.bind_session(session_server, authority, config.host, config.session_port)
    front = listeners.front_server()
    port = listeners.bind_front(front, authority, config.host, config.port)
    enrolment = EnrolmentService(authority, tokens, lambda: session_port)
    membership_pb2_grpc.add_EnrolmentServicer_to_server(enrolment, front)  # type: ignore[no-untyped-call]
    address = join_address(reachable_host(config.host), port)
    beacon = Beacon(_announcement(config, authority, port, session_port))
    doctor = Doctor(
        config.home,
        store,
        controller,
        sessions,
        learner,
        lambda: beacon.problem if config.advertise else "",
        address,
        time.time(),
        config.advertise,
    )
    service = JobsService(
        store,
        controller,
        sessions,
        identifier,
        placement,
        folders,
        blobs,
        tokens,
        doctor,
        tail,
        join_token,
        lan=lambda: _lan(beacon, controller) if config.advertise else (),
        token_text=lambda secret: Token(authority.fingerprint, secret).text,
        join_command=lambda token, role: join_command(address, token, role),
    )
    member = MembershipService(authority, controller, sessions, rendezvous, store, folders, garbage.replaced)
    jobs_pb2_grpc.add_JobsServicer_to_server(service, session_server)  # type: ignore[no-untyped-call]
    membership_pb2_grpc.add_MembershipServicer_to_server(member, session_server)  # type: ignore[no-untyped-call]
    qtable_pb2_grpc.add_QTableServicer_to_server(QTableService(store, learner), session_server)  # type: ignore[no-untyped-call]
    artifacts_pb2_grpc.add_ArtifactsServicer_to_server(  # type: ignore[no-untyped-call]
        ArtifactsService(blobs), session_server
    )
    await _health(session_server)
    await session_server.start()
    doors.push_async_callback(session_server.stop, _GRACE_S)
    await front.start()
    doors.push_async_callback(front.stop, _GRACE_S)
    if config.advertise:
        await doors.enter_async_context(beacon)
    await _owner_credential(config, authority, tokens, port, session_port)
    token = Token(authority.fingerprint, await join_token.secret()).text
    beforehand = keep_prepared(lambda: controller.state, placement, time.monotonic)
    reviewer = Reviewer(controller, placement, learner, reliability, folders, store, time.monotonic)
    for helper in (
        controller.run_clock(TICK_S), garbage.run(), tail.run(), peers.run(), beforehand, reviewer.run()
    ):  # fmt: skip
        tasks.create_task(helper)
    log.info("coordinator is ready", address=address, session_port=session_port)
    return Ready(address, session_port, config.home, token, join_command(address, token, Role.NODE))


async def _health(server: Any) -> None:
    checks: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
    names = [
        jobs_pb2.DESCRIPTOR.services_by_name["Jobs"].full_name,
        membership_pb2.DESCRIPTOR.services_by_name["Membership"].full_name,
        qtable_pb2.DESCRIPTOR.services_by_name["QTable"].full_name,
        artifacts_pb2.DESCRIPTOR.services_by_name["Artifacts"].full_name,
    ]
    for name in ("", *names):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)


def _announcement(
    config: CoordinatorConfig, authority: Authority, port: int, session_port: int
) -> CoordinatorAnnouncement:
    return CoordinatorAnnouncement(
        authority.fingerprint, port, session_port, version.PROTOCOL, version.SOFTWARE, config.name
    )


def _lan(beacon: Beacon, controller: Controller) -> list[dict[str, Any]]:
    """Machines that zeroconf sees; hints only."""
    members = controller.state.nodes
    shown = []
    for sighting in beacon.nodes():
        said = sighting.announcement
        shown.append(
            {
                "name": said.name,
                "address": sighting.addresses[0] if sighting.addresses else "",
                "id": said.id,
                "version": said.version,
                "cores": said.cores,
                "memory_bytes": said.memory_bytes,
                "gpu": said.gpu,
                "gflops": said.gflops,
                "joined": said.id in members,
                "join": "" if said.id in members else "hive token create prints the command to type there",
            }
        )
    return shown


async def _owner_credential(
    config: CoordinatorConfig, authority: Authority, tokens: TokenBook, port: int, session_port: int
) -> None:
    """Whoever may read this HIVE_HOME is its administrator: a credential for the CLI on this machine."""
    path = config.home / "client" / "credential.json"
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    front_address, session_address = join_address(host, port), join_address(host, session_port)
    with contextlib.suppress(Exception):
        stored = credentials.load(path)
        same = stored.ca_pem.encode() == authority.certificate_pem and await tokens.is_member(stored.id)
        if same and stored.expires_unix_s > time.time() + 3600:
            credentials.save(stored.at(front_address, session_address), path)
            return
    _, secret = await tokens.create(Role.ADMIN, 1, 300.0)
    made = await enrol.enrol(front_address, Token(authority.fingerprint, secret), "owner")
    credentials.save(made.at(front_address, session_address), path)


__all__ = ["Ready", "join_command", "limits", "serve"]

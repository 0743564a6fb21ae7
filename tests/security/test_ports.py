"""What a port scan finds while a job runs: two doors of the coordinator, and nothing of it without a certificate."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from coordinator.authority import open_authority
from node import peer_client
from node.control import socket_path
from protos import dial, enrol
from protos.credentials import SERVER_NAME
from protos.gen import artifacts_pb2, jobs_pb2, membership_pb2, peer_pb2
from protos.roster import METADATA_KEY
from tests.security.conftest import Working

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

SERVICES = [
    service
    for file in (membership_pb2, jobs_pb2, artifacts_pb2, health_pb2, reflection_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
]
GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: hive\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    b"\x16\x03\x01" + b"\xff" * 500,
    bytes(range(256)) * 16,
]


def _as_it_is(content: bytes) -> bytes:
    return content


def listeners(pid: int) -> set[tuple[str, int]]:
    """(address, port) of the TCP sockets that a process and everything below it listen on."""
    family = psutil.Process(pid)
    return {
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for process in (family, *family.children(recursive=True))
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def answers(connection: socket.socket) -> bytes:
    """Everything that comes until the other side has closed or says nothing for a second."""
    connection.settimeout(1.0)
    said = b""
    with contextlib.suppress(OSError):
        while chunk := connection.recv(4096):
            said += chunk
    return said


@contextlib.contextmanager
def dialled(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        yield connection


def test_the_coordinator_listens_on_its_two_ports_and_each_node_on_the_one_for_its_peers(working: Working) -> None:
    assert listeners(working.coordinator_pid) == {
        ("127.0.0.1", working.front_port),
        ("127.0.0.1", working.cluster.session_port),
    }
    for name, node in working.cluster.nodes.items():
        (parent,) = psutil.Process(node.pid).children()
        found = [
            [
                (c.laddr.ip.removeprefix("::ffff:"), c.laddr.port)
                for c in process.net_connections("tcp")
                if c.status == psutil.CONN_LISTEN
            ]
            for process in (psutil.Process(node.pid), parent)
        ]
        assert found == [[("127.0.0.1", working.peer_port(name))], []], "only the daemon, and only where it is trusted"


def test_workers_listen_on_loopback_only_once_each_and_talk_to_each_other_there(working: Working) -> None:
    workers = [pid for name in working.cluster.nodes for pid in working.cluster.worker_pids(name)]
    assert len(workers) == 2
    gloo = [listeners(pid) for pid in workers]
    assert all(len(found) == 1 and {address for address, _ in found} == {"127.0.0.1"} for found in gloo), gloo
    ports = {port for found in gloo for _, port in found}
    for pid in workers:
        for connection in psutil.Process(pid).net_connections("tcp"):
            if connection.status == psutil.CONN_ESTABLISHED:
                assert (connection.laddr.ip, connection.raddr.ip) == ("127.0.0.1", "127.0.0.1")
                assert ports & {connection.laddr.port, connection.raddr.port}, "no TCPStore, no other peer"


@pytest.mark.parametrize("garbage", GARBAGE, ids=["http1", "http2", "broken-tls", "bytes"])
def test_plain_text_gets_no_answer_from_either_port(working: Working, garbage: bytes) -> None:
    for port in (working.front_port, working.cluster.session_port, working.peer_port("n0")):
        with dialled(port) as connection:
            connection.sendall(garbage)
            said = answers(connection)
        assert said == b"" or said[0] == 0x15, f"port {port} answered {said[:40]!r}, which is no TLS alert"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["tls1.2", "tls1.3"])
def test_without_a_certificate_the_session_port_says_nothing_after_the_handshake(
    working: Working, version: ssl.TLSVersion
) -> None:
    assert _after_handshake(working, None, version) == b""
    n0 = working.node("n0").id
    assert _after_handshake(working, None, version, working.peer_port("n0"), n0) == b"", "nor does the one for peers"


def test_a_certificate_of_another_authority_is_no_certificate(working: Working, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    theirs = open_authority(tmp_path / "theirs")
    key, certificate = theirs.server_identity()
    pair = tmp_path / "pair.pem"
    pair.write_bytes(key + certificate)
    assert _after_handshake(working, pair, ssl.TLSVersion.TLSv1_3) == b""
    n0 = working.node("n0").id
    assert _after_handshake(working, pair, ssl.TLSVersion.TLSv1_3, working.peer_port("n0"), n0) == b""


def test_members_without_a_roster_get_nothing_from_a_nodes_port(working: Working) -> None:
    """The owner and another node have certificates of this authority; neither is on a roster that n0 holds."""

    async def main() -> dict[str, set[str]]:
        codes: dict[str, set[str]] = {}
        n0 = working.node("n0")
        for name, caller in (("owner", working.owner), ("n1", working.node("n1"))):
            async with peer_client.channel(f"127.0.0.1:{working.peer_port('n0')}", caller, n0.id) as line:
                for method in peer_pb2.DESCRIPTOR.services_by_name["Peer"].methods:
                    for metadata in ((), ((METADATA_KEY, "j-none/1"),)):
                        call = line.unary_unary(f"/hive.v1.Peer/{method.name}", _as_it_is, _as_it_is)
                        codes.setdefault(name, set()).add((await call(b"", metadata=metadata, timeout=10).code()).name)
        return codes

    assert asyncio.run(main()) == {"owner": {"PERMISSION_DENIED"}, "n1": {"PERMISSION_DENIED"}}


def _after_handshake(
    working: Working, pair: Path | None, version: ssl.TLSVersion, port: int = 0, name: str = SERVER_NAME
) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=working.owner.ca_pem)
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    if pair is not None:
        context.load_cert_chain(pair)
    with dialled(port or working.cluster.session_port) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=name) as connection:
                connection.sendall(GARBAGE[1])
                return answers(connection)
        except OSError:  # refused within the handshake
            return b""


def test_health_and_reflection_need_a_certificate_too(working: Working) -> None:
    async def main() -> None:
        async with dial.front_channel(working.session_address, working.owner.ca_pem.encode()) as line:
            health: Any = health_pb2_grpc.HealthStub(line)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            reflection: Any = reflection_pb2_grpc.ServerReflectionStub(line)
            call = reflection.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10
            )
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        async with dial.channel(working.session_address, working.owner) as line:
            health = health_pb2_grpc.HealthStub(line)
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

    asyncio.run(main())


def test_the_enrolment_port_serves_enrolment_and_nothing_else(working: Working) -> None:
    async def main() -> dict[str, str]:
        refused = {}
        async with dial.front_channel(working.cluster.address, working.owner.ca_pem.encode()) as line:
            for service in SERVICES:
                for method in service.methods:
                    name = f"/{service.full_name}/{method.name}"
                    call = line.unary_unary(name, _as_it_is, _as_it_is)(b"", timeout=10)
                    refused[name] = (await call.code()).name
        return refused

    codes = asyncio.run(main())
    # an empty enrolment is a member that comes back without a key
    assert codes.pop("/hive.v1.Enrolment/Enrol") in ("FAILED_PRECONDITION", "UNAUTHENTICATED", "PERMISSION_DENIED")
    assert set(codes.values()) <= {"UNIMPLEMENTED", "PERMISSION_DENIED"}, codes


def test_a_stranger_on_the_enrolment_port_learns_the_authority_and_no_more(working: Working) -> None:
    fingerprint = working.cluster.token.split(".")[1]
    ca_pem = asyncio.run(enrol.fetch_ca(working.cluster.address, fingerprint))
    assert ca_pem.strip() == working.owner.ca_pem.encode().strip()


def test_a_scan_of_every_open_port_does_not_disturb_the_job(working: Working) -> None:
    everything = listeners(working.coordinator_pid)
    for node in working.cluster.nodes.values():
        everything |= listeners(node.pid)
    for _, port in everything:
        for garbage in (b"", *GARBAGE):
            with contextlib.suppress(OSError), dialled(port) as connection:
                connection.sendall(garbage)
                connection.settimeout(0.2)
                with contextlib.suppress(OSError):
                    connection.recv(64)
    working.goes_on()


def test_the_control_socket_of_a_node_is_its_owners_alone(working: Working) -> None:
    for name in working.cluster.nodes:
        path = socket_path(working.cluster.folder / name)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

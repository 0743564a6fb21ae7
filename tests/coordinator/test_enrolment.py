"""Joining over real TLS on loopback: the front door, the session port, and every way to be refused."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import listeners
from coordinator.authority import Authority, check_request, open_authority
from coordinator.enrolment import (
    EnrolmentService,
    FailureLimiter,
    peer_address,
    renew,
)
from coordinator.interceptors import caller
from coordinator.store.memory import MemoryStore
from coordinator.store.protocol import PutMember
from coordinator.token_book import TokenBook
from protos import dial, enrol
from protos.credentials import Credential
from protos.errors import AccessError, Conflict, DeadlineExceeded, ErrorCode, Exhausted, HiveError, Unreachable
from protos.gen import (
    artifacts_pb2,
    artifacts_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    membership_pb2,
    membership_pb2_grpc,
)
from protos.ids import NodeId
from protos.token import Role, Token, new_token


@dataclass
class Grant:
    role: Role
    uses: int | None = 1
    lifetime_s: float = 3600.0


class Book(TokenBook):
    """The real one over the memory store, with shorthands."""

    def __init__(self) -> None:
        self.now = time.time()
        self.store = MemoryStore()
        super().__init__(self.store, clock=lambda: self.now)

    async def add(self, authority: Authority, grant: Grant) -> Token:
        _, secret = await self.create(grant.role, grant.uses, grant.lifetime_s)
        return Token(authority.fingerprint, secret)

    async def remove(self, subject: str) -> None:
        member = await self.store.member(NodeId(subject))
        assert member is not None
        await self.store.commit(PutMember(replace(member, left=True), member.version))


class Membership(membership_pb2_grpc.MembershipServicer):
    def __init__(self, authority: Authority) -> None:
        self.authority = authority

    async def Attach(self, requests: Any, context: Any) -> AsyncIterator[membership_pb2.CoordinatorMessage]:
        who = caller(context)
        async for message in requests:
            if message.WhichOneof("body") == "leaving":
                raise Conflict("leaving is refused in this test", "stay")
            yield membership_pb2.CoordinatorMessage(welcome=membership_pb2.Welcome(protocol=1, node_id=who.id))

    async def Renew(self, request: membership_pb2.RenewRequest, context: Any) -> membership_pb2.RenewReply:
        return renew(self.authority, request, context, time.time())


class Jobs(jobs_pb2_grpc.JobsServicer):
    async def Submit(self, request: jobs_pb2.SubmitRequest, context: Any) -> jobs_pb2.Document:
        return jobs_pb2.Document(json=caller(context).id.encode())

    async def Show(self, request: jobs_pb2.JobRequest, context: Any) -> jobs_pb2.Document:
        raise HiveError("naïve job " + "x" * 9000, "h" * 3000, code=ErrorCode.NOT_FOUND)

    async def Doctor(self, request: jobs_pb2.ListRequest, context: Any) -> jobs_pb2.Document:
        raise ZeroDivisionError("the secret internals")

    async def Explain(self, request: jobs_pb2.JobRequest, context: Any) -> jobs_pb2.Document:
        await asyncio.Event().wait()
        raise AssertionError

    async def Logs(self, request: jobs_pb2.LogsRequest, context: Any) -> None:
        for text in (b"one", b"two"):
            await context.write(jobs_pb2.LogChunk(text=text))


class Artifacts(artifacts_pb2_grpc.ArtifactsServicer):
    async def Put(self, chunks: Any, context: Any) -> artifacts_pb2.PutReply:
        return artifacts_pb2.PutReply(bytes=sum([len(chunk.content) async for chunk in chunks]))


@dataclass
class Coordinator:
    authority: Authority
    book: Book
    front: str
    session: str


@asynccontextmanager
async def coordinator(folder: Path, limiter: FailureLimiter | None = None) -> AsyncIterator[Coordinator]:
    authority = open_authority(folder)
    book = Book()
    front, session = listeners.front_server(), listeners.session_server(book.is_member)
    session_port = listeners.bind_session(session, authority, "127.0.0.1", 0)
    service = EnrolmentService(authority, book, lambda: session_port, limiter=limiter)
    membership_pb2_grpc.add_EnrolmentServicer_to_server(service, front)
    jobs_pb2_grpc.add_JobsServicer_to_server(Jobs(), front)  # must stay out of reach there
    membership_pb2_grpc.add_EnrolmentServicer_to_server(service, session)  # and this here
    membership_pb2_grpc.add_MembershipServicer_to_server(Membership(authority), session)
    jobs_pb2_grpc.add_JobsServicer_to_server(Jobs(), session)
    artifacts_pb2_grpc.add_ArtifactsServicer_to_server(Artifacts(), session)
    front_port = listeners.bind_front(front, authority, "127.0.0.1", 0)
    await front.start()
    await session.start()
    try:
        yield Coordinator(authority, book, f"127.0.0.1:{front_port}", f"127.0.0.1:{session_port}")
    finally:
        await front.stop(0)
        await session.stop(0)


def run(folder: Path, body: Callable[[Coordinator], Awaitable[None]], limiter: FailureLimiter | None = None) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), coordinator(folder, limiter) as running:
            await body(running)

    asyncio.run(main())


async def joined(running: Coordinator, role: Role, name: str = "lab-3") -> Credential:
    return await enrol.enrol(running.front, await running.book.add(running.authority, Grant(role)), name)


async def call(credential: Credential, method: str, request: Any, **options: Any) -> Any:
    async with dial.channel(credential.session_address, credential, **options) as line:
        service, stub = method.split("/")
        module = {"Jobs": jobs_pb2_grpc, "Membership": membership_pb2_grpc, "Enrolment": membership_pb2_grpc}[service]
        with dial.errors_of(credential.session_address):
            return await getattr(getattr(module, f"{service}Stub")(line), stub)(request, timeout=10)


def test_a_token_becomes_a_certificate_of_its_role(tmp_path: Path) -> None:
    async def body(running: Coordinator) -> None:
        node = await joined(running, Role.NODE, "lab 3 ü")
        assert node.id.startswith("n-") and node.role is Role.NODE and node.name == "lab 3 ü"
        assert node.session_address == running.session and node.front_address == running.front
        assert 23 * 3600 < node.expires_unix_s - time.time() <= 24 * 3600
        submitter = await joined(running, Role.SUBMITTER)
        assert submitter.id.startswith("c-")
        reply = await call(submitter, "Jobs/Submit", jobs_pb2.SubmitRequest())
        assert reply.json.decode() == submitter.id

    run(tmp_path, body)


def test_each_reason_to_refuse_a_token_has_its_own_sentence(tmp_path: Path) -> None:
    async def body(running: Coordinator) -> None:
        spent = await running.book.add(running.authority, Grant(Role.NODE, uses=1))
        await enrol.enrol(running.front, spent, "first")
        running.book.now += 1
        revoked = await running.book.add(running.authority, Grant(Role.NODE))
        await running.book.revoke((await running.book.list())[0].token_id)
        running.book.now -= 100
        expired = await running.book.add(running.authority, Grant(Role.NODE, lifetime_s=1))
        cases = {
            "not known": new_token(running.authority.fingerprint),
            "expired": expired,
            "used up": spent,
            "revoked": revoked,
        }
        for sentence, token in cases.items():
            with pytest.raises(AccessError, match=sentence) as refused:
                await enrol.enrol(running.front, token, "lab-3")
            assert refused.value.exit_code == 5 and refused.value.hint
            assert token.secret not in str(refused.value)

    run(tmp_path, body)


def test_a_retry_with_the_same_key_is_one_use_and_one_identity(tmp_path: Path) -> None:
    async def body(running: Coordinator) -> None:
        token = await running.book.add(running.authority, Grant(Role.NODE, uses=1))
        key = enrol.new_key_pem()
        first = await enrol.enrol(running.front, token, "lab-3", key_pem=key)
        again = await enrol.enrol(running.front, token, "lab-3", key_pem=key)
        assert first.id == again.id
        with pytest.raises(AccessError, match="used up"):
            await enrol.enrol(running.front, token, "another machine")

    run(tmp_path, body)


def test_a_token_of_another_coordinator_never_sends_its_secret(tmp_path: Path) -> None:
    async def body(running: Coordinator) -> None:
        other = open_authority(tmp_path / "other")
        with pytest.raises(AccessError, match="another coordinator"):
            await enrol.enrol(running.front, new_token(other.fingerprint), "lab-3")

    run(tmp_path, body)


def test_showing_the_right_ca_without_its_key_is_not_enough(tmp_path: Path) -> None:
    """An impostor replays the real CA certificate in its chain behind a leaf of its own."""

    async def body(running: Coordinator) -> None:
        impostor = open_authority(tmp_path / "impostor")
        key, chain = impostor.server_identity()
        server = listeners.front_server()
        seen: list[str] = []

        class Thief(membership_pb2_grpc.EnrolmentServicer):
            async def Enrol(self, request: membership_pb2.EnrolRequest, context: Any) -> Any:
                seen.append(request.secret)

        membership_pb2_grpc.add_EnrolmentServicer_to_server(Thief(), server)
        credentials = grpc.ssl_server_credentials([(key, chain + running.authority.certificate_pem)])
        port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        try:
            with pytest.raises(AccessError, match="does not prove"):
                await enrol.enrol(f"127.0.0.1:{port}", new_token(running.authority.fingerprint), "lab-3")
        finally:
            await server.stop(0)
        assert seen == []

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("protocol", "minimum", "sentence"),
    [(0, 0, "upgrade hive on lab-3"), (99, 98, "upgrade hive on the coordinator")],
)
def test_enrolment_says_which_side_to_upgrade(tmp_path: Path, protocol: int, minimum: int, sentence: str) -> None:
    async def body(running: Coordinator) -> None:
        async with dial.front_channel(running.front, running.authority.certificate_pem) as line:
            request = membership_pb2.EnrolRequest(protocol=protocol, minimum_protocol=minimum, name="lab-3")
            with pytest.raises(Unreachable, match=sentence) as refused, dial.errors_of(running.front):
                await membership_pb2_grpc.EnrolmentStub(line).Enrol(request, timeout=10)
            assert refused.value.code is ErrorCode.VERSION_MISMATCH and refused.value.exit_code == 6

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("protocol", "minimum", "sentence"),
    [(0, 0, "upgrade hive on submitter lab-3"), (99, 98, "upgrade hive on the coordinator")],
)
def test_a_call_says_which_side_to_upgrade(tmp_path: Path, protocol: int, minimum: int, sentence: str) -> None:
    async def body(running: Coordinator) -> None:
        submitter = await joined(running, Role.SUBMITTER)
        with pytest.raises(Unreachable, match=sentence):
            await call(submitter, "Jobs/Submit", jobs_pb2.SubmitRequest(), protocol=protocol, minimum=minimum)

    run(tmp_path, body)


def test_a_nodes_credential_cannot_submit_and_no_one_enrols_on_the_session_port(tmp_path: Path) -> None:
    async def body(running: Coordinator) -> None:
        node, admin = await joined(running, Role.NODE), await joined(running, Role.ADMIN)
        with pytest.raises(AccessError, match="role node may not call Submit") as refused:
            await call(node, "Jobs/Submit", jobs_pb2.SubmitRequest())
        assert refused.value.code is ErrorCode.FORBIDDEN
        with pytest.raises(AccessError, match="may not call Enrol"):
            await call(admin, "Enrolment/Enrol", membership_pb2.EnrolRequest())

    run(tmp_path, body)


def test_the_front_door_serves_enrolment_only(tmp_path: Path) -> None:
    async def body(running: Coordinator) -> None:
        async with dial.front_channel(running.front, running.authority.certificate_pem) as line:
            with pytest.raises(AccessError, match="enrolment only"), dial.errors_of(running.front):
                await jobs_pb2_grpc.JobsStub(line).Submit(jobs_pb2.SubmitRequest(), timeout=10)

    run(tmp_path, body)


def test_the_session_port_refuses_the_handshake_without_our_certificate(tmp_path: Path) -> None:
    async def body(running: Coordinator) -> None:
        stranger = open_authority(tmp_path / "stranger").credential(Role.ADMIN, "eve", "", running.session, time.time())
        ours = running.authority.certificate_pem
        expired = running.authority.credential(Role.ADMIN, "old", "", running.session, time.time() - 30 * 3600)
        for key, certificate in (
            (None, None),
            (stranger.key_pem.encode(), stranger.certificate_pem.encode()),
            (expired.key_pem.encode(), expired.certificate_pem.encode()),
        ):
            credentials = grpc.ssl_channel_credentials(ours, key, certificate)
            async with grpc.aio.secure_channel(running.session, credentials, options=dial.options()) as line:
                with pytest.raises(Unreachable, match="before a word was spoken"), dial.errors_of(running.session):
                    await jobs_pb2_grpc.JobsStub(line).Submit(jobs_pb2.SubmitRequest(), timeout=10)

    run(tmp_path, body)


def test_a_removed_member_is_refused_at_its_next_call_and_cannot_rejoin_by_its_key(tmp_path: Path) -> None:
    async def body(running: Coordinator) -> None:
        submitter = await joined(running, Role.SUBMITTER)
        await running.book.remove(submitter.id)
        with pytest.raises(AccessError, match="no longer a member"):
            await call(submitter, "Jobs/Submit", jobs_pb2.SubmitRequest())
        with pytest.raises(AccessError, match="not a member"):
            await enrol.rejoin(running.front, submitter)

    run(tmp_path, body)


def test_a_member_whose_certificate_ended_rejoins_by_its_key(tmp_path: Path) -> None:
    async def body(running: Coordinator) -> None:
        node = await joined(running, Role.NODE)
        again = await enrol.rejoin(running.front, node)
        assert (again.id, again.role, again.key_pem) == (node.id, node.role, node.key_pem)
        assert again.certificate_pem != node.certificate_pem

    run(tmp_path, body)


def test_a_credential_is_refreshed_only_when_it_is_due(tmp_path: Path) -> None:
    async def body(running: Coordinator) -> None:
        node = await joined(running, Role.NODE)
        assert await enrol.refreshed(node, node.issued_unix_s + 60) is node
        renewed = await enrol.refreshed(node, node.renew_at_unix_s)
        assert renewed.certificate_pem != node.certificate_pem and renewed.id == node.id
        rejoined = await enrol.refreshed(node.at(running.front, "127.0.0.1:1"), node.expires_unix_s)
        assert rejoined.session_address == running.session and rejoined.id == node.id
        away = node.at("127.0.0.1:1", "127.0.0.1:1")
        assert await enrol.refreshed(away, node.renew_at_unix_s) is away

    run(tmp_path, body)


def test_renewal_keeps_id_role_and_name_and_refuses_another_key(tmp_path: Path) -> None:
    async def body(running: Coordinator) -> None:
        node = await joined(running, Role.NODE)
        fresh = await enrol.renew(node)
        assert (fresh.id, fresh.role, fresh.name) == (node.id, node.role, node.name)
        assert fresh.certificate_pem != node.certificate_pem
        other = membership_pb2.RenewRequest(csr_der=enrol.request_for(enrol.new_key_pem()))
        with pytest.raises(AccessError, match="only for the key"):
            await call(node, "Membership/Renew", other)

    run(tmp_path, body)


def test_streams_carry_the_caller_and_the_error(tmp_path: Path) -> None:
    async def body(running: Coordinator) -> None:
        node = await joined(running, Role.NODE)
        async with dial.channel(node.session_address, node) as line:
            stream = membership_pb2_grpc.MembershipStub(line).Attach(timeout=10)
            await stream.write(membership_pb2.NodeMessage(heartbeat=membership_pb2.Heartbeat(number=1)))
            assert (await stream.read()).welcome.node_id == node.id
            await stream.write(membership_pb2.NodeMessage(leaving=membership_pb2.Leaving()))
            with pytest.raises(Conflict, match="leaving is refused"), dial.errors_of(running.session):
                await stream.read()
                raise await _ended(stream)
            chunks = [artifacts_pb2.PutChunk(content=b"x" * size) for size in (10, 20)]
            assert (await artifacts_pb2_grpc.ArtifactsStub(line).Put(iter(chunks), timeout=10)).bytes == 30
        submitter = await joined(running, Role.SUBMITTER)
        async with dial.channel(submitter.session_address, submitter) as line:
            logs = jobs_pb2_grpc.JobsStub(line).Logs(jobs_pb2.LogsRequest(), timeout=10)
            assert [chunk.text async for chunk in logs] == [b"one", b"two"]

    run(tmp_path, body)


async def _ended(stream: Any) -> Exception:
    """grpc.aio's read answers EOF for an ended stream: the error is in its final status."""
    return grpc.aio.AioRpcError(
        await stream.code(), await stream.initial_metadata(), await stream.trailing_metadata(), await stream.details()
    )


def test_errors_keep_code_message_and_hint_within_bounds_and_hide_internals(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(running: Coordinator) -> None:
        submitter = await joined(running, Role.SUBMITTER)
        with pytest.raises(HiveError, match=r"^naïve job xxx") as missing:
            await call(submitter, "Jobs/Show", jobs_pb2.JobRequest())
        assert missing.value.code is ErrorCode.NOT_FOUND and missing.value.exit_code == 4
        assert len(missing.value.message) == 4000 and len(missing.value.hint) == 1000
        with pytest.raises(HiveError, match="failed while answering Doctor") as unexpected:
            await call(submitter, "Jobs/Doctor", jobs_pb2.ListRequest())
        assert unexpected.value.code is ErrorCode.UNEXPECTED
        assert "internals" not in unexpected.value.message + unexpected.value.hint
        incident = unexpected.value.message.rpartition(" ")[2].rstrip(")")
        assert incident in caplog.text and "the secret internals" in caplog.text

    run(tmp_path, body)


def test_what_lies_between_is_named(tmp_path: Path) -> None:
    async def body(running: Coordinator) -> None:
        submitter = await joined(running, Role.SUBMITTER)
        async with dial.channel(running.session, submitter) as line:
            with pytest.raises(DeadlineExceeded, match="did not answer"), dial.errors_of(running.session):
                await jobs_pb2_grpc.JobsStub(line).Explain(jobs_pb2.JobRequest(), timeout=0.2)
            with pytest.raises(Unreachable, match="older version") as old, dial.errors_of(running.session):
                await line.unary_unary("/hive.v1.Jobs/NotThereYet")(b"", timeout=10)
            assert old.value.code is ErrorCode.VERSION_MISMATCH
        with socket.socket() as held:  # bound, not listening: the connection is refused
            held.bind(("127.0.0.1", 0))
            nowhere = f"127.0.0.1:{held.getsockname()[1]}"
            async with dial.channel(nowhere, submitter) as line:
                with pytest.raises(Unreachable, match="cannot be reached") as gone, dial.errors_of(nowhere):
                    await jobs_pb2_grpc.JobsStub(line).Submit(jobs_pb2.SubmitRequest(), timeout=10)
            assert gone.value.exit_code == 6
            with pytest.raises(Unreachable, match="cannot be reached"):
                await enrol.enrol(nowhere, new_token(running.authority.fingerprint), "lab-3")

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("details", "kind"),
    [
        ("Tls handshake failed: OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: self signed certificate", AccessError),
        ("Tls handshake failed: WRONG_VERSION_NUMBER: Invalid certificate verification context", Unreachable),
        ("failed to connect to all addresses; last error: Handshake read failed (Endpoint closing)", Unreachable),
        ("failed to connect to all addresses; last error: Socket closed", Unreachable),
        ("Stream removed (ping timeout)", Unreachable),
    ],
)
def test_only_a_false_certificate_is_an_access_error_a_frozen_coordinator_is_not(details: str, kind: type) -> None:
    """A node gives up on an AccessError and goes on trying otherwise."""
    nothing = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing, details)
    assert type(dial.error_from(error, "lab:7701")) is kind


def test_a_port_that_does_not_speak_tls_is_not_a_coordinator(tmp_path: Path) -> None:
    async def main() -> None:
        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            with pytest.raises(Unreachable, match="not a coordinator"):
                await enrol.fetch_ca(address, "0" * 64)

    asyncio.run(main())


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    async def body(running: Coordinator) -> None:
        port = int(running.front.rpartition(":")[2])
        with pytest.raises(HiveError, match=f"port {port} on 127.0.0.1 is taken") as taken:
            listeners.bind_front(listeners.front_server(), running.authority, "127.0.0.1", port)
        assert taken.value.code is ErrorCode.PORT_TAKEN

    run(tmp_path, body)


def test_many_wrong_tokens_from_one_address_must_wait(tmp_path: Path) -> None:
    async def body(running: Coordinator) -> None:
        for _ in range(2):
            with pytest.raises(AccessError, match="not known"):
                await enrol.enrol(running.front, new_token(running.authority.fingerprint), "lab-3")
        good = await running.book.add(running.authority, Grant(Role.NODE))
        with pytest.raises(Exhausted, match="too many wrong tokens"):
            await enrol.enrol(running.front, good, "lab-3")

    run(tmp_path, body, FailureLimiter(burst=2, refill_s=1000))


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 20), st.booleans()), max_size=80))
def test_the_limiter_forgives_in_time_and_stays_bounded(steps: list[tuple[str, float, bool]]) -> None:
    limiter, now = FailureLimiter(burst=3, refill_s=6.0, capacity=4), 0.0
    for address, passed, fails in steps:
        now += passed
        wait_s = limiter.wait_s(address, now)
        assert limiter.wait_s(address, now + wait_s + 1e-6) == 0
        if fails and wait_s == 0:
            limiter.failed(address, now)
        assert limiter.wait_s(address, now) <= 6.0 + 1e-6
        assert len(limiter) <= 4


def test_failures_count_per_host_not_per_port() -> None:
    assert peer_address("ipv4:10.0.0.1:5000") == peer_address("ipv4:10.0.0.1:6000") == "10.0.0.1"
    assert peer_address("ipv6:%5Bfd00::1%5D:1") == peer_address("ipv6:[fd00::2]:2") == "fd00::/64"
    assert peer_address("unix:/run/x")


def test_a_name_that_would_garble_a_terminal_is_refused(tmp_path: Path) -> None:
    async def body(running: Coordinator) -> None:
        with pytest.raises(AccessError, match="printable"):
            await joined(running, Role.NODE, "a\x1b[31m")

    run(tmp_path, body)


def test_a_request_is_believed_only_when_signed_by_its_own_strong_key() -> None:
    assert len(check_request(enrol.request_for(enrol.new_key_pem())).key_id) == 16
    good = enrol.request_for(enrol.new_key_pem())
    for bad in (b"", b"junk", good[:-4] + bytes(4), good[: len(good) // 2], b"x" * 100_000):
        with pytest.raises(AccessError, match="certificate request"):
            check_request(bad)

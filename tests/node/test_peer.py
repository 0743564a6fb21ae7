"""Node to node over real mutual TLS on loopback: what a roster lets through, and the code of every refusal."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import listeners
from coordinator.artifacts import ArtifactsService
from coordinator.authority import Authority, open_authority
from coordinator.blobs import BlobStore
from node.cache import BlobCache
from node.peer import MAX_ECHO_BYTES, MAX_PROBE_BYTES, MAX_STREAMS, PeerListeners, PeerService
from node.peer_client import PeerClient, PeerSource, channel, connected, metadata, reachable
from node.peer_files import PeerFiles
from node.peering import Peering
from node.probe_peers import ECHOES, FIRST_BYTES, measure, next_size
from node.roster_book import RosterBook
from node.transfers import Transfers, UploadLimit
from node.workspace import Workspaces
from protos import dial, limits, transfer
from protos import roster as rosters
from protos.artifact import digest_bytes
from protos.capacity import Capacity, TrustedNetwork
from protos.credentials import Credential
from protos.errors import ErrorCode, HiveError
from protos.gen import artifacts_pb2, artifacts_pb2_grpc, membership_pb2, peer_pb2_grpc
from protos.gen import peer_pb2 as pb
from protos.ids import Digest, Fence, NodeId
from protos.roster import Action, Member, PeerAddress, Reference, Roster
from protos.token import Role

JOB = "j-peers"
LOOPBACK = TrustedNetwork("loopback", "lo", "127.0.0.1")
CAPACITY = Capacity("host", "machine", "linux", "3.11", 1.0, 1, 1, 1, 1, networks=(LOOPBACK,))
CONTENT = os.urandom(5 * limits.CHUNK_BYTES // 2)
DIGEST = digest_bytes(CONTENT)
BOTH = (Action.PROBE, Action.FETCH)


@dataclass
class Node:
    """A member that serves: its credential, its files, what it holds."""

    credential: Credential = field(repr=False)
    folder: Path
    cache: BlobCache
    service: PeerService
    listeners: PeerListeners
    client: PeerClient
    working: bool = False

    @property
    def id(self) -> NodeId:
        return NodeId(self.credential.id)

    @property
    def addresses(self) -> tuple[PeerAddress, ...]:
        port = self.listeners.port
        return (PeerAddress("loopback", f"127.0.0.1:{port}"),) if port else ()

    def member(self, *may: Action) -> Member:
        key = rosters.key_sha256(self.credential.certificate_pem.encode())
        return Member(self.id, "machine", key, self.addresses, may)

    def keep(self, content: bytes) -> Digest:
        digest = digest_bytes(content)
        path = self.cache.path(digest)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return digest

    async def listen(self) -> None:
        await self.listeners.follow(self.credential, ["127.0.0.1"])
        assert self.listeners.port, self.listeners.problem


@dataclass
class House:
    authority: Authority
    folder: Path
    nodes: list[Node] = field(default_factory=list)

    def credential(self, name: str, role: Role = Role.NODE) -> Credential:
        return self.authority.credential(role, name, "127.0.0.1:1", "127.0.0.1:1", time.time())

    async def node(self, name: str, limit: UploadLimit | None = None) -> Node:
        folder = self.folder / name
        cache = BlobCache(folder / "cache")

        async def never(digest: Digest, path: Path, n_bytes: int) -> None:
            raise AssertionError("nothing is laid out here")

        credential = self.credential(name)
        book = RosterBook(credential.id, credential.ca_pem.encode())
        files = PeerFiles(cache, Workspaces(folder / "jobs", cache, never))
        service = PeerService(book, files, limit, lambda: made.working)

        async def held() -> Credential:
            return credential

        client = PeerClient(held, lambda: CAPACITY)
        client.book = book
        made = Node(credential, folder, cache, service, PeerListeners(service), client)
        await made.listen()
        self.nodes.append(made)
        return made

    def roster(self, members: Sequence[Member], digests: Sequence[Digest] = (DIGEST,), fence: int = 3) -> Roster:
        now = time.time()
        return Roster(JOB, Fence(fence), tuple(members), tuple(digests), now, now + 600)

    def give(self, roster: Roster, *nodes: Node) -> Reference:
        document = rosters.encode(roster)
        for node in nodes:
            assert node.service.book is not None
            node.service.book.take(document, self.authority.sign_roster(document), time.time())
        return roster.reference

    async def pair(self) -> tuple[Node, Node, Reference]:
        """A serves B, which may probe and fetch; A has the content."""
        a, b = await self.node("a"), await self.node("b")
        a.keep(CONTENT)
        return a, b, self.give(self.roster([a.member(), b.member(*BOTH)]), a, b)


@asynccontextmanager
async def house(folder: Path) -> AsyncIterator[House]:
    made = House(open_authority(folder / "authority"), folder)
    try:
        yield made
    finally:
        for node in made.nodes:
            await node.listeners.close()


def run(folder: Path, body: Callable[[House], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), house(folder) as made:
            await body(made)

    asyncio.run(main())


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, HiveError]:
    """How a call was refused: its status, and what it meant."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value.code(), dial.error_from(refused.value, "peer")


async def fetched(stub: Any, reference: Reference, **request: Any) -> bytes:
    call = stub.Fetch(artifacts_pb2.GetRequest(**request), metadata=metadata(reference), timeout=20)
    return b"".join([chunk.content async for chunk in call])


async def echo(stub: Any, reference: Reference, content: bytes = b"x") -> Any:
    return await stub.Echo(pb.PeerEcho(content=content), metadata=metadata(reference), timeout=20)


async def code_as(made: House, caller: Credential, server: Node, reference: Reference) -> tuple[str, str]:
    """What an echo and a fetch of the content end with, as this caller."""
    async with channel(server.addresses[0].address, caller, server.id) as line:
        stub: Any = peer_pb2_grpc.PeerStub(line)  # type: ignore[no-untyped-call]
        first, _ = await refusal(echo(stub, reference))
        second, _ = await refusal(fetched(stub, reference, digest=DIGEST))
        return first.name, second.name


def test_a_member_probes_and_fetches(tmp_path: Path) -> None:
    async def body(made: House) -> None:
        a, b, reference = await made.pair()
        found = await measure(b.credential, a.member(), a.addresses, reference, None)
        assert 0 < found.rtt_minimum_s <= found.rtt_median_s < 1 and ECHOES >= 10
        assert min(found.upload_bytes_per_s, found.download_bytes_per_s) > 1e6 and found.network == "loopback"
        assert await b.client.fetch(DIGEST, tmp_path / "got", len(CONTENT))
        assert (tmp_path / "got").read_bytes() == CONTENT

    run(tmp_path, body)


def test_a_certificate_of_another_authority_does_not_get_through_the_handshake(tmp_path: Path) -> None:
    async def body(made: House) -> None:
        a, _, reference = await made.pair()
        theirs = open_authority(tmp_path / "theirs").credential(Role.NODE, "b", "x:1", "x:1", time.time())
        stranger = replace(theirs, ca_pem=a.credential.ca_pem)  # it believes us, we do not believe it
        assert set(await code_as(made, stranger, a, reference)) == {"UNAVAILABLE"}
        assert set(await code_as(made, theirs, a, reference)) == {"UNAVAILABLE"}

    run(tmp_path, body)


def test_who_answers_is_known_by_its_node_id_not_by_its_address(tmp_path: Path) -> None:
    async def body(made: House) -> None:
        a, b, _ = await made.pair()
        with pytest.raises(HiveError, match="does not answer") as wrong:
            async with connected(b.credential, made.credential("c").id, a.addresses):
                pass
        assert wrong.value.code is ErrorCode.UNREACHABLE

    run(tmp_path, body)


def test_a_probe_says_apart_that_nobody_answered_from_that_it_was_refused(tmp_path: Path) -> None:
    async def body(made: House) -> None:
        a, b, _ = await made.pair()

        async def held() -> Credential:
            return b.credential

        peering = Peering(True, b.listeners, b.service, b.client, held, lambda: CAPACITY, lambda port: None, None)
        made.give(made.roster([a.member(), b.member(Action.FETCH)], fence=4), a, b)
        order = membership_pb2.ProbeOrder(call_id=1, subject=JOB, peer_id=a.id)
        refused = await peering.answer(order)
        assert refused.problem and not refused.unanswered
        await a.listeners.close()
        silent = await peering.answer(order)
        assert silent.unanswered and "does not answer" in silent.problem

    run(tmp_path, body)


def test_members_of_the_cluster_that_are_not_on_the_roster_are_refused(tmp_path: Path) -> None:
    async def body(made: House) -> None:
        a, _, reference = await made.pair()
        for role in (Role.NODE, Role.ADMIN, Role.SUBMITTER):
            other = made.credential("other", role)
            assert set(await code_as(made, other, a, reference)) == {"PERMISSION_DENIED"}

    run(tmp_path, body)


def test_another_key_under_the_id_of_a_member_is_refused(tmp_path: Path) -> None:
    async def body(made: House) -> None:
        a, b = await made.node("a"), await made.node("b")
        reference = made.give(made.roster([a.member(), replace(b.member(*BOTH), key_sha256="0" * 64)]), a)
        assert set(await code_as(made, b.credential, a, reference)) == {"PERMISSION_DENIED"}

    run(tmp_path, body)


def test_nothing_is_served_without_a_roster_or_after_it_has_expired(tmp_path: Path) -> None:
    async def body(made: House) -> None:
        a, b = await made.node("a"), await made.node("b")
        a.keep(CONTENT)
        roster = made.roster([a.member(), b.member(*BOTH)])
        assert set(await code_as(made, b.credential, a, roster.reference)) == {"PERMISSION_DENIED"}
        made.give(roster, a)
        a.service.clock = lambda: roster.expires_unix_s
        assert set(await code_as(made, b.credential, a, roster.reference)) == {"PERMISSION_DENIED"}
        a.service.book = None
        assert set(await code_as(made, b.credential, a, roster.reference)) == {"PERMISSION_DENIED"}

    run(tmp_path, body)


def test_a_stale_fence_is_told_so_and_a_future_one_is_unknown(tmp_path: Path) -> None:
    async def body(made: House) -> None:
        a, b, old = await made.pair()
        made.give(made.roster([a.member(), b.member(*BOTH)], fence=4), a)
        assert set(await code_as(made, b.credential, a, old)) == {"ABORTED"}
        assert set(await code_as(made, b.credential, a, Reference(JOB, Fence(5)))) == {"PERMISSION_DENIED"}

    run(tmp_path, body)


def test_what_a_member_may_is_what_its_roster_says(tmp_path: Path) -> None:
    async def body(made: House) -> None:
        a, b = await made.node("a"), await made.node("b")
        a.keep(CONTENT)
        other = a.keep(b"not for you")
        reference = made.give(made.roster([a.member(), b.member(Action.FETCH)]), a, b)
        async with connected(b.credential, a.id, a.addresses) as (stub, _):
            assert (await refusal(echo(stub, reference)))[0] is grpc.StatusCode.PERMISSION_DENIED
            call = stub.Download(pb.PeerWanted(bytes=1), metadata=metadata(reference))
            assert await call.code() is grpc.StatusCode.PERMISSION_DENIED
            code, meant = await refusal(fetched(stub, reference, digest=other))
            assert code is grpc.StatusCode.PERMISSION_DENIED and meant.code is ErrorCode.FORBIDDEN
            assert (await refusal(fetched(stub, reference, digest="../x")))[0] is grpc.StatusCode.PERMISSION_DENIED
            assert await fetched(stub, reference, digest=DIGEST, offset=1) == CONTENT[1:]
        reference = made.give(made.roster([a.member(), b.member(Action.PROBE)]), a, b)
        async with connected(b.credential, a.id, a.addresses) as (stub, _):
            assert (await echo(stub, reference)).content == b"x"
            assert (await refusal(fetched(stub, reference, digest=DIGEST)))[0] is grpc.StatusCode.PERMISSION_DENIED

    run(tmp_path, body)


@pytest.mark.parametrize("named", [(), (("hive-roster", "nonsense"),), (("hive-roster", "j-peers/x"),)])
def test_a_call_that_names_no_roster_is_refused(tmp_path: Path, named: Any) -> None:
    async def body(made: House) -> None:
        a, b, _ = await made.pair()
        async with connected(b.credential, a.id, a.addresses) as (stub, _):
            code, _ = await refusal(stub.Echo(pb.PeerEcho(), metadata=named))
            assert code.name in ("PERMISSION_DENIED", "INVALID_ARGUMENT")

    run(tmp_path, body)


def test_more_than_the_bounds_is_refused(tmp_path: Path) -> None:
    async def body(made: House) -> None:
        a, b, reference = await made.pair()
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        async with connected(b.credential, a.id, a.addresses) as (stub, _):
            assert (await refusal(echo(stub, reference, bytes(MAX_ECHO_BYTES + 1))))[0] is invalid
            call = stub.Download(pb.PeerWanted(bytes=MAX_PROBE_BYTES + 1), metadata=metadata(reference))
            assert await call.code() is invalid
            much = [pb.PeerBytes(content=bytes(2 * limits.CHUNK_BYTES))] * (MAX_PROBE_BYTES // limits.CHUNK_BYTES)
            upload = stub.Upload(iter(much), metadata=metadata(reference))
            assert await upload.code() in (invalid, grpc.StatusCode.INTERNAL)  # refused while it was still writing
            size = len(CONTENT)
            assert (await refusal(fetched(stub, reference, digest=DIGEST, offset=size + 1)))[0] is invalid
            assert (await refusal(fetched(stub, reference, digest=DIGEST, limit_bytes=size + 1)))[0] is invalid
            call = stub.Fetch(artifacts_pb2.GetRequest(digest=DIGEST), metadata=metadata(reference))
            assert max([len(chunk.content) async for chunk in call]) == limits.CHUNK_BYTES

    run(tmp_path, body)


def test_only_so_many_files_go_out_at_once(tmp_path: Path) -> None:
    async def body(made: House) -> None:
        a, b = await made.node("a", UploadLimit(1.0)), await made.node("b")  # a transfer that never gets anywhere
        a.keep(CONTENT)
        reference = made.give(made.roster([a.member(), b.member(*BOTH)]), a, b)
        async with connected(b.credential, a.id, a.addresses) as (stub, _):
            request = artifacts_pb2.GetRequest(digest=DIGEST)
            calls = [stub.Fetch(request, metadata=metadata(reference)) for _ in range(MAX_STREAMS + 1)]
            reading = [asyncio.ensure_future(call.code()) for call in calls]
            done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            assert [task.result() for task in done] == [grpc.StatusCode.RESOURCE_EXHAUSTED]
            for call in calls:
                call.cancel()
            await asyncio.wait(reading)

    run(tmp_path, body)


def test_a_node_at_work_is_not_probed_but_gives_its_files(tmp_path: Path) -> None:
    async def body(made: House) -> None:
        a, b, reference = await made.pair()
        a.working = True
        with pytest.raises(HiveError, match="works on a job"):
            await measure(b.credential, a.member(), a.addresses, reference, None)
        assert await b.client.fetch(DIGEST, tmp_path / "got", len(CONTENT))

    run(tmp_path, body)


def test_a_fetch_goes_on_where_the_server_died(tmp_path: Path) -> None:
    """1 the server stops after part of the file 2 the client keeps what it has and tries again 3 the server is back on
    its port and sends the rest alone."""

    async def body(made: House) -> None:
        a, b, reference = await made.pair()
        port = a.listeners.port
        offsets: list[int] = []

        class Cut:
            """The peer, whose listeners are closed after the first chunk of the first call."""

            def __init__(self, stub: Any) -> None:
                self._source = PeerSource(stub, reference)

            def Get(self, request: artifacts_pb2.GetRequest) -> Any:
                offsets.append(request.offset)
                call = self._source.Get(request)
                return call if len(offsets) > 1 else Broken(call)

        class Broken:
            def __init__(self, call: Any) -> None:
                self._call, self._read = call, 0

            async def read(self) -> Any:
                if self._read == 1:
                    await a.listeners.close()
                    self._call.cancel()  # what is still in a buffer went down with it
                    a.listeners = PeerListeners(a.service, port or 0)
                    await a.listen()
                    assert a.listeners.port == port
                    return grpc.aio.EOF  # type: ignore[attr-defined]
                self._read += 1
                return await self._call.read()

            def cancel(self) -> None:
                self._call.cancel()

        async with connected(b.credential, a.id, a.addresses) as (stub, _):
            await transfer.get_file(Cut(stub), DIGEST, tmp_path / "got", len(CONTENT))
        assert (tmp_path / "got").read_bytes() == CONTENT
        assert offsets[0] == 0 and offsets[-1] == limits.CHUNK_BYTES

    run(tmp_path, body)


def test_what_a_peer_gave_in_part_is_not_fetched_again_from_the_next_source(tmp_path: Path) -> None:
    async def body(made: House) -> None:
        _, b, _ = await made.pair()
        (tmp_path / "got.partial").write_bytes(CONTENT[: limits.CHUNK_BYTES])
        assert await b.client.fetch(DIGEST, tmp_path / "got", len(CONTENT))
        assert (tmp_path / "got").read_bytes() == CONTENT

    run(tmp_path, body)


class BreaksOff:
    """Files whose reading fails after the first chunk, as on a disk that dies."""

    def open(self, digest: str, subject: str) -> Any:
        return self, len(CONTENT)

    def __init__(self) -> None:
        self._read = 0

    def __enter__(self) -> BreaksOff:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def seek(self, offset: int) -> int:
        return offset

    def read(self, n_bytes: int) -> bytes:
        self._read += 1
        if self._read > 1:
            raise OSError("the disk died")
        return CONTENT[:n_bytes]


def test_the_coordinator_gives_what_a_broken_peer_did_not(tmp_path: Path) -> None:
    """1 a peer sends the first chunk and fails 2 the coordinator is asked from that byte on 3 a small file, or one that
    is on no roster, comes from the coordinator at once."""

    class Artifacts(ArtifactsService):
        asked: ClassVar[list[tuple[str, int]]] = []

        def Get(self, request: artifacts_pb2.GetRequest, context: Any) -> Any:
            self.asked.append((request.digest, request.offset))
            return super().Get(request, context)

    async def anyone(member_id: str) -> bool:
        return True

    async def body(made: House) -> None:
        a, b, _ = await made.pair()
        a.service.files = BreaksOff()  # type: ignore[assignment]
        blobs = BlobStore(tmp_path / "blobs")
        small = await blobs.put_bytes(b"small")
        path = blobs.path(DIGEST)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT)
        server = listeners.session_server(anyone)
        artifacts_pb2_grpc.add_ArtifactsServicer_to_server(Artifacts(blobs), server)  # type: ignore[no-untyped-call]
        port = listeners.bind_session(server, made.authority, "127.0.0.1", 0)
        await server.start()

        async def held() -> Credential:
            return b.credential.at("127.0.0.1:1", f"127.0.0.1:{port}")

        transfers = Transfers(held, None, b.client.fetch)
        try:
            await transfers.fetch(DIGEST, tmp_path / "got", len(CONTENT))
            await transfers.fetch(small, tmp_path / "small", 5)
        finally:
            await transfers.close()
            await server.stop(0)
        assert (tmp_path / "got").read_bytes() == CONTENT and (tmp_path / "small").read_bytes() == b"small"
        assert Artifacts.asked == [(DIGEST, limits.CHUNK_BYTES), (small, 0)]

    run(tmp_path, body)


def test_a_peer_that_gives_something_else_is_found_out_by_the_hash_and_left_alone(tmp_path: Path) -> None:
    async def body(made: House) -> None:
        a, b, c = await made.node("a"), await made.node("b"), await made.node("c")
        a.keep(CONTENT)
        c.keep(CONTENT)
        lies = tmp_path / "lies"
        lies.write_bytes(bytes(len(CONTENT)))
        a.service.files = Lies(lies)  # type: ignore[assignment]
        made.give(made.roster([a.member(), c.member(), b.member(*BOTH)]), a, b, c)
        assert await b.client.fetch(DIGEST, tmp_path / "got", len(CONTENT)), "the honest one gives it"
        assert (tmp_path / "got").read_bytes() == CONTENT and not (tmp_path / "got.partial").exists()
        await c.listeners.close()
        assert not await b.client.fetch(DIGEST, tmp_path / "again", len(CONTENT)), "the liar is not asked again"
        assert not (tmp_path / "again").exists()

    run(tmp_path, body)


class Lies:
    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, digest: str, subject: str) -> Any:
        return self._path.open("rb", buffering=0), self._path.stat().st_size


def test_a_node_gives_the_checkpoints_it_wrote_but_never_through_a_link(tmp_path: Path) -> None:
    async def body(made: House) -> None:
        a, b = await made.node("a"), await made.node("b")
        written, part, secret = b"w" * 2_000_000, b"p" * 2_000_000, b"s" * 2_000_000
        folder = a.folder / "jobs" / JOB / "checkpoints" / "step-00000007"
        (folder / "1-of-2").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(written)
        (folder / "1-of-2" / "model.safetensors").write_bytes(part)
        (tmp_path / "owner").mkdir()
        (tmp_path / "owner" / "secret").write_bytes(secret)
        (folder / "stolen").symlink_to(tmp_path / "owner" / "secret")
        (folder / "folder").symlink_to(tmp_path / "owner")
        digests = [digest_bytes(content) for content in (written, part, secret)]
        made.give(made.roster([a.member(), b.member(*BOTH)], digests), a, b)
        assert [await b.client.fetch(digest, tmp_path / digest, 2_000_000) for digest in digests] == [True, True, False]

    run(tmp_path, body)


def test_a_renewed_certificate_is_taken_up_under_the_open_listener(tmp_path: Path) -> None:
    async def body(made: House) -> None:
        a, b, reference = await made.pair()
        port = a.listeners.port
        renewed = replace(made.credential("a again"), id=a.credential.id)
        await a.listeners.follow(renewed, ["127.0.0.1"])
        assert a.listeners.port is None and "certificate" in a.listeners.problem, "it proves another id"
        await a.listeners.follow(a.credential, ["127.0.0.1"])
        await a.listeners.follow(a.credential, [])
        assert a.listeners.port is None and port is not None
        await a.listen()
        async with connected(b.credential, a.id, a.addresses) as (stub, _):
            assert (await echo(stub, reference)).content == b"x"

    run(tmp_path, body)


def test_only_addresses_on_a_network_that_both_have_are_dialled() -> None:
    mine = replace(CAPACITY, networks=(LOOPBACK, TrustedNetwork("10.0.0.0/24", "e0", "10.0.0.1")))
    claimed = (
        PeerAddress("loopback", "127.0.0.1:1"),
        PeerAddress("loopback", "10.0.0.9:1"),  # not loopback
        PeerAddress("10.0.0.0/24", "10.0.0.2:1"),
        PeerAddress("10.0.0.0/24", "192.0.2.1:25"),  # not in that network
        PeerAddress("10.0.0.0/24", "intranet:80"),
        PeerAddress("10.0.0.0/24", "10.0.0.2"),
        PeerAddress("10.1.0.0/24", "10.1.0.2:1"),  # not mine
    )
    found = [
        [each.address for each in reachable(Member(NodeId("n-x"), machine, "k", claimed, ()), mine)]
        for machine in ("machine", "another", "")
    ]
    assert found == [["127.0.0.1:1", "10.0.0.2:1"], ["10.0.0.2:1"], ["10.0.0.2:1"]]


@given(st.integers(0, MAX_PROBE_BYTES), st.floats(1.0, 1e12), st.integers(FIRST_BYTES, MAX_PROBE_BYTES))
def test_a_probe_grows_in_steps_and_stays_bounded(left: int, found: float, size: int) -> None:
    chosen = next_size(size, found, left)
    assert chosen <= left and chosen <= 8 * size
    assert chosen >= min(left, 2 * size)


def test_a_taken_port_is_said_and_tried_again(tmp_path: Path) -> None:
    async def body(made: House) -> None:
        a, b = await made.node("a"), await made.node("b")
        port = a.listeners.port or 0
        later = PeerListeners(b.service, port)
        await later.follow(b.credential, ["127.0.0.1"])
        assert later.port is None and str(port) in later.problem
        await a.listeners.close()
        await later.follow(b.credential, ["127.0.0.1"])
        assert (later.port, later.problem) == (port, "")
        await later.close()

    run(tmp_path, body)

"""A node's identity over its whole life, against a real front door on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from coordinator import listeners
from coordinator.authority import Authority, open_authority
from coordinator.enrolment import EnrolmentService
from coordinator.store.memory import MemoryStore
from coordinator.store.protocol import PutMember
from coordinator.token_book import TokenBook
from node.enrolment import LOST_S, Identity, Wanted
from protos import credentials
from protos.credentials import Credential
from protos.errors import AccessError, Unreachable
from protos.gen import membership_pb2_grpc
from protos.ids import NodeId
from protos.token import Role, Token


@dataclass
class FrontDoor:
    authority: Authority
    store: MemoryStore
    book: TokenBook
    address: str
    session_port: int = 7701

    async def token(self, role: Role = Role.NODE, uses: int = 1) -> Token:
        return Token(self.authority.fingerprint, (await self.book.create(role, uses, 3600.0))[1])

    async def remove(self, node: Credential) -> None:
        member = await self.store.member(NodeId(node.id))
        assert member is not None
        await self.store.commit(PutMember(replace(member, left=True), member.version))


@asynccontextmanager
async def front_door(folder: Path) -> AsyncIterator[FrontDoor]:
    authority, store = open_authority(folder), MemoryStore()
    server = listeners.front_server()
    door = FrontDoor(authority, store, TokenBook(store), "")
    service = EnrolmentService(authority, door.book, lambda: door.session_port)
    membership_pb2_grpc.add_EnrolmentServicer_to_server(service, server)
    door.address = f"127.0.0.1:{listeners.bind_front(server, authority, '127.0.0.1', 0)}"
    await server.start()
    try:
        yield door
    finally:
        await server.stop(0)


@dataclass
class Machine:
    """One machine's folder, clock and LAN."""

    folder: Path
    now: float = 0.0
    announced: str = ""
    searched: list[str] = field(default_factory=list)

    def start(self, token: Token | None = None, coordinator: str | None = None, name: str = "box") -> Identity:
        wanted = Wanted(self.folder / "node" / "credential.json", name, token, coordinator)
        return Identity(wanted, self.find, lambda: self.now)

    async def find(self, fingerprint: str) -> str:
        self.searched.append(fingerprint)
        if not self.announced:
            raise Unreachable("no coordinator announced itself")
        return self.announced

    def files(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "node").iterdir())


def run(tmp_path: Path, body: Callable[[FrontDoor, Machine], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), front_door(tmp_path / "coordinator") as door:
            await body(door, Machine(tmp_path / "machine"))

    asyncio.run(main())


def test_a_machine_joins_once_and_needs_no_token_after(tmp_path: Path) -> None:
    async def body(door: FrontDoor, machine: Machine) -> None:
        machine.announced = door.address
        token = await door.token()
        joined = await machine.start(token).current()
        assert joined.role is Role.NODE and machine.searched == [door.authority.fingerprint]
        assert machine.files() == ["credential.json"]
        assert await machine.start().current() == joined
        again = await machine.start(token).current()  # the same command after a reboot, with a spent token
        assert again.id == joined.id

    run(tmp_path, body)


def test_without_token_and_credential_the_owner_is_told_what_to_type(tmp_path: Path) -> None:
    async def body(door: FrontDoor, machine: Machine) -> None:
        with pytest.raises(AccessError, match="not joined") as refused:
            await machine.start().current()
        assert "hive-node start --token" in refused.value.hint

    run(tmp_path, body)


def test_a_join_that_was_cut_off_uses_the_token_once(tmp_path: Path) -> None:
    async def body(door: FrontDoor, machine: Machine) -> None:
        token = await door.token(uses=1)
        with pytest.raises(Unreachable):
            await machine.start(token).current()  # nobody announced
        joined = await machine.start(token, door.address).current()
        credentials.save(joined, machine.folder / "aside.json")
        (machine.folder / "node" / "credential.json").rename(machine.folder / "node" / "credential.joining.pem")
        (machine.folder / "node" / "credential.joining.pem").write_text(joined.key_pem)  # killed before it was saved
        assert (await machine.start(token, door.address).current()).id == joined.id
        assert machine.files() == ["credential.json"]

    run(tmp_path, body)


def test_a_certificate_that_ended_while_the_machine_slept_is_replaced(tmp_path: Path) -> None:
    async def body(door: FrontDoor, machine: Machine) -> None:
        joined = await machine.start(await door.token(), door.address).current()
        machine.now = joined.expires_unix_s + 3 * 24 * 3600
        again = await machine.start().current()
        assert again.id == joined.id and again.certificate_pem != joined.certificate_pem
        assert credentials.load(machine.folder / "node" / "credential.json") == again

    run(tmp_path, body)


def test_a_coordinator_that_moved_is_found_again_by_its_announcement(tmp_path: Path) -> None:
    async def body(door: FrontDoor, machine: Machine) -> None:
        machine.announced = door.address
        file = machine.folder / "node" / "credential.json"
        joined = await machine.start(await door.token()).current()
        credentials.save(joined.at("127.0.0.1:1", "127.0.0.1:2"), file)
        identity = machine.start()
        assert (await identity.current()).session_address == "127.0.0.1:2"  # it may only be away
        machine.now += LOST_S
        door.session_port = 7777
        assert (await identity.current()).session_address == "127.0.0.1:7777"
        identity.connected()
        machine.now += LOST_S
        searched = len(machine.searched)
        await identity.held()
        machine.now += LOST_S
        await identity.held()
        assert (await identity.current()) == (await identity.held())
        assert len(machine.searched) == searched

    run(tmp_path, body)


def test_a_coordinator_that_is_away_is_waited_for_while_the_certificate_holds(tmp_path: Path) -> None:
    async def body(door: FrontDoor, machine: Machine) -> None:
        file = machine.folder / "node" / "credential.json"
        joined = await machine.start(await door.token(), door.address).current()
        away = joined.at("127.0.0.1:1", "127.0.0.1:2")
        credentials.save(away, file)
        identity = machine.start()
        machine.now = joined.issued_unix_s
        assert await identity.current() == away
        machine.now += LOST_S
        assert await identity.current() == away
        machine.now = joined.expires_unix_s
        with pytest.raises(Unreachable):
            await identity.current()

    run(tmp_path, body)


def test_a_removed_machine_says_so_and_comes_back_with_a_new_token(tmp_path: Path) -> None:
    async def body(door: FrontDoor, machine: Machine) -> None:
        joined = await machine.start(await door.token(), door.address).current()
        await door.remove(joined)
        machine.now = joined.expires_unix_s
        with pytest.raises(AccessError, match="not a member"):
            await machine.start(coordinator=door.address).current()
        back = await machine.start(await door.token(), door.address).current()
        assert back.id == joined.id

    run(tmp_path, body)


def test_a_token_of_another_coordinator_joins_that_one_with_a_new_key(tmp_path: Path) -> None:
    async def body(door: FrontDoor, machine: Machine) -> None:
        joined = await machine.start(await door.token(), door.address).current()
        async with front_door(tmp_path / "second") as second:
            moved = await machine.start(await second.token(), second.address).current()
        assert moved.id != joined.id and moved.ca_pem != joined.ca_pem

    run(tmp_path, body)


def test_a_submitters_token_does_not_make_a_node(tmp_path: Path) -> None:
    async def body(door: FrontDoor, machine: Machine) -> None:
        with pytest.raises(AccessError, match="role submitter") as refused:
            await machine.start(await door.token(Role.SUBMITTER), door.address).current()
        assert "--role node" in refused.value.hint

    run(tmp_path, body)


def test_a_damaged_credential_is_not_silently_replaced(tmp_path: Path) -> None:
    async def body(door: FrontDoor, machine: Machine) -> None:
        token = await door.token()
        await machine.start(token, door.address).current()
        (machine.folder / "node" / "credential.json").write_text("{}")
        with pytest.raises(AccessError, match="damaged"):
            await machine.start(token, door.address).current()

    run(tmp_path, body)

"""Who this node is to its coordinator: joins once, keeps the certificate fresh, finds the coordinator when it moved.

Owns the node's credential file and the key of a join that is not finished yet (kept, so that a crash or a lost reply
costs no second use of the token). Refuses a token of another role. Invariants: what is on disk is what `current` last
returned; a machine that is still a member never needs a token again, however long it was away.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from protos import credentials, enrol
from protos.credentials import Credential
from protos.errors import AccessError, DeadlineExceeded, NotFound, Unreachable
from protos.token import Role, Token

LOST_S = 15.0  # without a session for so long, ask the front door where the coordinator is now

Find = Callable[[str], Awaitable[str]]  # CA fingerprint -> front-door address (node.discovery.find_coordinator)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the owner asked for. `coordinator`: HOST:PORT of the front door, None to search the LAN."""

    file: Path
    name: str
    token: Token | None = None
    coordinator: str | None = None


class Identity:
    """The session asks `current` before every attempt and says `connected` after every welcome; others ask `held`."""

    def __init__(self, wanted: Wanted, find: Find, clock: Callable[[], float] = time.time) -> None:
        self._wanted = wanted
        self._find = find
        self._clock = clock
        self._credential: Credential | None = None
        self._without_session_since: float | None = None
        self._lock = asyncio.Lock()

    def connected(self) -> None:
        self._without_session_since = None

    async def current(self) -> Credential:
        """The credential to connect with now. Raises AccessError when only the owner can help, Unreachable to wait."""
        async with self._lock:
            now = self._clock()
            since = self._without_session_since
            if self._credential is not None and since is not None and now - since >= LOST_S:
                credential = self._keep(await self._located(self._credential, now))
            else:
                credential = await self._fresh(now)
            if self._without_session_since is None:
                self._without_session_since = now
            return credential

    async def held(self) -> Credential:
        """The same for calls beside the session (transfers): asking for it says nothing about the session."""
        async with self._lock:
            return await self._fresh(self._clock())

    async def invited(self, token: Token, coordinator: str | None) -> Credential:
        """Join with a token that came after the start. Raises what enrolment raises; then nothing has changed."""
        async with self._lock:
            before = self._wanted
            self._wanted = replace(before, token=token, coordinator=coordinator or before.coordinator)
            try:
                return self._keep(await self._first(self._clock()))
            except BaseException:
                self._wanted = before
                raise

    async def _fresh(self, now: float) -> Credential:
        if self._credential is None:
            return self._keep(await self._first(now))
        return self._keep(await enrol.refreshed(self._credential, now))

    async def _first(self, now: float) -> Credential:
        wanted = self._wanted
        stored = self._stored()
        if stored is None:
            return await self._joined()
        moved = wanted.coordinator is not None and wanted.coordinator != stored.front_address
        if wanted.token is None and not moved and now < stored.expires_unix_s:
            return await enrol.refreshed(stored, now)
        return await self._located(stored, now)

    def _stored(self) -> Credential | None:
        """The credential on disk, unless the owner gave a token of another coordinator."""
        try:
            stored = credentials.load(self._wanted.file)
        except NotFound:
            return None
        token = self._wanted.token
        return None if token is not None and token.ca_fingerprint != fingerprint_of(stored) else stored

    async def _joined(self) -> Credential:
        token = self._wanted.token
        if token is None:
            raise AccessError(
                "this machine has not joined a coordinator yet",
                "give the token that `hive coordinator start` printed: hive-node start --token hive1....",
            )
        address = self._wanted.coordinator or await self._find(token.ca_fingerprint)
        return await self._with_token(address, token, self._unfinished_key())

    async def _with_token(self, address: str, token: Token, key_pem: str) -> Credential:
        joined = await enrol.enrol(address, token, self._wanted.name, key_pem=key_pem)
        if joined.role is not Role.NODE:
            self._key_file.unlink(missing_ok=True)
            raise AccessError(
                f"this token is for role {joined.role}, a machine needs one for role node",
                "make one with: hive token create --role node",
            )
        return joined

    async def _located(self, credential: Credential, now: float) -> Credential:
        """The same member at the address its coordinator has now: as told, else where it was, else as announced."""

        async def announced() -> str:
            return await self._find(fingerprint_of(credential))

        async def known() -> str:
            return self._wanted.coordinator or credential.front_address

        problems: list[Unreachable | DeadlineExceeded | AccessError] = []
        for place in (known,) if self._wanted.coordinator else (known, announced):
            try:
                return await self._asked(await place(), credential)
            except (Unreachable, DeadlineExceeded, AccessError) as error:
                problems.append(error)
        refused = [error for error in problems if isinstance(error, AccessError)]
        if now < credential.expires_unix_s and not isinstance(problems[-1], AccessError):
            return credential  # it still holds, and the session goes on trying
        raise (refused or problems)[0]

    async def _asked(self, address: str, credential: Credential) -> Credential:
        try:
            return await enrol.rejoin(address, replace(credential, name=self._wanted.name))
        except AccessError:
            if self._wanted.token is None:
                raise
            return await self._with_token(address, self._wanted.token, credential.key_pem)

    def _keep(self, credential: Credential) -> Credential:
        if credential != self._credential:
            credentials.save(credential, self._wanted.file)
            self._key_file.unlink(missing_ok=True)
            self._credential = credential
        return credential

    @property
    def _key_file(self) -> Path:
        return self._wanted.file.with_suffix(".joining.pem")

    def _unfinished_key(self) -> str:
        try:
            return self._key_file.read_text()
        except FileNotFoundError:
            key_pem = enrol.new_key_pem()
            credentials.write_private(self._key_file, key_pem.encode())
            return key_pem


def fingerprint_of(credential: Credential) -> str:
    """SHA-256 of the credential's CA certificate: what a token of the same coordinator carries."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(credential.ca_pem.strip() + "\n")).hexdigest()

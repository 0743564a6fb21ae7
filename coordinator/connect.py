"""Which coordinator a person or program means, and the credential to talk to it.

Owns: HIVE_COORDINATOR and HIVE_TOKEN (or HIVE_HOME/client.toml), the credential below HIVE_HOME/client that a
coordinator on this machine writes for its owner or that a token is exchanged for once, and its renewal. Light to
import.
"""

from __future__ import annotations

import getpass
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protos import credentials
from protos.credentials import Credential
from protos.errors import AccessError, NotFound, Unreachable
from protos.settings import Setting, home_folder, resolve, text

if TYPE_CHECKING:
    from coordinator.client import Client

SETTINGS = (Setting("coordinator", text, None), Setting("token", text, None, secret=True))


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """`coordinator`: HOST:PORT of the enrolment port. Both None: the coordinator that this HIVE_HOME knows."""

    home: Path
    coordinator: str | None = None
    token: str | None = None

    def __repr__(self) -> str:
        return f"ClientConfig(home={self.home}, coordinator={self.coordinator})"

    @property
    def credential_path(self) -> Path:
        return self.home / "client" / "credential.json"


def load(flags: Mapping[str, Any] | None = None, environment: Mapping[str, str] = os.environ) -> ClientConfig:
    flags = flags or {}
    home, _ = home_folder(flags.get("home"), environment)
    values = resolve(SETTINGS, flags, environment, home / "client.toml").values
    return ClientConfig(home, values["coordinator"], values["token"])


async def connect(config: ClientConfig) -> Client:
    """A client of the coordinator meant. Enrols when there is a token and no credential from it yet."""
    from coordinator.client import Client

    return Client.of(await credential(config))


async def credential(config: ClientConfig) -> Credential:
    """Raises Unreachable when no coordinator is known, AccessError when the token or certificate does not do."""
    stored = _stored(config)
    if stored is None:
        if not config.token:
            raise Unreachable(
                "no coordinator is known here",
                "start one with hive coordinator start (or hive up), or set HIVE_COORDINATOR=HOST:PORT and "
                "HIVE_TOKEN to what `hive token create --role submitter` printed there",
            )
        return await _enrolled(config)
    stored = _relocated(stored, config)
    if time.time() < stored.renew_at_unix_s:
        return stored  # without importing grpc and cryptography for nothing
    return await _renewed(stored, config.credential_path)


def _stored(config: ClientConfig) -> Credential | None:
    """The credential on disk, unless a token of another coordinator was given."""
    try:
        stored = credentials.load(config.credential_path)
    except NotFound:
        return None
    if config.token:
        from protos.token import parse_token

        if parse_token(config.token).ca_fingerprint != _fingerprint(stored.ca_pem):
            return None
    return stored


def _fingerprint(pem: str) -> str:
    import hashlib
    import ssl

    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.strip())).hexdigest()


def _relocated(stored: Credential, config: ClientConfig) -> Credential:
    """HIVE_COORDINATOR names the host; the session port is the one learned when joining."""
    if not config.coordinator:
        return stored
    from protos.dial import join_address, split_address

    host, _ = split_address(config.coordinator)
    _, session_port = split_address(stored.session_address)
    return stored.at(config.coordinator, join_address(host, session_port))


async def _enrolled(config: ClientConfig) -> Credential:
    from protos.enrol import enrol
    from protos.token import parse_token

    assert config.token is not None  # asked by the only caller
    token = parse_token(config.token)
    if not config.coordinator:
        raise Unreachable(
            "there is a token but no address", "set HIVE_COORDINATOR=HOST:PORT to the coordinator that made the token"
        )
    joined = await enrol(config.coordinator, token, f"{_account()}@{socket.gethostname()}")
    credentials.save(joined, config.credential_path)
    return joined


async def _renewed(stored: Credential, path: Path) -> Credential:
    """The credential on disk renewed where that is due; one that has ended is refused with the way out."""
    from protos.enrol import refreshed

    try:
        fresh = await refreshed(stored, time.time())
    except AccessError as error:
        raise AccessError(
            f"the certificate of this machine is no longer accepted: {error.message}",
            "join again with a new token (HIVE_TOKEN)",
        ) from None
    fresh = fresh.at(stored.front_address, stored.session_address)
    if fresh != stored:
        credentials.save(fresh, path)
    return fresh


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid{os.getuid()}"

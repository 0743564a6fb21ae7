"""A member's credential (key, certificate, CA) and its one file on disk.

Shared by nodes and clients. The file is JSON, mode 0600, replaced atomically: a crash leaves the old or the new one,
never half of each. Light on purpose: no grpc, no cryptography, so that a CLI may look before it dials. A damaged file
is an AccessError naming it, never a guess; a repr never shows the key.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from protos.errors import AccessError, HiveError, NotFound
from protos.token import Role

SERVER_NAME = "hive-coordinator"  # the DNS name in every coordinator's server certificate, whatever its address
_VERSION = 1
_MAX_FILE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Credential:
    """Who this machine or person is to one coordinator. Addresses are host:port, times Unix seconds."""

    id: str
    role: Role
    name: str
    certificate_pem: str
    key_pem: str = field(repr=False)
    ca_pem: str
    front_address: str
    session_address: str
    issued_unix_s: float
    expires_unix_s: float

    @property
    def renew_at_unix_s(self) -> float:
        """Half of the certificate's life: there is as much time again for a coordinator that is away."""
        return (self.issued_unix_s + self.expires_unix_s) / 2

    def at(self, front_address: str, session_address: str) -> Credential:
        """The same credential for a coordinator that moved to another address."""
        return replace(self, front_address=front_address, session_address=session_address)


def save(credential: Credential, path: Path) -> None:
    """Replace the file atomically, readable by its owner only; the folder is made 0700 if it is missing."""
    document = json.dumps({"version": _VERSION, **asdict(credential)}, indent=1) + "\n"
    write_private(path, document.encode())


def load(path: Path) -> Credential:
    """Raises NotFound when nobody enrolled here yet, AccessError when the file cannot be used."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"no credential at {path}", "join first: give the token with --token or HIVE_TOKEN") from None
    except OSError as error:
        raise AccessError(f"the credential file {path} cannot be read: {error.strerror}", "check its owner") from None
    try:
        return _decode(content)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise AccessError(
            f"the credential file {path} is damaged ({error})", "delete it and join again with a token"
        ) from None


def _decode(content: bytes) -> Credential:
    if len(content) > _MAX_FILE_BYTES:
        raise ValueError("too large")
    document = json.loads(content)
    if not isinstance(document, dict) or document.pop("version", None) != _VERSION:
        raise ValueError("not a credential of this version")
    for name in ("id", "name", "certificate_pem", "key_pem", "ca_pem", "front_address", "session_address"):
        if not isinstance(document.get(name), str):
            raise ValueError(f"no {name}")
    for name, marker in (("certificate_pem", "CERTIFICATE"), ("ca_pem", "CERTIFICATE"), ("key_pem", "PRIVATE KEY")):
        text = document[name].strip()
        if not text.startswith(f"-----BEGIN {marker}-----") or not text.endswith(f"-----END {marker}-----"):
            raise ValueError(f"{name} is cut")
    document["role"] = Role(str(document.get("role")))
    document["issued_unix_s"] = float(document["issued_unix_s"])
    document["expires_unix_s"] = float(document["expires_unix_s"])
    return Credential(**document)


def write_private(path: Path, content: bytes, *, replace_existing: bool = True) -> bool:
    """Write a 0600 file whole or not at all, surviving kill -9 at any moment. False: it existed and was left alone.

    Without `replace_existing` the first of several writers wins and all others leave its file untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if replace_existing:
                Path(temporary).replace(path)
            else:
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
                except FileNotFoundError:  # another writer has finished and swept up behind itself
                    if path.exists():
                        return False
                    raise
            _sync_folder(path.parent)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise HiveError(f"cannot write {path}: {error.strerror}", "check the disk and the folder's owner") from error
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

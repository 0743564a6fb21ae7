"""Join tokens and the roles they grant: `hive1.<sha256 of the CA certificate, hex>.<secret>`.

Owns the text form. The fingerprint tells whoever holds the token which coordinator is theirs before a byte of the
secret leaves the machine. Invariants: the secret never appears in a repr or an error message; a coordinator stores only
`secret_hash`. The secret is 160 random bits, so its plain SHA-256 cannot be searched.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from dataclasses import dataclass, field
from enum import StrEnum

from protos.errors import AccessError

PREFIX = "hive1"
SECRET_BYTES = 20
_SECRET_CHARACTERS = 32  # base32 of 20 bytes, no padding
_BASE32 = frozenset("abcdefghijklmnopqrstuvwxyz234567")
_HEX = frozenset("0123456789abcdef")
_HINT = "copy the whole token that `hive coordinator start` or `hive token create` printed"


class Role(StrEnum):
    """What a certificate may do. A token grants exactly one role; so does a certificate."""

    NODE = "node"
    SUBMITTER = "submitter"
    ADMIN = "admin"
    OBSERVER = "observer"


@dataclass(frozen=True, slots=True)
class Token:
    """A parsed token. Its repr shows the fingerprint's head only; `text` is the one way to the whole."""

    ca_fingerprint: str
    secret: str = field(repr=False)

    @property
    def hash(self) -> str:
        return secret_hash(self.secret)

    @property
    def text(self) -> str:
        return f"{PREFIX}.{self.ca_fingerprint}.{self.secret}"


def new_token(ca_fingerprint: str) -> Token:
    secret = base64.b32encode(secrets.token_bytes(SECRET_BYTES)).decode().lower()
    return Token(ca_fingerprint, secret)


def parse_token(text: str) -> Token:
    """A token as a person pasted it. Raises AccessError that says which part is wrong, never echoing the secret."""
    parts = text.strip().split(".")
    if parts[0] != PREFIX:
        raise AccessError("this is not a join token: it does not start with 'hive1.'", _HINT)
    if len(parts) != 3:
        raise AccessError(f"the token has {len(parts)} parts between dots instead of 3: it was cut or joined", _HINT)
    _, fingerprint, secret = parts
    if len(fingerprint) != 64 or not _HEX.issuperset(fingerprint):
        raise AccessError("the coordinator's fingerprint in the token is not 64 hex digits", _HINT)
    if len(secret) != _SECRET_CHARACTERS or not _BASE32.issuperset(secret):
        raise AccessError(f"the token's secret part is not {_SECRET_CHARACTERS} letters and digits", _HINT)
    return Token(fingerprint, secret)


def secret_hash(secret: str) -> str:
    """What a coordinator stores of a secret: SHA-256, hex, in a name space of its own."""
    return hashlib.sha256(b"hive join secret\0" + secret.encode()).hexdigest()

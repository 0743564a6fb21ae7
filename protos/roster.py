"""Who may talk to whom: the roster of one attempt or one probe round, as the coordinator signs it.

Owns the document, the bytes that are signed, and the check of the signature against the authority's certificate.
Refuses what is too large, badly formed or not signed. Invariants: the signed bytes begin with a prefix that no
certificate begins with, so a roster is never taken for one; a member is known by the hash of its key, because
certificates are renewed twice a day and keys are not. Who is let in is node.roster_book's to say.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from protos import documents, limits
from protos.artifact import check_digest
from protos.errors import AccessError, ErrorCode, SpecError
from protos.ids import Digest, Fence, NodeId

METADATA_KEY = "hive-roster"
SMALLEST_BYTES = limits.CHUNK_BYTES  # a smaller file comes from the coordinator as quickly: it is on no roster
MAX_DIGESTS = 10_000
MAX_MEMBERS = 4 * limits.MAX_NODES_PER_JOB
MAX_ADDRESSES = 32  # of one member
_MAX_SUBJECT_CHARACTERS = 64
_PREFIX = b"hive roster 1\n"


class Action(StrEnum):
    PROBE = "probe"
    FETCH = "fetch"


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where a member listens: `network` is `loopback` (of its machine) or the CIDR that both sides named."""

    network: str
    address: str  # HOST:PORT


@dataclass(frozen=True, slots=True)
class Member:
    """One node and what it may ask of the others. No addresses: it asks, and is not asked."""

    node_id: NodeId
    machine_id: str
    key_sha256: str  # of its public key, hex
    addresses: tuple[PeerAddress, ...]
    may: tuple[Action, ...]


@dataclass(frozen=True, slots=True)
class Reference:
    """Names a roster in a call: a job and its fence, or a probe round (fence 0)."""

    subject: str
    fence: Fence

    def __str__(self) -> str:
        return f"{self.subject}/{self.fence}"


@dataclass(frozen=True, slots=True)
class Roster:
    """`digests` may be fetched by every member that may fetch. Of one reference the one issued last counts."""

    subject: str
    fence: Fence
    members: tuple[Member, ...]
    digests: tuple[Digest, ...]
    issued_unix_s: float
    expires_unix_s: float

    @property
    def reference(self) -> Reference:
        return Reference(self.subject, self.fence)

    def member(self, node_id: str) -> Member | None:
        return next((member for member in self.members if member.node_id == node_id), None)


def parse_reference(text: str) -> Reference:
    """Raises SpecError for what names no roster."""
    subject, slash, fence = text.rpartition("/")
    if not slash or not 0 < len(subject) <= _MAX_SUBJECT_CHARACTERS or not fence.isascii() or not fence.isdigit():
        raise SpecError(f"{text[:100]!r} names no roster", "is the other side a different version?")
    if len(fence) > 19 or int(fence) > limits.MAX_INT64:
        raise SpecError(f"{text[:100]!r} names no roster", "is the other side a different version?")
    return Reference(subject, Fence(int(fence)))


def signed_part(document: bytes) -> bytes:
    """What the signature is over."""
    return _PREFIX + document


def encode(roster: Roster) -> bytes:
    return documents.encode(_checked(roster))


def verify(document: bytes, signature: bytes, ca_pem: bytes) -> Roster:
    """The roster, if the authority signed these very bytes. Raises AccessError for a signature that is not its own,
    SpecError for a document that is none."""
    try:
        _authority_key(ca_pem).verify(signature, signed_part(document), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise AccessError(
            "a roster came that this cluster's authority did not sign", "", code=ErrorCode.UNAUTHENTICATED
        ) from None
    return _checked(documents.decode(Roster, document))


@lru_cache(maxsize=64)
def key_sha256(certificate_pem: bytes) -> str:
    """Of a certificate's public key (SubjectPublicKeyInfo, DER)."""
    try:
        key = x509.load_pem_x509_certificate(certificate_pem).public_key()
    except ValueError:
        raise AccessError("the certificate cannot be read", "is the other side a different version?") from None
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def can_serve(certificate_pem: bytes, node_id: str) -> bool:
    """Whether a node's certificate proves its id to those who dial it; those of older coordinators do not."""
    extensions = x509.load_pem_x509_certificate(certificate_pem).extensions
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        usages = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return node_id in names.get_values_for_type(x509.DNSName) and ExtendedKeyUsageOID.SERVER_AUTH in usages


@lru_cache(maxsize=8)
def _authority_key(ca_pem: bytes) -> ec.EllipticCurvePublicKey:
    try:
        key = x509.load_pem_x509_certificate(ca_pem).public_key()
    except ValueError:
        raise AccessError("the authority's certificate cannot be read", "join again with a new token") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise AccessError("the authority's key is of another kind", "join again with a new token")
    return key


def _checked(roster: Roster) -> Roster:
    parse_reference(str(roster.reference))
    if len(roster.members) > MAX_MEMBERS or len(roster.digests) > MAX_DIGESTS:
        raise SpecError(
            f"a roster of {len(roster.members)} members and {len(roster.digests)} files is over its limit",
            f"at most {MAX_MEMBERS} and {MAX_DIGESTS}",
        )
    if any(len(member.addresses) > MAX_ADDRESSES for member in roster.members):
        raise SpecError(f"a member with more than {MAX_ADDRESSES} addresses", "is the other side a different version?")
    if len({member.node_id for member in roster.members}) != len(roster.members):
        raise SpecError("a roster lists a member twice", "is the other side a different version?")
    if not (math.isfinite(roster.issued_unix_s) and math.isfinite(roster.expires_unix_s)):
        raise SpecError("a roster without a time", "is the other side a different version?")
    for digest in roster.digests:
        check_digest(digest)
    return roster

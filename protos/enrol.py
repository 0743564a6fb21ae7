"""Joining a coordinator, and renewing: the client's half, shared by nodes and by people's CLI.

Owns the order that keeps the secret safe: fetch what the address claims to be, compare it with the fingerprint in the
token, and only then speak, over TLS that must prove that very CA. Refuses to send a secret anywhere else. The private
key is made here and never leaves this machine; a retry with the same key is the same use of the token.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import time
from dataclasses import replace
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from protos import limits
from protos.credentials import SERVER_NAME, Credential
from protos.dial import channel, errors_of, front_channel, join_address, split_address
from protos.errors import AccessError, DeadlineExceeded, Unreachable
from protos.gen import membership_pb2 as pb
from protos.gen import membership_pb2_grpc
from protos.token import Role, Token
from protos.version import MINIMUM_PROTOCOL, PROTOCOL

_MAX_CHAIN = 8


def new_key_pem() -> str:
    """A fresh P-256 private key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def request_for(key_pem: str) -> bytes:
    """A certificate request (DER) that proves the key and says nothing else: the coordinator decides the rest."""
    key = serialization.load_pem_private_key(key_pem.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)  # we made it
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hive")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


async def fetch_ca(address: str, fingerprint: str, deadline_s: float = 10.0) -> bytes:
    """The CA certificate (PEM) with this fingerprint that the front door at an address shows.

    It is only a claim until a TLS handshake proves it. Raises AccessError when the address is another coordinator's,
    Unreachable when nothing answers there.
    """
    host, port = split_address(address)
    try:
        async with asyncio.timeout(deadline_s):
            chain = await _chain(host, port)
    except TimeoutError:
        raise DeadlineExceeded(
            f"nothing answered at {address} within {deadline_s:.0f} s",
            "is the address right? does a firewall block it?",
        ) from None
    except ssl.SSLError:
        raise Unreachable(
            f"what answers at {address} is not a coordinator (no TLS)", "give the enrolment port, 7700 by default"
        ) from None
    except OSError as error:
        raise Unreachable(
            f"the coordinator at {address} cannot be reached: {error.strerror or error}",
            "is it running (hive coordinator start), and is the address right?",
        ) from None
    for der in chain[:_MAX_CHAIN]:
        if hashlib.sha256(der).hexdigest() == fingerprint:
            return ssl.DER_cert_to_PEM_cert(der).encode()
    raise AccessError(
        f"{address} is another coordinator than the one the token is from",
        "use the token that this coordinator printed, or the address of the token's coordinator",
    )


async def _chain(host: str, port: int) -> list[bytes]:
    """Certificates as the peer sent them, unverified."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent or believed here: the fingerprint decides
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=SERVER_NAME)
    try:
        tls: Any = writer.get_extra_info("ssl_object")
        if hasattr(tls, "get_unverified_chain"):  # Python 3.13
            return [bytes(der) for der in tls.get_unverified_chain()]
        return [ssl.PEM_cert_to_DER_cert(each.public_bytes()) for each in tls._sslobj.get_unverified_chain() or ()]
    finally:
        writer.transport.abort()


async def enrol(
    address: str, token: Token, name: str, *, key_pem: str | None = None, deadline_s: float = limits.CALL_DEADLINE_S
) -> Credential:
    """Join with a token: the role is the token's. Pass the same `key_pem` to a retry so that it is one use."""
    key_pem = key_pem or new_key_pem()
    ca_pem = await fetch_ca(address, token.ca_fingerprint, min(10.0, deadline_s))
    return await _enrol(address, ca_pem, token.secret, name, key_pem, deadline_s)


async def rejoin(address: str, credential: Credential, *, deadline_s: float = limits.CALL_DEADLINE_S) -> Credential:
    """A new certificate for a member whose old one has ended: the key alone proves who it is. `address`: front door."""
    return await _enrol(address, credential.ca_pem.encode(), "", credential.name, credential.key_pem, deadline_s)


async def _enrol(address: str, ca_pem: bytes, secret: str, name: str, key_pem: str, deadline_s: float) -> Credential:
    request = pb.EnrolRequest(
        protocol=PROTOCOL,
        minimum_protocol=MINIMUM_PROTOCOL,
        secret=secret,
        csr_der=request_for(key_pem),
        name=name[: limits.MAX_NAME_CHARACTERS],
    )
    now = time.time()
    async with front_channel(address, ca_pem) as line:
        stub: Any = membership_pb2_grpc.EnrolmentStub(line)  # type: ignore[no-untyped-call]
        with errors_of(address):
            reply: pb.EnrolReply = await stub.Enrol(request, timeout=deadline_s)
    return Credential(
        id=reply.subject_id,
        role=_role(reply.role),
        name=name,
        certificate_pem=reply.certificate_pem.decode(),
        key_pem=key_pem,
        ca_pem=ca_pem.decode(),
        front_address=address,
        session_address=join_address(split_address(address)[0], reply.session_port),
        issued_unix_s=now,
        expires_unix_s=reply.expires_unix_s,
    )


async def renew(credential: Credential, *, deadline_s: float = limits.CALL_DEADLINE_S) -> Credential:
    """The same member with a new certificate, through Membership.Renew on its session address."""
    now = time.time()
    async with channel(credential.session_address, credential) as line:
        stub: Any = membership_pb2_grpc.MembershipStub(line)  # type: ignore[no-untyped-call]
        with errors_of(credential.session_address):
            request = pb.RenewRequest(csr_der=request_for(credential.key_pem))
            reply: pb.RenewReply = await stub.Renew(request, timeout=deadline_s)
    return replace(
        credential,
        certificate_pem=reply.certificate_pem.decode(),
        issued_unix_s=now,
        expires_unix_s=reply.expires_unix_s,
    )


async def refreshed(credential: Credential, now: float) -> Credential:
    """The credential to call with now: itself, renewed past its half life, or rejoined by its key once it has ended.

    A renewal that fails while the old certificate still holds is left for later; every other failure is raised.
    """
    if now < credential.renew_at_unix_s:
        return credential
    if now >= credential.expires_unix_s:
        return await rejoin(credential.front_address, credential)
    try:
        return await renew(credential)
    except (Unreachable, DeadlineExceeded):
        return credential


def _role(text: str) -> Role:
    try:
        return Role(text)
    except ValueError:
        raise Unreachable(f"the coordinator gave the role {text[:40]!r}, which this version does not know") from None

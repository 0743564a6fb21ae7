"""The coordinator's own certificate authority: made on first start, kept in one private file, issues every certificate.

Owns key and certificate of the CA, the form of an identity (`n-`/`c-` + 16 base32 characters of the key's SHA-256; the
role in a URI name `hive:<role>:<id>`), what a certificate says, and the signature under a roster. Refuses requests not
signed by their own key or whose key is not on P-256 or a larger NIST curve; nothing else a request says is copied.
Invariants: the file is created whole or not at all, by whoever is first; a person's certificate cannot serve, the
coordinator's cannot call, and a node's serves under its own id and no other name.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protos import limits, roster
from protos.credentials import SERVER_NAME, Credential, write_private
from protos.errors import AccessError, ErrorCode
from protos.token import Role

FILE_NAME = "authority.pem"
NAME_URI = "hive-name:"
ROLE_URI = "hive:"
_AUTHORITY_DAYS = 3650
_CLOCK_SKEW = datetime.timedelta(days=1)  # a member whose clock is behind must still accept the server
_MAX_REQUEST_BYTES = 8 * 1024
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


@dataclass(frozen=True, slots=True)
class KeyRequest:
    """A checked certificate request: whoever sent it holds the private key."""

    public_key: ec.EllipticCurvePublicKey = field(repr=False)
    key_id: str


@dataclass(frozen=True, slots=True)
class Issued:
    certificate_pem: bytes = field(repr=False)
    subject_id: str
    role: Role
    issued_unix_s: float
    expires_unix_s: float


@dataclass(frozen=True, slots=True)
class Authority:
    """The CA in memory. `fingerprint` is the SHA-256 of its certificate: what tokens carry."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def issue(self, request: KeyRequest, role: Role, name: str, now: float) -> Issued:
        """A member's certificate of `limits.CERTIFICATE_HOURS` for a checked request; its subject is ours to say."""
        subject = subject_id(role, request.key_id)
        expires = now + limits.CERTIFICATE_HOURS * 3600
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(f"{ROLE_URI}{role}:{subject}"),
            x509.UniformResourceIdentifier(NAME_URI + quote(name[: limits.MAX_NAME_CHARACTERS], safe="")),
        ]
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if role is Role.NODE:  # it serves its peers, who know it by its id
            names.append(x509.DNSName(subject))
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        certificate = self._sign(
            request.public_key,
            subject,
            x509.SubjectAlternativeName(names),
            usages,
            _time(now) - _CLOCK_SKEW,
            _time(expires),
        )
        return Issued(certificate, subject, role, now, expires)

    def server_identity(self) -> tuple[bytes, bytes]:
        """A fresh (private key, chain) for the listeners, made at each start and never written to disk.

        It is valid as long as the CA: it lives in the same memory as the CA's key, so a shorter life would protect
        nothing and would have to be renewed under open listeners. The chain carries the CA for the fingerprint check.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(
            key.public_key(),
            SERVER_NAME,
            x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]),
            [ExtendedKeyUsageOID.SERVER_AUTH],
            self.certificate.not_valid_before_utc,
            self.certificate.not_valid_after_utc,
        )
        return _private_pem(key), certificate + self.certificate_pem

    def credential(self, role: Role, name: str, front_address: str, session_address: str, now: float) -> Credential:
        """A whole credential made here, for the person or node that owns this very machine."""
        key = ec.generate_private_key(ec.SECP256R1())
        issued = self.issue(KeyRequest(key.public_key(), _key_id(key.public_key())), role, name, now)
        return Credential(
            id=issued.subject_id,
            role=role,
            name=name,
            certificate_pem=issued.certificate_pem.decode(),
            key_pem=_private_pem(key).decode(),
            ca_pem=self.certificate_pem.decode(),
            front_address=front_address,
            session_address=session_address,
            issued_unix_s=now,
            expires_unix_s=issued.expires_unix_s,
        )

    def sign_roster(self, document: bytes) -> bytes:
        """Signature under a roster's document; what is signed can never be read as a certificate."""
        return self.key.sign(roster.signed_part(document), ec.ECDSA(hashes.SHA256()))

    def _sign(
        self,
        public_key: ec.EllipticCurvePublicKey,
        common_name: str,
        alternative_names: x509.SubjectAlternativeName,
        usages: list[x509.ObjectIdentifier],
        not_before: datetime.datetime,
        not_after: datetime.datetime,
    ) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(not_before, self.certificate.not_valid_before_utc))
            .not_valid_after(min(not_after, self.certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=True)
            .add_extension(alternative_names, critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(_public(self.certificate)), critical=False
            )
        )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def subject_id(role: Role, key_id: str) -> str:
    """A node's or a client's id: the same key has the same id for ever, whoever asks."""
    return ("n-" if role is Role.NODE else "c-") + key_id


def check_request(csr_der: bytes) -> KeyRequest:
    """Raises AccessError unless the request is signed by its own key and the key is strong enough."""
    if len(csr_der) > _MAX_REQUEST_BYTES:
        raise AccessError("the certificate request is too large", "is the other side a different version?")
    try:
        request = x509.load_der_x509_csr(csr_der)
        public_key = request.public_key()
        signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise AccessError("the certificate request cannot be read", "is the other side a different version?") from None
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not isinstance(public_key.curve, _CURVES):
        raise AccessError("the certificate request's key is not on P-256, P-384 or P-521", "make a P-256 key")
    if not signed:
        raise AccessError("the certificate request is not signed by its own key", "make a new key and request")
    return KeyRequest(public_key, _key_id(public_key))


def open_authority(folder: Path, now: float | None = None) -> Authority:
    """The CA of this coordinator's folder, made on the first call. Safe against kill -9 and a second starter."""
    path = folder / FILE_NAME
    if not path.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _self_signed(key, time.time() if now is None else now)
        write_private(
            path,
            _private_pem(key) + certificate.public_bytes(serialization.Encoding.PEM),
            replace_existing=False,
        )
    authority = _load(path)
    for leftover in folder.glob(f".{FILE_NAME}-*.tmp"):  # a creation that was killed; its key was never used
        leftover.unlink(missing_ok=True)
    return authority


def _load(path: Path) -> Authority:
    hint = "restore it from a backup, or delete it: then every node and client must join again with a new token"
    try:
        content = path.read_bytes()
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise AccessError(f"the authority file {path} cannot be read: {error.strerror}", "check its owner") from None
    if mode & 0o077:
        raise AccessError(
            f"the authority file {path} is open to other users (mode {mode:o})",
            f"run chmod 600 {path}; if others use this machine, delete it and let everyone join again",
            code=ErrorCode.FORBIDDEN,
        )
    try:
        key = serialization.load_pem_private_key(content, None)
        certificate = x509.load_pem_x509_certificate(content)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise AccessError(f"the authority file {path} is damaged", hint) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise AccessError(f"the authority file {path} is damaged: its key and certificate do not match", hint)
    return Authority(key, certificate)


def _self_signed(key: ec.EllipticCurvePrivateKey, now: float) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"hive authority {_key_id(key.public_key())}")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now) - _CLOCK_SKEW)
        .not_valid_after(_time(now) + datetime.timedelta(days=_AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _key_id(public_key: ec.EllipticCurvePublicKey) -> str:
    der = public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return base64.b32encode(hashlib.sha256(der).digest()).decode().lower()[:16]


def _public(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)  # checked when loaded
    return key


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _time(unix_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC)

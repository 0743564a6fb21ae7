"""The CA on disk and what its certificates say."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coordinator.access import identify
from coordinator.authority import FILE_NAME, check_request, open_authority
from protos.credentials import SERVER_NAME
from protos.enrol import new_key_pem, request_for
from protos.errors import AccessError
from protos.token import Role

NOW = 1_800_000_000.0


def test_the_authority_is_made_once_private_and_found_again(tmp_path: Path) -> None:
    first = open_authority(tmp_path / "coordinator")
    again = open_authority(tmp_path / "coordinator")
    assert first.fingerprint == again.fingerprint and len(first.fingerprint) == 64
    assert stat.S_IMODE((tmp_path / "coordinator" / FILE_NAME).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "coordinator").stat().st_mode) == 0o700
    assert "PRIVATE" not in repr(first)


def test_two_starters_at_once_get_the_same_authority(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = {each.fingerprint for each in pool.map(lambda _: open_authority(tmp_path), range(8))}
    assert len(found) == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_kill_during_the_creation_leaves_a_whole_authority_or_none(tmp_path: Path) -> None:
    """A child makes authorities one after the other and is killed somewhere in the middle of one, several times."""
    program = (
        "import sys, itertools, pathlib\n"
        "from coordinator.authority import open_authority\n"
        "for i in itertools.count():\n"
        "    open_authority(pathlib.Path(sys.argv[1]) / str(i))\n"
        "    print(i, flush=True)\n"
    )
    repository = Path(__file__).parents[2]
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        with subprocess.Popen(
            [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, cwd=repository
        ) as child:
            assert child.stdout is not None
            for _ in range(5 + attempt):
                assert child.stdout.readline()
            os.kill(child.pid, signal.SIGKILL)
        (folder / "half").mkdir()
        (folder / "half" / f".{FILE_NAME}-abc.tmp").write_bytes(b"-----BEGIN PRIV")
        for each in folder.iterdir():
            assert open_authority(each).fingerprint  # whatever was left, a start succeeds
            assert [path.name for path in each.iterdir()] == [FILE_NAME]


def test_a_damaged_or_open_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    open_authority(tmp_path)
    file = tmp_path / FILE_NAME
    file.chmod(0o644)
    with pytest.raises(AccessError, match="open to other users") as open_file:
        open_authority(tmp_path)
    assert "chmod 600" in open_file.value.hint
    file.chmod(0o600)
    other = open_authority(tmp_path / "other")
    assert other.fingerprint
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:100] + b"junk" + whole[104:]):
        file.write_bytes(content)
        with pytest.raises(AccessError, match="damaged") as damaged:
            open_authority(tmp_path)
        assert "backup" in damaged.value.hint
    mixed = whole.split(b"-----BEGIN CERTIFICATE")[0] + other.certificate_pem
    file.write_bytes(mixed)
    with pytest.raises(AccessError, match="do not match"):
        open_authority(tmp_path)


@pytest.mark.parametrize("role", list(Role))
def test_a_certificate_says_id_role_and_name_and_lives_a_day(tmp_path: Path, role: Role) -> None:
    authority = open_authority(tmp_path)
    key = check_request(request_for(new_key_pem()))
    issued = authority.issue(key, role, "Ada's box: ü", NOW)
    certificate = x509.load_pem_x509_certificate(issued.certificate_pem)
    certificate.verify_directly_issued_by(authority.certificate)
    assert certificate.not_valid_after_utc.timestamp() == NOW + 24 * 3600 == issued.expires_unix_s
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    assert common == issued.subject_id == ("n-" if role is Role.NODE else "c-") + key.key_id
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    caller = identify({"x509_subject_alternative_name": [name.value.encode() for name in names]})
    assert (caller.id, caller.role, caller.name) == (issued.subject_id, role, "Ada's box: ü")


def test_the_same_key_has_the_same_id_for_ever(tmp_path: Path) -> None:
    key_pem = new_key_pem()
    assert check_request(request_for(key_pem)).key_id == check_request(request_for(key_pem)).key_id


def test_a_clients_certificate_cannot_serve_and_the_servers_cannot_call(tmp_path: Path) -> None:
    authority = open_authority(tmp_path)
    node = authority.credential(Role.NODE, SERVER_NAME, "h:1", "h:2", NOW)
    client = x509.load_pem_x509_certificate(
        authority.credential(Role.ADMIN, SERVER_NAME, "h:1", "h:2", NOW).certificate_pem.encode()
    )
    server, ca = x509.load_pem_x509_certificates(authority.server_identity()[1])
    assert ca == authority.certificate
    for certificate, usages, dns in (
        (client, [ExtendedKeyUsageOID.CLIENT_AUTH], []),
        (server, [ExtendedKeyUsageOID.SERVER_AUTH], [SERVER_NAME]),
        (  # it serves its peers, under its id alone
            x509.load_pem_x509_certificate(node.certificate_pem.encode()),
            [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH],
            [node.id],
        ),
    ):
        extensions = certificate.extensions
        assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == usages
        assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == dns
    with pytest.raises(AccessError, match="without a certificate of this coordinator"):
        identify({"x509_subject_alternative_name": [SERVER_NAME.encode()]})
    assert server.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_a_member_whose_clock_is_hours_behind_accepts_the_server(tmp_path: Path) -> None:
    authority = open_authority(tmp_path)
    server = x509.load_pem_x509_certificates(authority.server_identity()[1])[0]
    assert server.not_valid_before_utc.timestamp() < time.time() - 6 * 3600


def test_weak_or_foreign_keys_are_refused() -> None:
    for key in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256K1())):
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "n-" + "a" * 16)])
        request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
        with pytest.raises(AccessError, match="not on P-256"):
            check_request(request.public_bytes(serialization.Encoding.DER))

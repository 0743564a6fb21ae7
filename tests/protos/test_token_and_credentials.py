"""Token text and the credential file."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import credentials
from protos.credentials import Credential
from protos.dial import join_address, split_address
from protos.errors import AccessError, HiveError, NotFound
from protos.token import Role, Token, new_token, parse_token, secret_hash

FINGERPRINT = "0123456789abcdef" * 4
PEM = "-----BEGIN {0}-----\nabc\n-----END {0}-----\n"


def credential() -> Credential:
    return Credential(
        id="n-abc",
        role=Role.NODE,
        name="lab 3 ü",
        certificate_pem=PEM.format("CERTIFICATE"),
        key_pem=PEM.format("PRIVATE KEY"),
        ca_pem=PEM.format("CERTIFICATE"),
        front_address="lab:7700",
        session_address="lab:7701",
        issued_unix_s=1000.0,
        expires_unix_s=3000.0,
    )


def test_a_token_survives_its_text_and_hides_its_secret() -> None:
    token = new_token(FINGERPRINT)
    assert parse_token(f"  {token.text}\n") == token
    assert token.secret not in repr(token) and token.secret not in f"{token}"
    assert token.hash == secret_hash(token.secret) and token.secret not in token.hash
    assert new_token(FINGERPRINT).secret != token.secret


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "does not start"),
        ("hive2.a.b", "does not start"),
        ("hive1.abc", "2 parts"),
        (f"hive1.{FINGERPRINT}.x.y", "4 parts"),
        (f"hive1.{FINGERPRINT[:-1]}.{'a' * 32}", "fingerprint"),
        (f"hive1.{FINGERPRINT}.{'a' * 31}", "secret part"),
        (f"hive1.{FINGERPRINT}.{'A' * 32}", "secret part"),
    ],
)
def test_a_wrong_token_says_which_part_is_wrong(text: str, wrong: str) -> None:
    with pytest.raises(AccessError, match=wrong) as refused:
        parse_token(text)
    assert refused.value.exit_code == 5 and refused.value.hint


@given(st.text())
def test_no_text_crashes_the_parser_or_is_echoed_whole(text: str) -> None:
    try:
        token = parse_token("hive1." + text)
    except AccessError as error:
        assert len(error.message) < 200
    else:
        assert isinstance(token, Token)


def test_a_credential_survives_its_file_which_only_its_owner_reads(tmp_path: Path) -> None:
    file = tmp_path / "node" / "credential.json"
    credentials.save(credential(), file)
    assert credentials.load(file) == credential()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["credential.json"]
    assert "PRIVATE" not in repr(credential())
    assert credential().renew_at_unix_s == 2000.0


def test_a_missing_file_is_not_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no credential"):
        credentials.load(tmp_path / "credential.json")


@given(cut=st.floats(0, 1, exclude_max=True), junk=st.binary(max_size=20))
def test_a_damaged_file_is_refused_by_name(tmp_path_factory: pytest.TempPathFactory, cut: float, junk: bytes) -> None:
    file = tmp_path_factory.mktemp("damaged") / "credential.json"
    credentials.save(credential(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole.rstrip()) * cut)] + junk)
    with pytest.raises(AccessError, match=r"credential\.json is damaged") as refused:
        credentials.load(file)
    assert "join again" in refused.value.hint


def test_a_file_with_a_wrong_value_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "credential.json"
    credentials.save(credential(), file)
    text = file.read_text()
    for old, new in (('"node"', '"king"'), ("1000.0", '"soon"'), ("-----END PRIVATE KEY-----", ""), ('"id"', '"ID"')):
        file.write_text(text.replace(old, new))
        with pytest.raises(AccessError, match="damaged"):
            credentials.load(file)
    file.write_text("[" * 50_000)
    with pytest.raises(AccessError, match="damaged"):
        credentials.load(file)


def test_a_folder_that_cannot_be_written_is_an_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "node").write_text("a file")
    with pytest.raises(HiveError, match="cannot write"):
        credentials.save(credential(), tmp_path / "node" / "credential.json")


@given(st.text())
def test_no_address_crashes_the_parser(text: str) -> None:
    try:
        host, port = split_address(text)
    except HiveError as error:
        assert error.exit_code == 2 and "HOST:PORT" in error.message
    else:
        assert split_address(join_address(host, port)) == (host, port)


def test_addresses_of_both_families_are_read() -> None:
    assert split_address("lab:7700") == ("lab", 7700)
    assert split_address("[fd00::1]:7700") == ("fd00::1", 7700)
    for wrong in ("lab", "lab:", ":7700", "lab:0", "lab:70000", "lab:七"):
        with pytest.raises(HiveError, match="not HOST:PORT"):
            split_address(wrong)

"""Where secrets lie: in files that only their owner reads, and nowhere else, whatever is logged, stored or reported."""

from __future__ import annotations

import json
import stat

import pytest

from protos import credentials
from tests.security.at_rest import contents
from tests.security.conftest import Working

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def key_body(pem: str) -> bytes:
    """A line of a key that stands for all of it."""
    return pem.strip().splitlines()[1].encode()


def test_private_keys_lie_in_files_of_their_owner_alone(working: Working) -> None:
    holders = [path for path, content in contents(working.cluster.folder) if b"PRIVATE KEY" in content]
    names = {str(path.relative_to(working.cluster.folder)) for path in holders}
    assert {"coordinator/coordinator/authority.pem", "coordinator/client/credential.json"} <= names
    assert {"n0/node/credential.json", "n1/node/credential.json"} <= names
    assert {str(path): stat.S_IMODE(path.stat().st_mode) for path in holders if path.stat().st_mode & 0o077} == {}
    for token in working.cluster.home.rglob("join-token.json"):
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
    for folder in ("coordinator/coordinator", "coordinator/client", "n1/node"):
        assert stat.S_IMODE((working.cluster.folder / folder).stat().st_mode) == 0o700, folder


def test_no_log_no_database_and_no_result_holds_a_secret(working: Working) -> None:
    cluster = working.cluster
    made = [working.token(role) for role in ("node", "submitter", "admin")]
    secrets = {
        f"token {number}": text.rpartition(".")[2].encode() for number, text in enumerate([cluster.token, *made])
    }
    holders = {
        path: key_body(credentials.load(path).key_pem)
        for path, _ in contents(cluster.folder)
        if path.name == "credential.json"
    }
    secrets |= {f"key of {path}": body for path, body in holders.items()}
    authority = cluster.home / "coordinator" / "authority.pem"
    begin = authority.read_text().index("PRIVATE KEY")
    secrets["key of the authority"] = key_body(authority.read_text()[begin:])
    found = []
    for path, content in contents(cluster.folder):
        if path in holders or path == authority or path.name == "join-token.json":
            continue
        if path.name == "coordinator.log":  # what it printed for its owner on standard output is not a log
            lines = [line for line in content.splitlines() if not line.startswith(b'{"schema"')]
            assert len(lines) < len(content.splitlines())
            content = b"\n".join(lines)
        found += [f"{what} in {path}" for what, secret in secrets.items() if secret in content]
    assert found == []


def test_no_answer_of_the_coordinator_repeats_a_secret(working: Working) -> None:
    text = working.token("node")
    secret = text.rpartition(".")[2]
    for command in (("token", "list", "--all"), ("doctor",), ("nodes",), ("show", working.job_id)):
        assert secret not in json.dumps(working.cluster.ask(*command, check=False)), command
    events = working.cluster.hive("events", "-o", "json", check=False)
    assert events.stdout and secret not in events.stdout and "PRIVATE KEY" not in events.stdout

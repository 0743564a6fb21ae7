"""The role table against the service descriptors, and who a caller is."""

from __future__ import annotations

import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given
from hypothesis import strategies as st

from coordinator.access import ALLOWED, FRONT_DOOR, Caller, identify, permit
from coordinator.interceptors import check_protocol
from protos.errors import AccessError, ErrorCode, Unreachable
from protos.gen import artifacts_pb2, jobs_pb2, membership_pb2, qtable_pb2, work_pb2
from protos.token import Role

FILES = (membership_pb2, jobs_pb2, artifacts_pb2, qtable_pb2, work_pb2, health_pb2, reflection_pb2)
METHODS = {
    f"/{service.full_name}/{method.name}"
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


def may(role: Role, method: str) -> bool:
    try:
        permit(method, Caller("x", role, "x"))
    except AccessError as error:
        assert error.code is ErrorCode.FORBIDDEN and error.hint
        return False
    return True


def test_the_table_names_every_method_of_every_service_and_no_other() -> None:
    assert set(ALLOWED) == METHODS
    assert FRONT_DOOR < METHODS


@given(st.text())
def test_a_method_that_is_not_in_the_table_is_refused_for_everyone(method: str) -> None:
    if method not in ALLOWED:
        assert not any(may(role, method) for role in Role)


def test_a_node_moves_artifacts_and_attaches_and_nothing_else() -> None:
    able = {method for method in METHODS if may(Role.NODE, method)}
    assert {method for method in able if not method.startswith("/grpc.")} == {
        "/hive.v1.Membership/Attach",
        "/hive.v1.Membership/Probe",
        "/hive.v1.Membership/Renew",
        "/hive.v1.Artifacts/Missing",
        "/hive.v1.Artifacts/Put",
        "/hive.v1.Artifacts/Get",
    }


def test_only_an_administrator_touches_tokens_and_nodes_and_does_everything_a_person_may() -> None:
    for name in ("CreateToken", "ListTokens", "RevokeToken", "ControlNode"):
        assert [role for role in Role if may(role, f"/hive.v1.Jobs/{name}")] == [Role.ADMIN]
    assert {method for method in METHODS if not may(Role.ADMIN, method)} == {
        "/hive.v1.Membership/Attach",
        "/hive.v1.Membership/Probe",
        "/hive.v1.Enrolment/Enrol",
    }


def test_an_observer_changes_nothing() -> None:
    for name in ("Import", "Reset", "Rebuild"):
        assert [role for role in Role if may(role, f"/hive.v1.QTable/{name}")] == [Role.ADMIN]
    for name in ("Plan", "Submit", "Control", "Locate"):
        assert not may(Role.OBSERVER, f"/hive.v1.Jobs/{name}") and may(Role.SUBMITTER, f"/hive.v1.Jobs/{name}")
    assert not may(Role.OBSERVER, "/hive.v1.Artifacts/Put")
    assert may(Role.OBSERVER, "/hive.v1.Jobs/Events")


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_no_certificate_name_makes_a_caller_by_accident(names: list[bytes]) -> None:
    try:
        caller = identify({"x509_subject_alternative_name": names})
    except AccessError:
        return
    assert f"hive:{caller.role}:{caller.id}".encode() in [name.decode(errors="replace").encode() for name in names]


def test_no_certificate_is_no_caller() -> None:
    for context in ({}, {"x509_common_name": [b"n-abc"]}, {"x509_subject_alternative_name": [b"hive:root:n-a"]}):
        with pytest.raises(AccessError):
            identify(context)


@given(st.text())
def test_any_user_agent_is_read_or_let_through(agent: str) -> None:
    check_protocol("the CLI", agent)


def test_the_protocol_in_the_user_agent_decides() -> None:
    check_protocol("the CLI", "hive/0.1.0 hive-protocol/1-1 grpc-python-asyncio/1.85.1")
    check_protocol("the CLI", "grpcurl/1.9")
    with pytest.raises(Unreachable, match="upgrade hive on the CLI"):
        check_protocol("the CLI", "hive/0.0.1 hive-protocol/0-0 grpc")

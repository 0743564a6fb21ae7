"""Who may call what: one table for every method of every service, and who a caller is.

Pure: no grpc, no store. Fails closed: a method that is not in the table is refused for everyone; a test compares the
table with the service descriptors. A caller's id and role come from its certificate alone, never from a message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from protos.errors import AccessError, ErrorCode
from protos.token import Role

_ALL = frozenset(Role)
_READ = frozenset({Role.SUBMITTER, Role.ADMIN, Role.OBSERVER})
_WRITE = frozenset({Role.SUBMITTER, Role.ADMIN})
_ADMIN = frozenset({Role.ADMIN})
_NODE = frozenset({Role.NODE})

FRONT_DOOR = frozenset({"/hive.v1.Enrolment/Enrol"})  # the only methods without a client certificate

ALLOWED: Mapping[str, frozenset[Role]] = {
    "/hive.v1.Enrolment/Enrol": frozenset(),  # never on the session port
    "/hive.v1.Membership/Attach": _NODE,  # an administrator is a person, not a machine
    "/hive.v1.Membership/Probe": _NODE,
    "/hive.v1.Membership/Renew": _ALL,
    "/hive.v1.Jobs/Nodes": _READ,
    "/hive.v1.Jobs/Plan": _WRITE,  # identification builds the submitter's code on a node
    "/hive.v1.Jobs/Submit": _WRITE,
    "/hive.v1.Jobs/List": _READ,
    "/hive.v1.Jobs/Show": _READ,
    "/hive.v1.Jobs/Explain": _READ,
    "/hive.v1.Jobs/Metrics": _READ,
    "/hive.v1.Jobs/Control": _WRITE,
    "/hive.v1.Jobs/Events": _READ,
    "/hive.v1.Jobs/Logs": _READ,
    "/hive.v1.Jobs/CreateToken": _ADMIN,
    "/hive.v1.Jobs/ListTokens": _ADMIN,
    "/hive.v1.Jobs/RevokeToken": _ADMIN,
    "/hive.v1.Jobs/ControlNode": _ADMIN,
    "/hive.v1.Jobs/Doctor": _READ,
    "/hive.v1.Jobs/Locate": _WRITE,
    "/hive.v1.Jobs/Identify": _WRITE,  # as Plan
    "/hive.v1.QTable/Show": _READ,
    "/hive.v1.QTable/Export": _READ,
    "/hive.v1.QTable/Decisions": _READ,
    "/hive.v1.QTable/Evaluate": _READ,
    "/hive.v1.QTable/Import": _ADMIN,
    "/hive.v1.QTable/Reset": _ADMIN,
    "/hive.v1.QTable/Rebuild": _ADMIN,
    "/hive.v1.Artifacts/Missing": _WRITE | _NODE,
    "/hive.v1.Artifacts/Put": _WRITE | _NODE,
    "/hive.v1.Artifacts/Get": _READ | _NODE,
    "/grpc.health.v1.Health/Check": _ALL,
    "/grpc.health.v1.Health/List": _ALL,
    "/grpc.health.v1.Health/Watch": _ALL,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _READ,
}


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of a certificate that our CA signed."""

    id: str
    role: Role
    name: str

    def __str__(self) -> str:
        return f"{self.role} {self.name or self.id}"


def identify(auth_context: Mapping[str, Sequence[bytes]]) -> Caller:
    """The caller by the URI names of its verified certificate. Raises AccessError where there is none of ours."""
    caller: tuple[Role, str] | None = None
    name = ""
    for entry in auth_context.get("x509_subject_alternative_name", ()):
        uri = entry.decode(errors="replace")
        kind, _, rest = uri.partition(":")
        if kind == "hive":
            role, _, subject = rest.partition(":")
            if role not in _ALL or not subject:
                raise AccessError("the certificate names a role this coordinator does not know", "join again")
            caller = (Role(role), subject)
        elif kind == "hive-name":
            name = unquote(rest)
    if caller is None:
        raise AccessError("the call came without a certificate of this coordinator", "join with a token first")
    return Caller(caller[1], caller[0], name)


def permit(method: str, caller: Caller) -> None:
    """Raises AccessError (forbidden) unless the table lets this role call this method."""
    allowed = ALLOWED.get(method, frozenset())
    if caller.role not in allowed:
        able = " or ".join(sorted(allowed))
        raise AccessError(
            f"a credential with role {caller.role} may not call {method.rpartition('/')[2] or method}",
            f"use a credential with role {able}" if able else "no role may call this",
            code=ErrorCode.FORBIDDEN,
        )

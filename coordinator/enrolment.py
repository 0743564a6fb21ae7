"""The front door: a token and a certificate request in, a certificate out; and the renewal of certificates.

Owns the order of the checks (protocol, rate, request, token) and the limiter of wrong tokens. Who holds which token
is the `TokenBook`'s to know, over the store. Invariants: a secret is only ever hashed; one key uses one token once,
however often a reply is lost; a key that is already a member gets a new certificate without a token, in the role it
has, because its request proves the key: a machine that slept past its certificate's end rejoins by itself until it is
removed.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

from coordinator.authority import Authority, check_request, subject_id
from coordinator.interceptors import caller
from protos import limits
from protos.errors import AccessError, ErrorCode, Exhausted, Unreachable
from protos.gen import membership_pb2 as pb
from protos.gen import membership_pb2_grpc
from protos.token import Role, secret_hash
from protos.version import negotiate


class TokenBook(Protocol):
    """Tokens and members, over the store. Both calls raise AccessError with a sentence of their own per reason."""

    async def use(self, secret_hash: str, key_id: str, name: str, now: float) -> Role:
        """Use a token once for a key, and record the key as a member, in one transaction.

        The same (token, key) again is the same use. Unknown, expired, used up, revoked: AccessError.
        A removed member that brings a valid token is a member again.
        """
        ...

    async def returning(self, key_id: str, now: float) -> Role:
        """The role of a key that is a member now; AccessError when it never was or was removed."""
        ...


class FailureLimiter:
    """Wrong tokens per address: `burst` at once, then one per `refill_s`. Pure: the clock is passed in.

    At most `capacity` addresses are remembered; the ones that failed longest ago are forgotten first.
    """

    def __init__(self, burst: int = 10, refill_s: float = 6.0, capacity: int = 10_000) -> None:
        self.burst = burst
        self.refill_s = refill_s
        self.capacity = capacity
        self._debts: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address -> (failures not yet forgiven, at)

    def wait_s(self, address: str, now: float) -> float:
        """0 when the address may try now, else the seconds until it may."""
        return max(0.0, (self._debt(address, now) - self.burst + 1) * self.refill_s)

    def failed(self, address: str, now: float) -> None:
        self._debts[address] = (self._debt(address, now) + 1, now)
        self._debts.move_to_end(address)
        while len(self._debts) > self.capacity:
            self._debts.popitem(last=False)

    def __len__(self) -> int:
        return len(self._debts)

    def _debt(self, address: str, now: float) -> float:
        debt, at = self._debts.get(address, (0.0, now))
        return max(0.0, debt - (now - at) / self.refill_s)


def peer_address(peer: str) -> str:
    """The host part of a gRPC peer name; an IPv6 neighbour counts as its /64, for it owns all of it."""
    kind, _, rest = peer.partition(":")
    host = rest.rpartition(":")[0].replace("%5B", "[").replace("%5D", "]").strip("[]")
    if kind == "ipv6":
        try:
            return str(ipaddress.ip_network((host.partition("%")[0], 64), strict=False))
        except ValueError:
            return host
    return host or peer


class EnrolmentService(membership_pb2_grpc.EnrolmentServicer):
    """Enrolment.Enrol. `session_port` is where the new member goes next; `clock` gives Unix seconds."""

    def __init__(
        self,
        authority: Authority,
        book: TokenBook,
        session_port: Callable[[], int],
        clock: Callable[[], float] = time.time,
        limiter: FailureLimiter | None = None,
    ) -> None:
        self._authority = authority
        self._book = book
        self._session_port = session_port
        self._clock = clock
        self._limiter = FailureLimiter() if limiter is None else limiter

    async def Enrol(self, request: pb.EnrolRequest, context: Any) -> pb.EnrolReply:
        now = self._clock()
        name = check_name(request.name)
        agreement = negotiate(name or "this machine", request.protocol, request.minimum_protocol)
        if agreement.protocol is None:
            raise Unreachable(agreement.reason, code=ErrorCode.VERSION_MISMATCH)
        address = peer_address(context.peer())
        if wait_s := self._limiter.wait_s(address, now):
            raise Exhausted(f"too many wrong tokens from {address}", f"try again in {wait_s:.0f} s")
        key = check_request(request.csr_der)
        try:
            if request.secret:
                role = await self._book.use(secret_hash(request.secret), key.key_id, name, now)
            else:
                role = await self._book.returning(key.key_id, now)
        except AccessError:
            self._limiter.failed(address, now)
            raise
        issued = self._authority.issue(key, role, name, now)
        return pb.EnrolReply(
            certificate_pem=issued.certificate_pem,
            ca_pem=self._authority.certificate_pem,
            subject_id=issued.subject_id,
            role=role.value,
            session_port=self._session_port(),
            expires_unix_s=issued.expires_unix_s,
        )


def renew(authority: Authority, request: pb.RenewRequest, context: Any, now: float) -> pb.RenewReply:
    """Membership.Renew: a new certificate for the caller's own key, id, role and name, and for nothing else."""
    who = caller(context)
    key = check_request(request.csr_der)
    if subject_id(who.role, key.key_id) != who.id:
        raise AccessError(
            "a certificate is renewed only for the key it was made for",
            "join again with a token to use a new key",
            code=ErrorCode.FORBIDDEN,
        )
    issued = authority.issue(key, who.role, who.name, now)
    return pb.RenewReply(certificate_pem=issued.certificate_pem, expires_unix_s=issued.expires_unix_s)


def check_name(name: str) -> str:
    """A member's name as it will be shown: printable, bounded. Raises AccessError otherwise."""
    if len(name) > limits.MAX_NAME_CHARACTERS or not name.isprintable():
        raise AccessError(
            f"the name must be printable and at most {limits.MAX_NAME_CHARACTERS} characters", "choose another --name"
        )
    return name.strip()

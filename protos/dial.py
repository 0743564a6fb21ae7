"""Calling a coordinator: the TLS channel, its bounds, and what its errors mean. Used by nodes and by clients.

Owns the channel's options and the way from a gRPC failure back to the HiveError tree. Imports grpc (0.1 s): import this
module where a call is made, not at the top of a CLI. Invariants: no plain text; the server proves the CA in the
credential; keepalive with a ping timeout, so that a frozen coordinator is noticed in seconds, not minutes. The protocol
travels in the user agent (`hive-protocol/HIGHEST-LOWEST`), which costs no interceptor on the session stream.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio

from protos import limits
from protos.credentials import SERVER_NAME, Credential
from protos.errors import AccessError, DeadlineExceeded, ErrorCode, Exhausted, HiveError, Unreachable, from_document
from protos.version import MINIMUM_PROTOCOL, PROTOCOL, SOFTWARE

ERROR_KEY = "hive-error-bin"  # trailing metadata: JSON of code, message, hint
PROTOCOL_TOKEN = "hive-protocol"
_MAX_ERROR_BYTES = 64 * 1024
_REACH_HINT = (
    "is it running (hive coordinator start), is the address right (--coordinator HOST:PORT or HIVE_COORDINATOR), "
    "and does a firewall let it through?"
)


def channel(
    address: str, credential: Credential, *, protocol: int = PROTOCOL, minimum: int = MINIMUM_PROTOCOL
) -> grpc.aio.Channel:
    """A channel to the session port as the credential's holder. Connects lazily and reconnects by itself."""
    credentials = grpc.ssl_channel_credentials(
        credential.ca_pem.encode(), credential.key_pem.encode(), credential.certificate_pem.encode()
    )
    return grpc.aio.secure_channel(target(address), credentials, options=options(protocol, minimum))


def front_channel(address: str, ca_pem: bytes) -> grpc.aio.Channel:
    """A channel to the enrolment port, which must prove the given CA. Carries no certificate of ours."""
    return grpc.aio.secure_channel(target(address), grpc.ssl_channel_credentials(ca_pem), options=options())


def options(protocol: int = PROTOCOL, minimum: int = MINIMUM_PROTOCOL) -> tuple[tuple[str, str | int], ...]:
    return (
        ("grpc.primary_user_agent", f"hive/{SOFTWARE} {PROTOCOL_TOKEN}/{protocol}-{minimum}"),
        ("grpc.ssl_target_name_override", SERVER_NAME),
        ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", 32 * 1024),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),  # without it a stopped server is noticed after a minute
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.use_local_subchannel_pool", 1),  # a new channel starts without another one's back-off
        ("grpc.enable_http_proxy", 0),  # http_proxy in the environment is not meant for a coordinator
    )


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`. Raises HiveError (usage) otherwise."""
    host, colon, port = address.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise HiveError(
            f"{address[:100]!r} is not HOST:PORT",
            f"for example lab-server:{limits.DEFAULT_ENROLMENT_PORT} or [fe80::1]:{limits.DEFAULT_ENROLMENT_PORT}",
            code=ErrorCode.USAGE,
        )
    return host, int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def target(address: str) -> str:
    """The address as a gRPC target; what is not an address raises before gRPC guesses a scheme."""
    return "dns:///" + join_address(*split_address(address))


def error_from(error: grpc.RpcError, address: str) -> HiveError:
    """What a failed call means, as the error the coordinator raised or as what came between."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return HiveError(f"the call to the coordinator at {address} failed: {error}")
    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == ERROR_KEY and isinstance(value, bytes) and (decoded := _decode(value)):
            return decoded
    details = (error.details() or "")[:500]
    lowered = details.lower()
    match error.code():
        case grpc.StatusCode.UNAVAILABLE if "certificate_verify_failed" in lowered:
            return AccessError(
                f"what answers at {address} does not prove to be the coordinator that this machine joined",
                "was the coordinator set up anew, or is this machine's clock wrong? join again with a new token",
            )
        case grpc.StatusCode.UNAVAILABLE if "wrong_version_number" in lowered:
            return Unreachable(f"what answers at {address} is not a coordinator (no TLS)", _REACH_HINT)
        case grpc.StatusCode.UNAVAILABLE if "failed to connect" in lowered and "closed" in lowered:
            return Unreachable(  # a refused client certificate looks just like a server that is going down
                f"the coordinator at {address} closed the connection before a word was spoken",
                "it is stopping, or it does not accept this machine's certificate: try again, then join again",
            )
        case grpc.StatusCode.UNAVAILABLE:
            return Unreachable(f"the coordinator at {address} cannot be reached", _REACH_HINT)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(
                f"the coordinator at {address} did not answer in time", "it may be busy or frozen: try again"
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return Unreachable(
                f"the coordinator at {address} does not know this call: it runs an older version",
                "upgrade hive on the coordinator",
                code=ErrorCode.VERSION_MISMATCH,
            )
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            return AccessError(details or "the coordinator refused the call", "join again with a new token")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Exhausted(f"the call to the coordinator is over a limit: {details}", "send less at once")
        case grpc.StatusCode.CANCELLED:
            return HiveError("the call was cancelled", code=ErrorCode.CANCELLED)
        case status:
            return HiveError(f"the coordinator at {address} answered {status.name}: {details}", "see its log")


@contextlib.contextmanager
def errors_of(address: str) -> Iterator[None]:
    """Calls inside raise HiveError instead of grpc.RpcError."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from(error, address) from None


def _decode(value: bytes) -> HiveError | None:
    """The coordinator's own error, or None when these bytes are not one."""
    try:
        document = json.loads(value) if len(value) <= _MAX_ERROR_BYTES else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    return from_document({str(key): str(item) for key, item in document.items()})

"""The two doors of a coordinator: the enrolment port (server TLS) and the session port (mutual TLS).

Owns how a listener is secured and bounded. Refuses plain text altogether; a port in use is PORT_TAKEN, never shared.
A connection lives an hour at most (plus a minute for its streams), because an open one outlives its certificate.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from coordinator.authority import Authority
from coordinator.interceptors import Guard, front_door, session_door
from protos import limits
from protos.errors import ErrorCode, HiveError

_BOUNDS = (
    ("grpc.so_reuseport", 0),  # a second coordinator on the port must fail, not share it
    ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_concurrent_streams", 1000),
)
_SESSION = (
    *_BOUNDS,
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
)
_FRONT = (*_BOUNDS, ("grpc.max_connection_age_ms", 60_000), ("grpc.max_connection_idle_ms", 30_000))


def front_server() -> grpc.aio.Server:
    """Serves Enrolment and nothing else, whatever is added to it."""
    return grpc.aio.server(interceptors=(Guard(front_door),), options=_FRONT, maximum_concurrent_rpcs=200)


def session_server(still_member: Callable[[str], Awaitable[bool]]) -> grpc.aio.Server:
    """Serves everything else; `still_member(id)` is asked on every call."""
    return grpc.aio.server(interceptors=(Guard(session_door(still_member)),), options=_SESSION)


def bind_front(server: grpc.aio.Server, authority: Authority, host: str, port: int) -> int:
    """Returns the bound port (port 0 takes a free one). Raises HiveError PORT_TAKEN."""
    credentials = grpc.ssl_server_credentials([authority.server_identity()])
    return _bind(server, credentials, host, port)


def bind_session(server: grpc.aio.Server, authority: Authority, host: str, port: int) -> int:
    """As `bind_front`, for the port that asks everyone for a certificate of this CA."""
    credentials = grpc.ssl_server_credentials(
        [authority.server_identity()], root_certificates=authority.certificate_pem, require_client_auth=True
    )
    return _bind(server, credentials, host, port)


def _bind(server: grpc.aio.Server, credentials: Any, host: str, port: int) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound: int = server.add_secure_port(address, credentials)
    except RuntimeError:
        bound = 0
    if not bound:
        raise _why(host, port)
    return bound


def _why(host: str, port: int) -> HiveError:
    """grpc does not say why it could not bind: ask the system."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return HiveError(
                    f"port {port} on {host} is taken by another program",
                    "stop it (is a coordinator already running?) or choose another port with --port or --session-port",
                    code=ErrorCode.PORT_TAKEN,
                )
            return HiveError(f"cannot listen on {host} port {port}: {error.strerror}", "check --host and --port")
    return HiveError(f"cannot listen on {host} port {port}", "check --host and --port")

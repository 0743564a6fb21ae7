"""What stands before every servicer: who calls, whether it may, and how errors look on the wire.

Owns the mapping HiveError -> gRPC status with trailing metadata `hive-error-bin` (JSON of code, message, hint). The
admission is passed in: `front_door` for the enrolment port, `session_door` for everything else. Invariants: a servicer
runs only after its method was admitted; an error that nobody expected is logged under an incident id and shown without
its internals. Servicers raise HiveError and never abort by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from coordinator.access import FRONT_DOOR, Caller, identify, permit
from protos.dial import PROTOCOL_TOKEN
from protos.errors import AccessError, ErrorCode, HiveError, Unreachable
from protos.refusal import abort
from protos.version import negotiate

_log = logging.getLogger("hive.coordinator.rpc")
_PROTOCOL = re.compile(PROTOCOL_TOKEN + r"/(\d{1,6})-(\d{1,6})(?:\s|$)")

Admit = Callable[[str, Any], Awaitable[None]]  # (full method, ServicerContext): raises HiveError to refuse


def caller(context: Any) -> Caller:
    """Who is calling, from the verified certificate of this connection."""
    return identify(context.auth_context())


async def front_door(method: str, context: Any) -> None:
    """Only enrolment, for anyone."""
    if method not in FRONT_DOOR:
        raise AccessError(
            "this port serves enrolment only", "call the session port with a credential", code=ErrorCode.FORBIDDEN
        )


def session_door(still_member: Callable[[str], Awaitable[bool]]) -> Admit:
    """A certificate, a role that may, a membership that still holds, a protocol both speak: asked on every call."""

    async def admit(method: str, context: Any) -> None:
        who = caller(context)
        permit(method, who)
        check_protocol(str(who), user_agent(context))
        if not await still_member(who.id):
            raise AccessError(f"{who} is no longer a member", "join again with a token")

    return admit


def user_agent(context: Any) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == "user-agent" and isinstance(value, str):
            return value
    return ""


def check_protocol(peer: str, agent: str) -> None:
    """Raises VERSION_MISMATCH with the side to upgrade. Who does not say is a plain gRPC tool: let through."""
    if match := _PROTOCOL.search(agent):
        agreement = negotiate(peer, int(match[1]), int(match[2]))
        if agreement.protocol is None:
            raise Unreachable(agreement.reason, code=ErrorCode.VERSION_MISMATCH)


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps every handler of a server: admission before, errors mapped after."""

    def __init__(self, admit: Admit) -> None:
        self._admit = admit

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None:
            return None  # grpc answers UNIMPLEMENTED
        method: str = details.method
        if handler.response_streaming:
            make = grpc.stream_stream_rpc_method_handler
            behaviour = handler.stream_stream
            if not handler.request_streaming:
                make, behaviour = grpc.unary_stream_rpc_method_handler, handler.unary_stream
            wrapped = self._streaming(method, behaviour)
        else:
            make = grpc.stream_unary_rpc_method_handler
            behaviour = handler.stream_unary
            if not handler.request_streaming:
                make, behaviour = grpc.unary_unary_rpc_method_handler, handler.unary_unary
            wrapped = self._single(method, behaviour)
        return make(
            wrapped,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _single(self, method: str, behaviour: Any) -> Any:
        async def call(request: Any, context: Any) -> Any:
            async with _errors(method, context):
                await self._admit(method, context)
                return await behaviour(request, context)

        return call

    def _streaming(self, method: str, behaviour: Any) -> Any:
        async def call(request: Any, context: Any) -> None:
            async with _errors(method, context):
                await self._admit(method, context)
                answer = behaviour(request, context)
                if inspect.isawaitable(answer):
                    await answer  # the servicer writes by itself
                    return
                async with contextlib.aclosing(answer):
                    async for item in answer:
                        await context.write(item)

        return call


@contextlib.asynccontextmanager
async def _errors(method: str, context: Any) -> AsyncIterator[None]:
    try:
        yield
    except HiveError as error:
        await abort(context, error)
    except (grpc.aio.AbortError, asyncio.CancelledError):
        raise
    except Exception:
        incident = secrets.token_hex(4)
        _log.exception("incident %s in %s", incident, method)
        await abort(
            context,
            HiveError(
                f"the coordinator failed while answering {method.rpartition('/')[2]} (incident {incident})",
                f"look for incident {incident} in the coordinator's log and report it",
            ),
        )

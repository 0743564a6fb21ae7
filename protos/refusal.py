"""How a service says no: a HiveError as gRPC status, with code, message and hint in the trailing metadata.

Shared by everyone who serves; the way back is protos.dial.error_from. Refuses nothing; cuts what would not fit.
"""

from __future__ import annotations

import json
from typing import Any

import grpc

from protos.dial import ERROR_KEY
from protos.errors import TABLE, HiveError

_MAX_MESSAGE_CHARACTERS = 4000  # trailing metadata is bounded by the peer, 8 KiB at least
_MAX_HINT_CHARACTERS = 1000
_MAX_DETAILS_CHARACTERS = 2000
_MAX_STATUS_CHARACTERS = 300


async def abort(context: Any, error: HiveError) -> None:
    """End the call with this error. Raises grpc.aio.AbortError, always."""
    document = error.document()
    document["message"] = document["message"][:_MAX_MESSAGE_CHARACTERS]
    document["hint"] = document["hint"][:_MAX_HINT_CHARACTERS]
    if "details" in document:  # the end of a traceback says most
        document["details"] = document["details"][-_MAX_DETAILS_CHARACTERS:]
    encoded = json.dumps(document, ensure_ascii=False).encode(errors="replace")
    status = getattr(grpc.StatusCode, TABLE[error.code].grpc)
    await context.abort(status, error.message[:_MAX_STATUS_CHARACTERS], trailing_metadata=((ERROR_KEY, encoded),))

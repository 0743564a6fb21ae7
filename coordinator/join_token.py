"""The token in the command that `hive coordinator start` prints: one at a time, the same across restarts for a day.

Owns a private file with the secret, because the store keeps only its hash. Invariant: of these tokens at most one is
valid; whoever revokes it gets a new one at the next start.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from coordinator.records import TokenRecord
from coordinator.token_book import TokenBook
from protos.credentials import write_private
from protos.token import Role, secret_hash

FILE_NAME = "join-token.json"
_DAY_S = 86_400.0
_MARGIN_S = 3600.0  # what is printed is good for an hour at least


class JoinToken:
    def __init__(self, folder: Path, tokens: TokenBook, clock: Callable[[], float] = time.time) -> None:
        self._file = folder / FILE_NAME
        self._tokens = tokens
        self._clock = clock

    async def secret(self) -> str:
        """Of a token with which any number of nodes may join."""
        kept = self._kept()
        known = {token.secret_hash: token for token in await self._tokens.list()}
        record = known.get(secret_hash(kept)) if kept else None
        if kept and record is not None and self._good(record):
            return kept
        if record is not None and not record.revoked:
            await self._tokens.revoke(record.token_id)
        _, made = await self._tokens.create(Role.NODE, None, _DAY_S)
        write_private(self._file, json.dumps({"secret": made}).encode())
        return made

    def _good(self, token: TokenRecord) -> bool:
        lasts_s = token.expires_s - self._clock()
        return not token.revoked and token.uses_left is None and token.role == Role.NODE and lasts_s > _MARGIN_S

    def _kept(self) -> str:
        """Empty when there is none, or none that can be read."""
        try:
            secret = json.loads(self._file.read_bytes())["secret"]
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        return secret if isinstance(secret, str) else ""

"""Where the engines differ: how connections are opened, and what a full disk looks like.

SQLite: write-ahead log, synchronous FULL (a commit is on the disk before it is acknowledged), one write connection, a
few read connections. Any other SQLAlchemy URL (HIVE_DATABASE_URL) is opened as it is.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, pool

from protos.errors import Exhausted, HiveError, Unreachable

BUSY_TIMEOUT_MS = 10_000
READERS = 2
_PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=FULL",
    "foreign_keys=ON",
    f"busy_timeout={BUSY_TIMEOUT_MS}",
    f"journal_size_limit={64 * 1024 * 1024}",
    "trusted_schema=OFF",
)


@dataclass(frozen=True, slots=True)
class Engines:
    """`write` serves the one writer thread, `read` everyone else."""

    write: sa.Engine
    read: sa.Engine

    def dispose(self) -> None:
        self.read.dispose()
        self.write.dispose()


def open_engines(path: Path, url: str | None) -> Engines:
    if url is not None and not url.startswith("sqlite"):
        engine = sa.create_engine(url, pool_size=READERS + 1, max_overflow=0, pool_pre_ping=True)
        return Engines(engine, engine)
    address = url or f"sqlite:///{path}"
    return Engines(
        _sqlite(address, "BEGIN IMMEDIATE", poolclass=pool.StaticPool),
        _sqlite(address, "BEGIN", poolclass=pool.QueuePool, pool_size=READERS, max_overflow=0),
    )


def _sqlite(address: str, begin: str, **options: Any) -> sa.Engine:
    engine = sa.create_engine(address, connect_args={"check_same_thread": False}, **options)

    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver must not open transactions behind our back
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")

    def began(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", began)
    return engine


def disk_is_full(error: BaseException) -> bool:
    original = getattr(error, "orig", None) or error
    if isinstance(original, OSError):
        return original.errno in (errno.ENOSPC, errno.EDQUOT)
    return "database or disk is full" in str(original) or getattr(original, "sqlstate", "") == "53100"


def as_hive_error(error: BaseException, where: str) -> BaseException:
    """What a caller is told about a failure of the engine; anything that is not one is passed through."""
    if isinstance(error, HiveError) or not isinstance(error, (sa.exc.SQLAlchemyError, OSError)):
        return error
    if disk_is_full(error):
        return Exhausted(
            f"the disk with {where} is full: nothing was written",
            "free some space there; reserved space was given up so that this can be recorded",
        )
    reason = str(getattr(error, "orig", None) or error).splitlines()[0]
    if isinstance(error, sa.exc.OperationalError):
        return Unreachable(f"the database {where} cannot be used: {reason}", "see hive doctor")
    return HiveError(f"the database {where} refused a write: {reason}", "see hive doctor")

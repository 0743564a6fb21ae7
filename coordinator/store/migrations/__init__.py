"""Alembic revisions and how a database is brought to the newest one. They only go up: a newer database is refused."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from protos import version
from protos.errors import Conflict, ErrorCode

SOFTWARE_KEY = "software"  # in table meta: the hive that migrated this database last


def upgrade(engine: sa.Engine, where: str) -> None:
    """Create or migrate the schema in one transaction; raises Conflict for a database of a newer hive."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    with engine.begin() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        if current == scripts.get_current_head():
            return
        if current is not None and current not in {script.revision for script in scripts.walk_revisions()}:
            raise Conflict(
                f"{where} was written by hive {_software(connection)}, this is hive {version.SOFTWARE}",
                "upgrade hive on the coordinator, or give this one another home with HIVE_HOME",
                code=ErrorCode.VERSION_MISMATCH,
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        connection.execute(sa.text("DELETE FROM meta WHERE key = :key"), {"key": SOFTWARE_KEY})
        connection.execute(
            sa.text("INSERT INTO meta (key, value) VALUES (:key, :value)"),
            {"key": SOFTWARE_KEY, "value": version.SOFTWARE},
        )


def _software(connection: sa.Connection) -> str:
    query = sa.text("SELECT value FROM meta WHERE key = :key")
    return connection.execute(query, {"key": SOFTWARE_KEY}).scalar_one_or_none() or "of a newer version"

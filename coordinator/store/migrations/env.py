"""Run by Alembic: uses the connection and the transaction that `upgrade` opened."""

from __future__ import annotations

from alembic import context

from coordinator.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()

"""What a person does to the table, as events of the log: an import, and a reset.

Owns the form of both payloads and what they do to a table. An event holds all that it brings (contributions or ranks),
so that a table rebuilt from the log is the same as the one that saw it happen. An import of what is there already
changes nothing, whenever it is read.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from coordinator.store.protocol import SetMeta, Store
from qtable import ranks
from qtable.contribution import Contribution
from qtable.ranks import Ranks
from qtable.table import QTable

_ORIGIN = "qtable_origin"
IMPORT = "qtable_import"
RESET = "qtable_reset"


async def origin_of(store: Store) -> str:
    """The name of this log, made once and kept in its database: event numbers mean something together with it only."""
    if (known := await store.meta(_ORIGIN)) is not None:
        return known
    made = secrets.token_hex(16)
    await store.commit(SetMeta(_ORIGIN, made))
    return made


def table_import(
    contributions: Mapping[str, Contribution], cost_model_version: int, name: str, by: str
) -> dict[str, Any]:
    """The payload for another coordinator's table; `contributions` by origin."""
    return {
        "name": name,
        "by": by,
        "cost_model_version": cost_model_version,
        "contributions": {origin: {"seq": part.seq, **part.cells()} for origin, part in contributions.items()},
    }


def ranks_import(found: Ranks, name: str, by: str) -> dict[str, Any]:
    """The payload for an old table, of which the order of the actions counts and nothing else."""
    return {"name": name, "by": by, "ranks": {str(cell): list(row) for cell, row in found.items()}}


def take(table: QTable, payload: Mapping[str, Any]) -> int:
    """Apply an import; the number of contributions that were new. One of another cost model is passed over.

    Raises ValueError, KeyError or TypeError for a payload that this version cannot read; the table is then as before.
    """
    if "ranks" in payload:
        found = {int(cell): list(row) for cell, row in payload["ranks"].items()}
        return int(table.take(ranks.origin_of(found), ranks.contribution(found)))
    if int(payload["cost_model_version"]) != table.cost_model_version:
        return 0
    parts = {
        str(origin): Contribution.of_cells(int(part["seq"]), part) for origin, part in payload["contributions"].items()
    }
    table.check_room(parts)
    return sum(table.take(origin, part) for origin, part in parts.items())


__all__ = ["IMPORT", "RESET", "origin_of", "ranks_import", "table_import", "take"]

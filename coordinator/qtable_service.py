"""The QTable service: the learned table shown, exported, brought in from elsewhere, begun anew, rebuilt and judged.

gRPC in, documents of docs/json.md out. Whatever changes the table is an event in the log first, which the learner then
applies like any other, so a rebuild gives the same table. Who may call what is in coordinator/access.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from coordinator import qtable_events, qtable_import, qtable_replay, views
from coordinator.interceptors import caller
from coordinator.learning import Learner
from coordinator.qtable_decisions import evaluation, lines
from coordinator.store.protocol import AppendEvent, Store
from protos import limits
from protos.errors import Conflict, Exhausted
from protos.gen import jobs_pb2, qtable_pb2, qtable_pb2_grpc
from qtable import heat, ranks, snapshot
from qtable.contribution import Contribution
from qtable.policy import LEDGER_SHARE, Ledger
from qtable.table import QTable

_MOST_NAME_CHARACTERS = 200


@dataclass(slots=True)
class QTableService(qtable_pb2_grpc.QTableServicer):
    store: Store
    learner: Learner

    async def Show(self, request: qtable_pb2.QTableRequest, context: Any) -> jobs_pb2.Document:
        learner = self.learner
        table = learner.table
        parts = table.contributions()
        return _answer(
            qtable={
                "origin": table.origin,
                "cost_model_version": table.cost_model_version,
                "last_event_seq": table.last_seq,
                "ledger": _ledger(learner.ledger),
                "notes": learner.notes,
                "problem": learner.problem,
                "contributions": [
                    _contribution(origin, part, origin == table.origin) for origin, part in parts.items()
                ],
                "cells": list(heat.cells(table)),
            }
        )

    async def Export(self, request: qtable_pb2.QTableRequest, context: Any) -> jobs_pb2.Document:
        return _document(views.plain_json(snapshot.document(self.learner.table, self.learner.ledger)))

    async def Decisions(self, request: qtable_pb2.QTableRequest, context: Any) -> AsyncIterator[jobs_pb2.Document]:
        async for line in lines(self.store):
            yield jobs_pb2.Document(json=views.plain_json(line))

    async def Import(self, request: qtable_pb2.QTableImport, context: Any) -> jobs_pb2.Document:
        name, by = request.name[:_MOST_NAME_CHARACTERS], caller(context).id
        if qtable_import.is_document(request.content):
            table = await asyncio.to_thread(qtable_import.read_document, request.content)
            payload, brought = self._of_table(table, name, by)
        else:
            found = await qtable_import.read_pickle(request.content)
            origin = ranks.origin_of(found)
            part = ranks.contribution(found)
            brought = {origin: part} if self.learner.table.lacks(origin, part.seq) else {}
            payload = qtable_events.ranks_import(found, name, by)
        if brought:
            self._check_room(brought)
            await self.store.commit(AppendEvent(qtable_events.IMPORT, payload=payload))
            await self.learner.catch_up(self.store)
        said = [_contribution(origin, part, False) for origin, part in brought.items()]
        return _answer(imported={"name": name, "new": said, "last_event_seq": self.learner.table.last_seq})

    def _of_table(self, table: QTable, name: str, by: str) -> tuple[dict[str, Any], dict[str, Contribution]]:
        ours = self.learner.table
        if table.cost_model_version != ours.cost_model_version:
            raise Conflict(
                f"the table corrects predictions of cost model {table.cost_model_version}, "
                f"this coordinator predicts with {ours.cost_model_version}",
                "run the same version of hive on both sides, and export again",
            )
        brought = {origin: part for origin, part in table.contributions().items() if ours.lacks(origin, part.seq)}
        return qtable_events.table_import(brought, table.cost_model_version, name, by), brought

    def _check_room(self, brought: Mapping[str, Contribution]) -> None:
        try:
            self.learner.table.check_room(brought)
        except ValueError as error:
            raise Exhausted(str(error), "hive qtable reset forgets what was imported") from None

    async def Reset(self, request: qtable_pb2.QTableRequest, context: Any) -> jobs_pb2.Document:
        before = self.learner.table.contributions()
        forgotten = [
            _contribution(origin, part, origin == self.learner.table.origin) for origin, part in before.items()
        ]
        await self.store.commit(AppendEvent(qtable_events.RESET, payload={"by": caller(context).id}))
        await self.learner.catch_up(self.store)
        return _answer(reset={"forgotten": forgotten, "last_event_seq": self.learner.table.last_seq})

    async def Rebuild(self, request: qtable_pb2.QTableRequest, context: Any) -> jobs_pb2.Document:
        found = await qtable_replay.rebuild(self.learner, self.store)
        return _answer(
            rebuilt={
                "equal": not found.differs,
                "differs": list(found.differs),
                "events": found.events,
                "last_event_seq": found.last_seq,
                "problem": self.learner.problem,
            }
        )

    async def Evaluate(self, request: qtable_pb2.QTableRequest, context: Any) -> jobs_pb2.Document:
        await self.learner.catch_up(self.store)
        summary = await evaluation(self.learner, self.store)
        return _answer(evaluation={**summary, "ledger": _ledger(self.learner.ledger)})


def _ledger(ledger: Ledger) -> dict[str, Any]:
    share = ledger.loss_s / ledger.job_s if ledger.job_s > 0 else None
    return {"job_s": ledger.job_s, "loss_s": ledger.loss_s, "share": share, "limit": LEDGER_SHARE}


def _contribution(origin: str, part: Contribution, own: bool) -> dict[str, Any]:
    cells = int((part.n > 0).any(axis=-1).sum())
    return {"origin": origin, "own": own, "seq": part.seq, "visits": part.visits, "cells": cells}


def _answer(**content: Any) -> jobs_pb2.Document:
    return _document(views.document(**content))


def _document(content: bytes) -> jobs_pb2.Document:
    if len(content) > limits.MAX_MESSAGE_BYTES - 64 * 1024:
        raise Exhausted(f"the answer has {len(content)} bytes, over the limit of a message", "import less at a time")
    return jobs_pb2.Document(json=content)


__all__ = ["QTableService"]

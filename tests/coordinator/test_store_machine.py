"""Random commits, legal and not, against the memory store and SQLite: both must answer the same, always."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from coordinator.records import Attempt, Job, Member, TokenRecord
from coordinator.store.memory import MemoryStore
from coordinator.store.protocol import (
    Accept,
    AppendEvent,
    PutAttempt,
    PutJob,
    PutMember,
    PutToken,
    SetMeta,
    Store,
    UseToken,
    Write,
)
from coordinator.store.sqlite import SqliteStore
from protos.errors import HiveError
from protos.ids import Fence, JobId, NodeId
from protos.states import AttemptState, Eligibility, JobState, NodeLink, Reason

JOBS = st.sampled_from([JobId("j-1"), JobId("j-2"), JobId("j-3")])
NODES = st.sampled_from([NodeId("n-1"), NodeId("n-2")])
VERSIONS = st.sampled_from([None, 1, 1, 2, 2, 3])
KEYS = st.sampled_from(["a", "b"])
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)

jobs = st.builds(
    Job,
    JOBS,
    TEXT,
    KEYS,
    st.sampled_from([JobState.SUBMITTED, JobState.PLANNING, JobState.QUEUED, JobState.FAILED]),
    st.sampled_from(Reason),
    st.binary(max_size=4),
    st.floats(0, 9),
    st.floats(0, 9),
    fence=st.sampled_from([Fence(0), Fence(1)]),
    idempotency_key=st.sampled_from([None, None, "k"]),
)
attempts = st.builds(
    Attempt,
    JOBS,
    st.just(Fence(1)),
    st.integers(0, 1),
    NODES,
    st.sampled_from(AttemptState),
    st.just(1.0),
    st.just(1.0),
)
members = st.builds(Member, NODES, TEXT, KEYS, st.sampled_from(NodeLink), st.sampled_from(Eligibility), st.floats(0, 9))
tokens = st.builds(
    TokenRecord, KEYS, KEYS, KEYS, st.sampled_from([None, 0, 2]), st.just(5.0), st.floats(0, 9), st.booleans()
)
payloads = st.dictionaries(TEXT, st.none() | st.integers(-9, 9) | st.floats() | TEXT, max_size=2)
writes: st.SearchStrategy[Write] = st.one_of(
    st.builds(PutJob, jobs, VERSIONS),
    st.builds(PutAttempt, attempts, VERSIONS),
    st.builds(PutMember, members, VERSIONS),
    st.builds(PutToken, tokens),
    st.builds(UseToken, KEYS, st.sampled_from([1.0, 9.0]), KEYS),
    st.builds(AppendEvent, KEYS, st.none() | JOBS, st.none() | NODES, payloads),
    st.builds(Accept, NODES, KEYS, st.integers(1, 5)),
    st.builds(SetMeta, KEYS, TEXT),
)


async def answer(store: Store, batch: list[Write]) -> object:
    try:
        return await store.commit(*batch)
    except HiveError as error:
        return type(error), error.code, error.message


async def everything(store: Store) -> list[object]:
    return [
        await store.jobs(),
        await store.jobs([JobState.QUEUED, JobState.FAILED], limit=1),
        [await store.attempts(job_id) for job_id in ("j-1", "j-2", "j-3")],  # type: ignore[arg-type]
        await store.job_by_idempotency_key("k"),
        await store.members(),
        await store.tokens(),
        await store.token_by_hash("a"),
        await store.events(),
        await store.events(after_seq=1, job_id=JobId("j-1"), kinds=["a"], limit=2),
        [await store.accepted(node, key) for node in ("n-1", "n-2") for key in "ab"],  # type: ignore[arg-type]
        [await store.meta(key) for key in "ab"],
        store.last_seq,
        await store.verify_chain(),
    ]


class StoresAgree(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.memory = MemoryStore(clock=lambda: 3.0)
        self.disk = self.open()

    def open(self) -> SqliteStore:
        return self.runner.run(SqliteStore.open(Path(self.folder.name), clock=lambda: 3.0))

    @rule(batch=st.lists(writes, min_size=1, max_size=4))
    def commit(self, batch: list[Write]) -> None:
        assert self.runner.run(answer(self.memory, batch)) == self.runner.run(answer(self.disk, batch))

    @rule()
    def restart(self) -> None:
        self.runner.run(self.disk.close())
        self.disk = self.open()

    @invariant()
    def same(self) -> None:
        assert self.runner.run(everything(self.memory)) == self.runner.run(everything(self.disk))

    def teardown(self) -> None:
        self.runner.run(self.disk.close())
        self.runner.close()
        self.folder.cleanup()


def test_memory_and_sqlite_answer_the_same() -> None:
    run_state_machine_as_test(
        StoresAgree,
        settings=settings(
            max_examples=12, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )

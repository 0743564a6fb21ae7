"""One promise, every engine: the same class runs against memory and SQLite (and PostgreSQL when its URL is given)."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from coordinator.records import Attempt, Job, Member, TokenRecord
from coordinator.store.memory import MemoryStore
from coordinator.store.protocol import (
    Accept,
    AppendEvent,
    Duplicate,
    PutAttempt,
    PutJob,
    PutMember,
    PutToken,
    SetMeta,
    Store,
    UseToken,
)
from coordinator.store.schema import metadata
from coordinator.store.sqlite import SqliteStore
from protos.errors import AccessError, Conflict, ErrorCode, NotFound
from protos.ids import Fence, JobId, NodeId
from protos.states import AttemptState, Eligibility, JobState, NodeLink, Reason

POSTGRES = os.environ.get("HIVE_TEST_DATABASE_URL")
ENGINES = ["memory", "sqlite"] + (["postgresql"] if POSTGRES else [])


def a_job(job_id: str = "j-1", state: JobState = JobState.SUBMITTED, created_s: float = 1.0, **more: object) -> Job:
    job = Job(JobId(job_id), "digits", "ada", state, Reason.NONE, b"{}", created_s, created_s)
    return replace(job, **more)  # type: ignore[arg-type]


def an_attempt(job_id: str = "j-1", fence: int = 1, rank: int = 0) -> Attempt:
    return Attempt(JobId(job_id), Fence(fence), rank, NodeId("n-1"), AttemptState.OFFERED, 1.0, 1.0)


def a_member(node_id: str = "n-1") -> Member:
    return Member(NodeId(node_id), "lab-1", "node", NodeLink.JOINING, Eligibility.OK, 1.0)


def a_token(token_id: str = "t-1", uses_left: int | None = 2, expires_s: float = 100.0) -> TokenRecord:
    return TokenRecord(token_id, f"hash of {token_id}", "node", uses_left, expires_s, 1.0)


async def open_store(engine: str, folder: Path) -> Store:
    if engine == "memory":
        return MemoryStore(clock=lambda: 7.0)
    if engine == "postgresql":
        assert POSTGRES is not None
        database = sa.create_engine(POSTGRES)
        metadata.drop_all(database)
        with database.begin() as connection:
            connection.execute(sa.text("DROP TABLE IF EXISTS alembic_version"))
        database.dispose()
        return await SqliteStore.open(folder, POSTGRES, clock=lambda: 7.0)
    return await SqliteStore.open(folder, clock=lambda: 7.0)


@pytest.mark.parametrize("engine", ENGINES)
class TestStore:
    def run(self, engine: str, folder: Path, body: Callable[[Store], Awaitable[None]]) -> None:
        async def main() -> None:
            store = await open_store(engine, folder)
            try:
                async with asyncio.timeout(60):
                    await body(store)
            finally:
                await store.close()

        asyncio.run(main())

    def test_a_row_reads_back_as_it_was_written(self, engine: str, tmp_path: Path) -> None:
        async def body(store: Store) -> None:
            job = a_job(spec_json=b'{"name": "\xc3\xa9"}', fence=Fence(3), samples=2**40, idempotency_key="k")
            member = replace(a_member(), capacity_json=b"{}", left=True)
            await store.commit(PutJob(job), PutAttempt(an_attempt()), PutMember(member), PutToken(a_token()))
            assert await store.job(job.job_id) == replace(job, version=1)
            assert await store.job_by_idempotency_key("k") == replace(job, version=1)
            assert await store.attempts(job.job_id) == (replace(an_attempt(), version=1),)
            assert await store.member(member.node_id) == replace(member, version=1)
            assert await store.members() == (replace(member, version=1),)
            assert await store.tokens() == (a_token(),)
            assert await store.token_by_hash("hash of t-1") == a_token()

        self.run(engine, tmp_path, body)

    def test_what_is_not_there_reads_as_nothing(self, engine: str, tmp_path: Path) -> None:
        async def body(store: Store) -> None:
            assert await store.job(JobId("j-x")) is None
            assert await store.job_by_idempotency_key("x") is None
            assert await store.member(NodeId("n-x")) is None
            assert await store.token_by_hash("x") is None
            assert await store.meta("x") is None
            assert await store.attempts(JobId("j-x")) == ()
            assert await store.accepted(NodeId("n-x"), "s-x") == 0
            assert await store.events() == ()
            assert store.last_seq == 0

        self.run(engine, tmp_path, body)

    def test_a_failing_commit_leaves_nothing_behind(self, engine: str, tmp_path: Path) -> None:
        async def body(store: Store) -> None:
            await store.commit(PutJob(a_job()), SetMeta("k", "before"), Accept(NodeId("n-1"), "s", 5))
            with pytest.raises(Conflict):
                await store.commit(
                    SetMeta("k", "after"),
                    AppendEvent("x"),
                    PutJob(a_job("j-2", idempotency_key="new")),
                    Accept(NodeId("n-1"), "s", 6),
                    PutJob(a_job("j-1")),
                )
            assert await store.meta("k") == "before"
            assert await store.events() == ()
            assert await store.job(JobId("j-2")) is None
            assert await store.job_by_idempotency_key("new") is None
            assert await store.accepted(NodeId("n-1"), "s") == 5
            (event,) = await store.commit(AppendEvent("y"))
            assert event.seq == 1

        self.run(engine, tmp_path, body)

    def test_of_concurrent_swaps_exactly_one_wins(self, engine: str, tmp_path: Path) -> None:
        async def body(store: Store) -> None:
            await store.commit(PutJob(a_job()))

            async def swap(number: int) -> int | None:
                try:
                    await store.commit(PutJob(a_job(message=str(number)), 1), AppendEvent("won"))
                    return number
                except Conflict:
                    return None

            winners = [n for n in await asyncio.gather(*map(swap, range(50))) if n is not None]
            job = await store.job(JobId("j-1"))
            assert job is not None and job.version == 2 and [job.message] == [str(n) for n in winners]
            assert len(await store.events()) == 1

        self.run(engine, tmp_path, body)

    def test_five_hundred_concurrent_commits_are_all_there_in_order(self, engine: str, tmp_path: Path) -> None:
        async def body(store: Store) -> None:
            async def put(number: int) -> int:
                job = a_job(f"j-{number}", created_s=float(number))
                (event,) = await store.commit(PutJob(job), AppendEvent("made", job.job_id))
                return event.seq

            seqs = await asyncio.gather(*map(put, range(500)))
            assert sorted(seqs) == list(range(1, 501))
            assert [job.job_id for job in await store.jobs(limit=3)] == ["j-499", "j-498", "j-497"]
            assert [event.seq for event in await store.events(after_seq=490)] == list(range(491, 501))
            assert (await store.verify_chain()).broken_at is None

        self.run(engine, tmp_path, body)

    def test_an_illegal_transition_is_refused(self, engine: str, tmp_path: Path) -> None:
        async def body(store: Store) -> None:
            await store.commit(PutJob(a_job()), PutAttempt(an_attempt()), PutMember(a_member()))
            with pytest.raises(Conflict, match="SUBMITTED and cannot become RUNNING"):
                await store.commit(PutJob(a_job(state=JobState.RUNNING), 1))
            await store.commit(PutAttempt(replace(an_attempt(), state=AttemptState.LOST), 1))
            with pytest.raises(Conflict, match="LOST and cannot become DONE"):
                await store.commit(PutAttempt(replace(an_attempt(), state=AttemptState.DONE), 2))
            with pytest.raises(Conflict, match="JOINING and cannot become DISCONNECTED"):
                await store.commit(PutMember(replace(a_member(), link=NodeLink.DISCONNECTED), 1))

        self.run(engine, tmp_path, body)

    def test_a_fence_never_falls(self, engine: str, tmp_path: Path) -> None:
        async def body(store: Store) -> None:
            await store.commit(PutJob(a_job(fence=Fence(4))))
            with pytest.raises(Conflict) as refused:
                await store.commit(PutJob(a_job(fence=Fence(3)), 1))
            assert refused.value.code is ErrorCode.STALE_FENCE

        self.run(engine, tmp_path, body)

    def test_an_attempt_needs_its_job(self, engine: str, tmp_path: Path) -> None:
        async def body(store: Store) -> None:
            with pytest.raises(NotFound):
                await store.commit(PutAttempt(an_attempt("j-none")))

        self.run(engine, tmp_path, body)

    def test_an_idempotency_key_belongs_to_one_job_for_good(self, engine: str, tmp_path: Path) -> None:
        async def body(store: Store) -> None:
            await store.commit(PutJob(a_job(idempotency_key="k")))
            with pytest.raises(Conflict, match="already belongs to job j-1"):
                await store.commit(PutJob(a_job("j-2", idempotency_key="k")))
            with pytest.raises(Conflict, match="cannot change"):
                await store.commit(PutJob(a_job(idempotency_key="other"), 1))

        self.run(engine, tmp_path, body)

    def test_a_spool_message_counts_once(self, engine: str, tmp_path: Path) -> None:
        async def body(store: Store) -> None:
            node, other = NodeId("n-1"), NodeId("n-2")
            await store.commit(Accept(node, "s", 3), AppendEvent("progress"))
            for seq in (1, 3):
                with pytest.raises(Duplicate):
                    await store.commit(AppendEvent("progress"), Accept(node, "s", seq))
            await store.commit(Accept(node, "s", 4), Accept(node, "s-new", 1), Accept(other, "s", 1))
            assert [await store.accepted(node, "s"), await store.accepted(node, "s-new")] == [4, 1]
            assert len(await store.events()) == 1

        self.run(engine, tmp_path, body)

    def test_a_token_is_refused_with_the_reason(self, engine: str, tmp_path: Path) -> None:
        async def body(store: Store) -> None:
            endless = a_token("t-2", uses_left=None)
            revoked = replace(a_token("t-3"), revoked=True)
            await store.commit(PutToken(a_token(uses_left=1)), PutToken(endless), PutToken(revoked))
            await store.commit(UseToken("hash of t-1", 50.0, "key-1"))
            for number in range(3):
                await store.commit(UseToken("hash of t-2", 50.0, f"key-{number}"))
            cases = [
                ("hash of t-1", 50.0, "used up"),
                ("hash of t-3", 50.0, "revoked"),
                ("nobody's", 50.0, "not known"),
                ("hash of t-2", 400.0, "expired 5 minutes ago"),
            ]
            for secret_hash, now, sentence in cases:
                with pytest.raises(AccessError, match=sentence) as refused:
                    await store.commit(UseToken(secret_hash, now, "key-new"))
                assert "hive token create" in refused.value.hint
            with pytest.raises(Conflict, match="same secret"):
                await store.commit(PutToken(replace(a_token("t-9"), secret_hash="hash of t-1")))

        self.run(engine, tmp_path, body)

    def test_one_use_is_given_to_one_of_many(self, engine: str, tmp_path: Path) -> None:
        async def body(store: Store) -> None:
            await store.commit(PutToken(a_token(uses_left=3)))
            uses = (store.commit(UseToken("hash of t-1", 1.0, f"key-{number}")) for number in range(20))
            results = await asyncio.gather(*uses, return_exceptions=True)
            assert sum(isinstance(result, tuple) for result in results) == 3

        self.run(engine, tmp_path, body)

    def test_the_same_key_uses_a_token_once_however_often_it_asks(self, engine: str, tmp_path: Path) -> None:
        async def body(store: Store) -> None:
            await store.commit(PutToken(a_token(uses_left=1)))
            for now in (50.0, 60.0, 400.0):
                await store.commit(UseToken("hash of t-1", now, "key"))
            token = await store.token_by_hash("hash of t-1")
            assert token is not None and token.uses_left == 0
            await store.commit(PutToken(replace(token, revoked=True)))
            with pytest.raises(AccessError, match="revoked"):
                await store.commit(UseToken("hash of t-1", 60.0, "key"))

        self.run(engine, tmp_path, body)

    def test_events_are_filtered_and_paged(self, engine: str, tmp_path: Path) -> None:
        async def body(store: Store) -> None:
            for number in range(10):
                kind = "odd" if number % 2 else "even"
                await store.commit(AppendEvent(kind, JobId(f"j-{number % 3}"), NodeId("n"), {"loss": float("nan")}))
            assert [e.seq for e in await store.events(kinds=["odd"], limit=2)] == [2, 4]
            assert [e.seq for e in await store.events(after_seq=4, job_id=JobId("j-0"))] == [7, 10]
            (event,) = await store.events(after_seq=9)
            assert json.loads(event.payload_json) == {"loss": None}
            assert (event.time_s, event.node_id) == (7.0, "n")
            assert await store.events(kinds=[]) == ()
            assert await store.events(after_seq=99) == ()

        self.run(engine, tmp_path, body)

    def test_a_follower_wakes_for_its_events_and_misses_none(self, engine: str, tmp_path: Path) -> None:
        async def body(store: Store) -> None:
            seen: list[int] = []

            async def follow() -> None:
                after = 0
                while len(seen) < 20:
                    found = await store.events_after(after, 30.0, kinds=["mine"])
                    seen.extend(event.seq for event in found)
                    after = found[-1].seq

            async with asyncio.TaskGroup() as group:
                group.create_task(follow())
                for _ in range(20):
                    await store.commit(AppendEvent("other"), AppendEvent("mine"))
            assert seen == list(range(2, 41, 2))
            assert await store.events_after(40, 0.01) == ()

        self.run(engine, tmp_path, body)

    def test_jobs_are_listed_by_state_newest_first(self, engine: str, tmp_path: Path) -> None:
        async def body(store: Store) -> None:
            for number, state in enumerate([JobState.QUEUED, JobState.FAILED, JobState.QUEUED]):
                await store.commit(PutJob(a_job(f"j-{number}", state, float(number))))
            assert [job.job_id for job in await store.jobs([JobState.QUEUED])] == ["j-2", "j-0"]
            assert [job.job_id for job in await store.jobs(limit=2)] == ["j-2", "j-1"]
            assert await store.jobs([]) == ()

        self.run(engine, tmp_path, body)

    def test_attempts_are_listed_by_generation(self, engine: str, tmp_path: Path) -> None:
        async def body(store: Store) -> None:
            await store.commit(PutJob(a_job()))
            for fence, rank in [(2, 1), (1, 0), (2, 0)]:
                await store.commit(PutAttempt(an_attempt(fence=fence, rank=rank)))
            listed = await store.attempts(JobId("j-1"))
            assert [(a.fence, a.rank) for a in listed] == [(1, 0), (2, 0), (2, 1)]
            assert [a.rank for a in await store.attempts(JobId("j-1"), Fence(2))] == [0, 1]

        self.run(engine, tmp_path, body)

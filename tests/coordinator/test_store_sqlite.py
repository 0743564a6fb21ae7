"""What only a database on a disk can promise: restarts, locks, migrations, full disks, damage."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from coordinator.records import Job
from coordinator.store import migrations
from coordinator.store.chain import Head
from coordinator.store.engine import open_engines
from coordinator.store.home_lock import HomeLock
from coordinator.store.protocol import Accept, AppendEvent, PutJob, SetMeta
from coordinator.store.schema import metadata
from coordinator.store.sqlite import DATABASE, SqliteStore
from coordinator.store.writer import Writer
from protos.errors import Conflict, ErrorCode, Exhausted, HiveError
from protos.ids import JobId, NodeId
from protos.reserve import Reserve
from protos.states import JobState, Reason

JOB = Job(JobId("j-1"), "digits", "ada", JobState.SUBMITTED, Reason.NONE, b"{}", 1.0, 1.0)


def test_a_restart_keeps_everything_and_goes_on_counting(tmp_path: Path) -> None:
    async def main() -> None:
        store = await SqliteStore.open(tmp_path)
        await store.commit(
            PutJob(JOB), AppendEvent("a"), AppendEvent("b"), Accept(NodeId("n"), "s", 9), SetMeta("k", "v")
        )
        await store.close()
        again = await SqliteStore.open(tmp_path)
        job = await again.job(JOB.job_id)
        assert job is not None and job.version == 1
        assert (again.last_seq, await again.accepted(NodeId("n"), "s"), await again.meta("k")) == (2, 9, "v")
        (event,) = await again.commit(AppendEvent("c"))
        assert event.seq == 3
        assert (await again.verify_chain()).broken_at is None
        await again.close()

    asyncio.run(main())


def test_a_second_coordinator_on_the_same_home_is_told_who_is_there(tmp_path: Path) -> None:
    async def main() -> None:
        store = await SqliteStore.open(tmp_path)
        with pytest.raises(Conflict, match=f"already running with pid {os.getpid()} "):
            await SqliteStore.open(tmp_path)
        await store.close()
        await (await SqliteStore.open(tmp_path)).close()

    asyncio.run(main())


def test_a_home_is_free_again_when_its_process_was_killed(tmp_path: Path) -> None:
    imports = "from pathlib import Path; from coordinator.store.home_lock import HomeLock"
    program = f"{imports}; lock = HomeLock(Path({str(tmp_path)!r})); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with pytest.raises(Conflict, match=f"pid {child.pid} "):
            HomeLock(tmp_path)
        child.kill()
        child.wait()
        HomeLock(tmp_path).release()


def test_a_database_of_a_newer_hive_is_refused_with_what_to_upgrade(tmp_path: Path) -> None:
    async def main() -> None:
        await (await SqliteStore.open(tmp_path)).close()
        with closing(sqlite3.connect(tmp_path / DATABASE)) as connection, connection:
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
            connection.execute("UPDATE meta SET value = '7.0.0' WHERE key = 'software'")
        with pytest.raises(Conflict, match=r"written by hive 7\.0\.0, this is hive 0") as refused:
            await SqliteStore.open(tmp_path)
        assert refused.value.code is ErrorCode.VERSION_MISMATCH
        assert "upgrade hive on the coordinator" in refused.value.hint

    asyncio.run(main())


def test_migrations_give_exactly_the_schema_in_the_code(tmp_path: Path) -> None:
    engines = open_engines(tmp_path / DATABASE, None)
    migrations.upgrade(engines.write, "here")
    migrations.upgrade(engines.write, "here")
    with engines.read.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engines.dispose()


def test_a_file_that_is_no_database_gives_a_sentence(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"not a database, but long enough to be taken for one" * 100)
    with pytest.raises(HiveError, match="file is not a database"):
        asyncio.run(SqliteStore.open(tmp_path))
    HomeLock(tmp_path).release()


def test_one_commit_that_the_engine_refuses_does_not_hurt_the_others(tmp_path: Path) -> None:
    async def main() -> None:
        store = await SqliteStore.open(tmp_path)
        commits = [store.commit(AppendEvent(f"kind {n}")) for n in range(20)]
        unstorable = store.commit(AppendEvent("x"), SetMeta("lone surrogate", "\ud800"))
        *good, bad = await asyncio.gather(*commits, unstorable, return_exceptions=True)
        assert isinstance(bad, Exception)
        assert all(isinstance(result, tuple) for result in good)
        assert store.last_seq == 20
        await store.close()

    asyncio.run(main())


def test_cancelled_commits_happen_wholly_or_not_at_all_and_followers_see_those_that_did(tmp_path: Path) -> None:
    async def main() -> None:
        store = await SqliteStore.open(tmp_path)
        waiting = [asyncio.ensure_future(store.commit(AppendEvent("a"), SetMeta(f"{n}", "x"))) for n in range(200)]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for commit in waiting[::2]:
            commit.cancel()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        await store.commit(AppendEvent("last"))
        events = await store.events_after(0, 30.0, limit=1000)
        happened = [n for n in range(200) if await store.meta(f"{n}") == "x"]
        assert len(happened) == len(events) - 1 == store.last_seq - 1
        assert {n for n, result in enumerate(results) if isinstance(result, tuple)} <= set(happened)
        await store.close()
        with pytest.raises(Conflict, match="closed"):
            await store.commit(AppendEvent("b"))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("damage", "broken_at"),
    [
        ("UPDATE events SET payload_json = x'7b7d20' WHERE seq = 4", 4),
        ("UPDATE events SET job_id = 'j-other' WHERE seq = 2", 2),
        ("DELETE FROM events WHERE seq = 3", 3),
        ("DELETE FROM events WHERE seq = 5", 5),
    ],
)
def test_damage_to_the_event_log_is_found(damage: str, broken_at: int, tmp_path: Path) -> None:
    async def main() -> None:
        store = await SqliteStore.open(tmp_path)
        for number in range(5):
            await store.commit(AppendEvent("a", payload={"n": number}))
        await store.close()
        with closing(sqlite3.connect(tmp_path / DATABASE)) as connection, connection:
            connection.execute(damage)
        again = await SqliteStore.open(tmp_path)
        check = await again.verify_chain()
        await again.close()
        assert check.broken_at == broken_at
        assert str(broken_at) in check.message

    asyncio.run(main())


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[tuple[Writer, sa.Engine, Reserve]]:
    engines = open_engines(tmp_path / DATABASE, None)
    migrations.upgrade(engines.write, "here")
    reserve = Reserve(tmp_path / "reserve", 1024 * 1024)
    assert reserve.take()
    writer = Writer(engines.write, Head(), reserve, lambda: 1.0, "here")
    yield writer, engines.write, reserve
    writer.stop()
    engines.dispose()


def test_a_full_disk_gives_up_the_reserve_and_the_failure_can_be_recorded(
    writer: tuple[Writer, sa.Engine, Reserve],
) -> None:
    thread, engine, reserve = writer
    with engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 40")
    thread.start()
    with pytest.raises(Exhausted, match="disk with here is full") as full:
        for number in range(100):
            thread.submit([AppendEvent("big", payload={"x": "x" * 8192, "n": number})]).result(30)
    assert "free some space" in full.value.hint
    assert not reserve.held
    stored = thread.head.seq
    with engine.begin() as connection:  # what the freed reserve gives
        connection.exec_driver_sql("PRAGMA max_page_count = 400")
    (event,) = thread.submit([AppendEvent("job failed: disk full")]).result(30)
    assert event.seq == stored + 1


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a small disk")
def test_on_a_disk_that_is_really_full_the_failure_is_recorded(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")

    async def main() -> None:
        store = await SqliteStore.open(tmp_path)
        with pytest.raises(Exhausted):
            while True:
                await store.commit(AppendEvent("big", payload={"x": "x" * 256 * 1024}))
        (event,) = await store.commit(AppendEvent("job failed: disk full"))
        await store.close()
        again = await SqliteStore.open(tmp_path)
        assert again.last_seq == event.seq
        assert (await again.verify_chain()).broken_at is None
        await again.close()

    try:
        asyncio.run(main())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_reserve_that_does_not_fit_is_not_taken(tmp_path: Path) -> None:
    assert not Reserve(tmp_path / "reserve", 1 << 60).take()
    assert not (tmp_path / "reserve").exists()


def test_a_full_disk_is_recognised_however_it_is_reported() -> None:
    from coordinator.store.engine import as_hive_error

    assert isinstance(as_hive_error(OSError(errno.ENOSPC, "no space"), "here"), Exhausted)
    full = sa.exc.OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))
    assert isinstance(as_hive_error(full, "here"), Exhausted)
    locked = sa.exc.OperationalError("INSERT", {}, sqlite3.OperationalError("database is locked"))
    assert "database is locked" in str(as_hive_error(locked, "here"))


def test_killed_while_it_commits_the_store_loses_nothing_acknowledged() -> None:
    from bench.store_kill import run

    result = run(rounds=3, seed=1)
    assert result["acknowledged"] >= 3
    assert (result["lost"], result["damaged"]) == (0, 0)

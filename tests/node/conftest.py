"""Fixtures of the node's room."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from node_bench import Bench, MakeBench

from node.cpu_limit import CpuLimit, NoLimit
from node.limits import Caps
from node.runner import Runner


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeBench:
    """`async with bench(memory_bytes=..., ...) as b:` a runner over tests/node/worker_entries.py, closed at the end."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    @asynccontextmanager
    async def make(
        caps: Caps | None = None,
        cpu_limit: CpuLimit | None = None,
        idle_s: float = 600.0,
        entry: str = "worker_entries:run",
    ) -> AsyncIterator[Bench]:
        limit = cpu_limit or NoLimit("not limited in this test")
        runner = Runner(caps or Caps(), tmp_path, limit, entry=entry, idle_s=idle_s)
        try:
            yield Bench(runner, tmp_path)
        finally:
            await runner.close()

    return make

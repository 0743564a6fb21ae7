"""What the coordinator keeps per job outside the database: per-step metrics and the ranks' output.

Append-only text below HIVE_HOME/coordinator/jobs/JOB. A record may be appended twice when a node repeats a message the
coordinator could not acknowledge; readers keep the last record of each (stage, step).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from protos import documents
from protos.errors import HiveError
from protos.ids import JobId
from protos.work import Metrics

RECENT_BYTES = 256 * 1024
MAX_LOG_BYTES = 64 * 1024 * 1024
ALL_RANKS = -1  # the ranks' output as it came, each line with its rank


class JobFolders:
    def __init__(self, root: Path) -> None:
        self._root = root
        self.changed = asyncio.Event()  # set, and replaced by a fresh one, whenever output arrives

    def folder(self, job_id: JobId) -> Path:
        """Made on first use. Ids are our own alphabet, so they are safe as names."""
        folder = self._root / job_id
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def append_metrics(self, job_id: JobId, metrics: Iterable[Metrics]) -> None:
        lines = b"".join(documents.encode(record) + b"\n" for record in metrics)  # a loss that is no number is null
        self._append(self.folder(job_id) / "metrics.jsonl", lines)

    def append_log(self, job_id: JobId, rank: int, lines: Iterable[str]) -> None:
        """Up to MAX_LOG_BYTES per rank; then one line says that the rest was dropped."""
        path = self.log_path(job_id, rank)
        size = path.stat().st_size if path.exists() else 0
        if size >= MAX_LOG_BYTES:
            return
        lines = [line.rstrip("\n") for line in lines]
        text = "".join(line + "\n" for line in lines)
        if size + len(text.encode()) >= MAX_LOG_BYTES:
            text += "... output over the limit was dropped from here on\n"
        self._append(path, text.encode())
        if rank != ALL_RANKS:
            self.append_log(job_id, ALL_RANKS, [f"[rank {rank}] {line}" for line in lines])
            self.changed.set()
            self.changed = asyncio.Event()

    def log_path(self, job_id: JobId, rank: int) -> Path:
        return self.folder(job_id) / ("all.log" if rank == ALL_RANKS else f"rank-{rank}.log")

    def metrics(self, job_id: JobId, after_step: int = 0) -> list[dict[str, Any]]:
        """Records in order of step, each (stage, step) once, the last written one counting."""
        path = self.folder(job_id) / "metrics.jsonl"
        if not path.exists():
            return []
        kept: dict[tuple[str, int], dict[str, Any]] = {}
        with path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # torn by a kill; its message was not acknowledged and comes again
                if record["step"] > after_step:
                    kept[(record["stage"], record["step"])] = record
        return sorted(kept.values(), key=lambda record: (record["step"], record["stage"] != "train"))

    def recent_metrics(self, job_id: JobId, after_step: int) -> list[Metrics]:
        """The newest records beyond `after_step`, in order, however long the job is: its last RECENT_BYTES."""
        path = self.folder(job_id) / "metrics.jsonl"
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - RECENT_BYTES))
            lines = file.read().split(b"\n")
        kept: dict[tuple[int, bool], Metrics] = {}
        for line in lines:
            with contextlib.suppress(ValueError, HiveError):  # cut at the beginning, or torn by a kill
                record = documents.decode(Metrics, line)
                if record.step > after_step:
                    kept[record.step, record.stage != "train"] = record
        return [kept[key] for key in sorted(kept)]

    @staticmethod
    def _append(path: Path, content: bytes) -> None:
        """One write call, and a torn last line of an earlier process is ended first."""
        with path.open("ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    content = b"\n" + content
            file.write(content)

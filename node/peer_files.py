"""What this node can give to its peers: blobs of its cache, and files of a job's checkpoints that lie on its disk.

Owns finding a file by digest. Refuses links and anything that is not a plain file: user code wrote the checkpoint
folders. That a peer may have the digest at all is the roster's to say. Methods block: call them in a thread.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from node.cache import BlobCache
from node.known_files import KnownFiles
from node.workspace import Workspaces
from protos.artifact import check_digest
from protos.errors import NotFound, SpecError
from protos.ids import Digest, JobId

_MAX_CHECKPOINT_FILES = 1024


class PeerFiles:
    def __init__(self, cache: BlobCache, workspaces: Workspaces) -> None:
        self._cache = cache
        self._workspaces = workspaces
        self._known = KnownFiles()

    def open(self, digest: str, subject: str) -> tuple[BinaryIO, int]:
        """The file and its size; it stays readable when the cache lets go of it. Raises NotFound, or SpecError."""
        checked = check_digest(digest)
        for path in self._candidates(checked, subject):
            with contextlib.suppress(OSError):  # it went away meanwhile, or is a link
                file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0)
                status = os.fstat(file.fileno())
                if stat.S_ISREG(status.st_mode):
                    return file, status.st_size
                file.close()
        raise NotFound(f"{digest} is not on this node", "ask another member, or the coordinator")

    def _candidates(self, digest: Digest, subject: str) -> Iterator[Path]:
        if (blob := self._cache.held(digest)) is not None:
            yield blob
        for path in self._checkpoint_files(subject):
            if self._known.digest(path) == digest:
                yield path

    def _checkpoint_files(self, subject: str) -> list[Path]:
        try:
            folder = self._workspaces.checkpoint_dir(JobId(subject)).resolve()
        except SpecError:  # not a job
            return []
        below = (*folder.glob("step-*/*"), *folder.glob("step-*/*/*"))  # whole states, and those cut into parts
        found = [path for path in below if not path.is_symlink() and folder in path.resolve().parents]
        return sorted(found, reverse=True)[:_MAX_CHECKPOINT_FILES]

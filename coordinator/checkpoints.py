"""Parts of a checkpoint come from several nodes in any order: a state counts once all parts of one fence are there.

Pure. Ranks begin to upload a set of parts only when nobody uploads the last one any more
(strategies/checkpoint_pace_torch.py): of one generation, one set is under way. Invariants: the newest whole state never
goes back, no part is kept that could not make a newer one, and the newest set makes way for none.
"""

from __future__ import annotations

from collections import Counter

from protos.artifact import FileEntry, Manifest
from protos.ids import Fence
from protos.work import Checkpoint, Checkpoints
from strategies.checkpoint_name import part_folder

MAX_PARTS = 1024
PENDING_SETS = 2  # the one that is being uploaded, and the one that had come furthest of those before it


def with_uploaded(known: Checkpoints, new: Checkpoint) -> Checkpoints:
    """The same object when `new` changes nothing."""
    newest_step = known.newest.step if known.newest is not None else 0
    if new.step <= newest_step or not 0 <= new.part < new.parts <= MAX_PARTS:
        return known
    if new.parts == 1:
        return _pruned(Checkpoints(new, known.pending))
    pending = [part for part in known.pending if _place(part) != _place(new)] + [new]
    together = sorted((part for part in pending if _set(part) == _set(new)), key=lambda part: part.part)
    if len(together) < new.parts:
        return _pruned(Checkpoints(known.newest, tuple(pending)))
    files = tuple(
        FileEntry(f"{part_folder(part.part, part.parts)}/{entry.path}", entry.digest, entry.bytes)
        for part in together
        for entry in part.manifest.files
    )
    return _pruned(Checkpoints(Checkpoint(new.step, new.samples, Manifest(files)), tuple(pending)))


def _set(part: Checkpoint) -> tuple[int, Fence, int]:
    return part.step, part.fence, part.parts


def _place(part: Checkpoint) -> tuple[tuple[int, Fence, int], int]:
    return _set(part), part.part


def _pruned(known: Checkpoints) -> Checkpoints:
    after = known.newest.step if known.newest is not None else 0
    newer = [part for part in known.pending if part.step > after]
    here = Counter(_set(part) for part in newer)
    kept = sorted(here, key=_age, reverse=True)[:1]
    before = [each for each in here if each not in kept]
    kept += sorted(before, key=lambda each: (here[each] / each[2], _age(each)), reverse=True)[: PENDING_SETS - 1]
    return Checkpoints(known.newest, tuple(part for part in newer if _set(part) in kept))


def _age(each: tuple[int, Fence, int]) -> tuple[Fence, int]:
    """A group that had to go back is newer than the steps that the one before it had reached."""
    step, fence, _ = each
    return fence, step

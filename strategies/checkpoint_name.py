"""Names of checkpoint folders on a node's disk.

`step-00000012` holds a whole state, or all parts of one in folders `1-of-3`. `step-00000012.fence-4.1-of-3` is the part
that one rank wrote: only parts of one fence belong together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FOLDER = re.compile(r"^step-(\d{8,12})(?:\.fence-(\d{1,18})\.(\d{1,6})-of-(\d{1,6}))?$")
_PART = re.compile(r"^(\d{1,6})-of-(\d{1,6})$")


@dataclass(frozen=True, slots=True, order=True)
class CheckpointName:
    """`part` of `parts`, counted from 0; a whole state is part 0 of 1, whatever the fence."""

    step: int
    fence: int = 0
    part: int = 0
    parts: int = 1

    @property
    def whole(self) -> bool:
        return self.parts == 1

    @property
    def folder(self) -> str:
        step = f"step-{self.step:08d}"
        return step if self.whole else f"{step}.fence-{self.fence}.{part_folder(self.part, self.parts)}"


def part_folder(part: int, parts: int) -> str:
    return f"{part + 1}-of-{parts}"


def parse_folder(name: str) -> CheckpointName | None:
    """None for anything that is not a checkpoint under its final name."""
    found = _FOLDER.match(name)
    if found is None:
        return None
    step, fence, part, parts = found.groups()
    if fence is None:
        return CheckpointName(int(step))
    return _checked(int(step), int(fence), int(part), int(parts))


def parse_part(name: str, step: int) -> CheckpointName | None:
    """A folder inside `step-...`: fence 0 stands for parts that were put together."""
    found = _PART.match(name)
    return _checked(step, 0, int(found[1]), int(found[2])) if found else None


def _checked(step: int, fence: int, part: int, parts: int) -> CheckpointName | None:
    return CheckpointName(step, fence, part - 1, parts) if 1 <= part <= parts and parts > 1 else None

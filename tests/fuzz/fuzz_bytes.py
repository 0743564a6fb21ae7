"""Valid bytes, damaged: what every parser of strangers' bytes is fed."""

from __future__ import annotations

import random
from collections.abc import Sequence

_PIECES = (
    b"\xff\xff\xff\xff", b"\0\0\0\0", b"-1", b"1e999", b'"', b"[[[[", b"\x80\x80\x80\x80\x01",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
)  # fmt: skip


def damaged(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A seed with a few bytes changed, cut, doubled or mixed with another; now and then plain noise."""
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(0, 400))
    content = bytearray(rng.choice(seeds))
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(6):
            case 0:
                content[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del content[at : at + rng.randrange(1, 20)]
            case 2:
                content[at:at] = content[at : at + rng.randrange(1, 40)]
            case 3:
                content[at:at] = rng.choice(seeds)[: rng.randrange(1, 60)]
            case 4:
                content[at : at + 4] = rng.choice(_PIECES)
            case _:
                content[at : at + 1] = bytes([content[at] ^ 1 << rng.randrange(8)]) if at < len(content) else b""
    return bytes(content)

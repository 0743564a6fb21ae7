"""The confined process that reads a stranger's q_table.pkl from its stdin; qtable_import.py starts it isolated.

It gives up memory, processor time, files, network and privileges before it reads the first byte, and answers with one
line of JSON on stdout: {"ranks": {CELL: [RANK, ...]}} or {"error": {"code", "message", "hint"}}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from coordinator.identify.child import confine
from coordinator.qtable_pickle import MAX_BYTES, array_of, refused
from protos.errors import SpecError
from qtable.ranks import ranks_of


def answer(content: bytes) -> Mapping[str, object]:
    """What goes to stdout, whatever the bytes do to their reader."""
    try:
        return {"ranks": ranks_of(array_of(content))}
    except SpecError as error:
        return {"error": error.document()}
    except ValueError as error:
        return {"error": refused(str(error)).document()}
    except MemoryError:
        return {"error": refused("reading it took too much memory").document()}


def main() -> None:
    confine()
    with os.fdopen(0, "rb", closefd=False) as file:
        content = file.read(MAX_BYTES + 1)
    rest = memoryview(json.dumps(answer(content)).encode())
    while rest:
        rest = rest[os.write(1, rest) :]
    os._exit(0)  # the interpreter's own way out would open and load


if __name__ == "__main__":
    main()

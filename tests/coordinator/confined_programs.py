"""What test_confined.py starts as a confined process: each program misbehaves in one way."""

from __future__ import annotations

import os
import subprocess
import sys
import time

_LONG_S = "600"


def main() -> None:
    """argv: the folder to import from, which program, a descriptor that stays open as long as it lives."""
    match sys.argv[2]:
        case "leaves a process":
            subprocess.Popen(["sleep", _LONG_S], stdout=subprocess.DEVNULL, pass_fds=(int(sys.argv[3]),))
            os.write(1, b"done")
        case "goes on in silence":
            os.close(1)
            time.sleep(float(_LONG_S))
        case "never stops talking":
            while True:
                os.write(1, bytes(65536))

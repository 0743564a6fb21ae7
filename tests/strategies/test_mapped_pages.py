"""What was read of a mapped file leaves memory and is still there; memory that is no file's is never touched."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from strategies.mapped_pages import let_go
from strategies.memory_use_torch import now_bytes

CPU = torch.device("cpu")


def test_pages_of_a_file_leave_memory_and_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(8_000_000)}, path)
    weight = safetensors.torch.load_file(path)["weight"]
    before = now_bytes(CPU)
    assert weight.sum() == 8_000_000
    assert now_bytes(CPU) > before + 24_000_000
    assert let_go(weight.data_ptr(), weight.numel() * 4)
    assert now_bytes(CPU) < before + 8_000_000
    assert weight.sum() == 8_000_000


def test_memory_that_is_no_files_is_left_alone() -> None:
    weight = torch.ones(8_000_000)
    assert not let_go(weight.data_ptr(), weight.numel() * 4)
    assert weight.sum() == 8_000_000

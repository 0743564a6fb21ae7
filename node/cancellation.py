"""What a loop that goes on after errors must ask after each of them."""

from __future__ import annotations

import asyncio


def raise_if_cancelled() -> None:
    """Before Python 3.13 a task group that ends with an error hides that its own task was cancelled meanwhile: without
    this question a loop would go on for ever, and whoever cancelled it would wait for ever."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError

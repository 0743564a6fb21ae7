"""The control plane under faults: a thousand small disasters per seed, and nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sim_world import CALM, Faults, World


def simulate(world: World) -> World:
    asyncio.run(world.run())
    return world


@pytest.mark.parametrize("first", range(0, 300, 25))
def test_every_invariant_holds_under_faults(first: int) -> None:
    for seed in range(first, first + 25):
        try:
            simulate(World(seed))
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise

"""Fixtures of the whole suite: pools of real ranks, started once and used by all tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from meshwright.comm.ranks import Ranks

sys.path.insert(0, str(Path(__file__).parent))  # helpers that ranks import by name


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(world)` is a pool of that many gloo ranks; a pool that a failure closed is replaced."""
    pools: dict[int, Ranks] = {}

    def pool(world: int) -> Ranks:
        if world not in pools or not pools[world].alive:
            pools[world] = Ranks(world, timeout_seconds=120)
        return pools[world]

    yield pool
    for opened in pools.values():
        opened.close()

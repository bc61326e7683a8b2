"""Fixtures of the whole suite: pools of real ranks, started once by each worker; how much of the matrix was run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers that ranks import by name

from reference.interpreter import import_interpreted

import_interpreted()  # before anything else imports Triton

from meshwright.comm.ranks import Ranks  # noqa: E402
from meshwright.verify.matrix import every_case  # noqa: E402

LONG = ("test_readme.py", "test_lost_hosts.py", "test_launch.py", "test_trial.py")
"""Tests of whole programs, 10 to 30 s each: they begin, so that no worker is left alone with them in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line below the results, where agreement cases ran."""
    ran = [r for r in terminalreporter.stats.get("passed", []) if "test_formula_rehearsal_and_run_agree" in r.nodeid]
    if ran:
        total = len(every_case())
        terminalreporter.write_line(f"agreement: {len(ran)} of {total} cases agree in formula, rehearsal and run")

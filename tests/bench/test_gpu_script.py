"""What `benchmarks/gpu.py` makes of what a GPU says, as far as no GPU is needed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["gpu_script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_script"]


def event(action: str, addr: int, size: int, line: int = 0) -> dict[str, Any]:
    own = [{"filename": "/x/torch/a.py", "line": 1, "name": "mm"}, {"filename": "/x/meshwright/b.py", "line": line}]
    return {
        "action": action,
        "addr": addr,
        "size": size,
        "frames": [{"name": "f", **frame} for frame in own[: 1 + line]],
    }


def test_the_highest_level_of_a_history_is_found(gpu: ModuleType) -> None:
    """A block that was there before lowers the level when it goes, and an address is used again."""
    history = [
        event("alloc", 1, 100, line=7),
        event("alloc", 2, 50, line=7),
        event("free_requested", 1, 100),
        event("free_completed", 1, 100),
        event("free_completed", 9, 80),
        event("alloc", 1, 200, line=8),
        event("alloc", 3, 5),
        event("free_completed", 2, 50),
    ]
    assert gpu.alive_at_peak(history) == [(200, 1, "b.py:8 f"), (50, 1, "b.py:7 f"), (5, 1, "a.py:1 mm")]


def test_the_higher_of_two_peaks_counts(gpu: ModuleType) -> None:
    history = [event("alloc", 1, 300), event("free_completed", 1, 300), event("alloc", 2, 200)]
    assert gpu.alive_at_peak(history) == [(300, 1, "a.py:1 mm")]


@pytest.mark.parametrize(
    ("factor", "passes"), [(1.0, True), (1 + 1e-6, True), (1 + 1e-5, False), (float("nan"), False)]
)
def test_losses_must_be_those_of_the_first_run(gpu: ModuleType, factor: float, passes: bool) -> None:
    first = [{"loss": 5.0}, {"loss": 4.0}]
    found = gpu._curve_problem("float32", [{"loss": 5.0}, {"loss": 4.0 * factor}], first)
    assert (not found) == passes
    assert gpu._curve_problem("float32", "exit code 1", first) == "exit code 1"
    assert gpu._curve_problem("float32", [{"loss": 5.0}, {"loss": None}], first)


def test_every_stage_has_a_limit(gpu: ModuleType) -> None:
    assert list(gpu.STAGES) == list(gpu.LIMITS)

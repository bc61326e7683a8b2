"""The learning rate: its corners, and its shape between them."""

from __future__ import annotations

import pytest

from meshwright.config.tree import Training
from meshwright.training.schedule import learning_rate

TRAINING = Training(steps=110, warmup_steps=10, learning_rate=2.0, final_learning_rate=0.1)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.2), (4, 1.0), (9, 2.0), (59, 1.1), (109, 0.2), (500, 0.2)])
def test_corners(step: int, expected: float) -> None:
    assert learning_rate(TRAINING, step) == pytest.approx(expected)


def test_rises_then_falls() -> None:
    rates = [learning_rate(TRAINING, step) for step in range(110)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (1, 1), (5, 10), (10, 10)])
def test_short_runs(steps: int, warmup_steps: int) -> None:
    training = Training(steps=steps, warmup_steps=warmup_steps, learning_rate=1.0)
    assert all(0 < learning_rate(training, step) <= 1.0 for step in range(steps))

"""Latency and bandwidth of points: planted constants come back, the minimum is one, and α is never negative."""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from meshwright.bench.fit import Fit, fit

SIZES = [4.0**power for power in range(5, 15)]

Points = list[tuple[float, float]]
points_of_all_kinds = st.lists(
    st.tuples(st.sampled_from(SIZES), st.floats(1e-6, 1e2)), min_size=2, max_size=12, unique_by=lambda point: point[0]
)


def cost(points: Points, alpha: float, gamma: float) -> float:
    return sum(((alpha + gamma * size) / seconds - 1) ** 2 for size, seconds in points)


@given(st.floats(1e-6, 1e-2), st.floats(1e6, 1e12))
def test_planted_constants_come_back(alpha: float, beta: float) -> None:
    found = fit([(size, alpha + size / beta) for size in SIZES])
    assert found is not None
    # one of the two may be lost in the rounding of the other: what they explain together must not be
    for size in SIZES:
        assert found.latency_seconds + size / found.bandwidth == pytest.approx(alpha + size / beta, rel=1e-6)
    assert found.worst < 1e-6


def test_literal_points() -> None:
    """100 µs and 50 MB/s."""
    found = fit([(0.5e6, 0.0101), (5e6, 0.1001), (50e6, 1.0001)])
    assert found is not None
    assert found.latency_seconds == pytest.approx(100e-6, rel=1e-9)
    assert found.bandwidth == pytest.approx(50e6, rel=1e-9)


def test_noise_moves_the_constants_by_about_as_much() -> None:
    """Each point off by up to 5 %: neither constant can be off by more than the points that tell it are, about."""
    draw = random.Random(0)
    found = fit([(size, (200e-6 + size / 1e9) * draw.uniform(0.95, 1.05)) for size in SIZES])
    assert found is not None
    assert found.latency_seconds == pytest.approx(200e-6, rel=0.05)
    assert found.bandwidth == pytest.approx(1e9, rel=0.05)
    assert 0.01 < found.worst < 0.1


def test_residuals_are_relative_and_signed() -> None:
    """A point that took twice as long as the others say is fitted with about half."""
    points = [(size, 100e-6 + size / 1e8) for size in SIZES]
    slow = [(size, seconds * (2 if i == 4 else 1)) for i, (size, seconds) in enumerate(points)]
    found = fit(slow)
    assert found is not None
    assert len(found.residuals) == len(SIZES)
    assert found.residuals[4] == pytest.approx(-0.5, abs=0.1)
    assert found.worst == -found.residuals[4]
    for (size, seconds), residual in zip(slow, found.residuals, strict=True):
        assert found.latency_seconds + size / found.bandwidth == pytest.approx(seconds * (1 + residual))


@given(points_of_all_kinds, st.none() | st.floats(1e3, 1e12))
def test_constants_are_allowed_and_no_other_allowed_ones_are_better(points: Points, most: float | None) -> None:
    found = fit(points, most)
    assume(found is not None)
    assert isinstance(found, Fit)
    assert found.latency_seconds >= 0 and 0 < found.bandwidth <= (most or float("inf")) * (1 + 1e-12)
    alpha, gamma = found.latency_seconds, 1 / found.bandwidth
    least = cost(points, alpha, gamma)
    for other_alpha in (0.0, alpha * 0.99, alpha * 1.01, alpha + 1e-7):
        for factor in (0.99, 1.0, 1.01):
            other_gamma = max(gamma * factor, 1 / most if most else 0.0)
            assert cost(points, other_alpha, other_gamma) >= least * (1 - 1e-6) - 1e-9


def test_no_link_is_faster_than_its_rate() -> None:
    """Sizes whose latency hides under the sending: an unbounded fit would have the rest at 29 MB/s instead of 25."""
    points = [(size, max(2e-3, size / 25e6)) for size in SIZES[:8]]
    free, bounded = fit(points), fit(points, 25e6)
    assert free is not None and bounded is not None
    assert free.bandwidth > 28e6
    assert bounded.bandwidth == pytest.approx(25e6, rel=1e-12)
    assert 1e-3 < bounded.latency_seconds < free.latency_seconds


def test_alpha_is_zero_where_large_calls_are_slower_than_in_proportion() -> None:
    points = [(1e3, 1e-5), (1e6, 1e-2), (1e8, 2.0)]
    found = fit(points)
    assert found is not None
    assert found.latency_seconds == 0.0
    rates = [size / seconds for size, seconds in points]
    assert min(rates) < found.bandwidth < max(rates)


@pytest.mark.parametrize(
    "points", [[], [(1024.0, 1e-4)], [(1024.0, 1e-4), (1024.0, 2e-4)], [(1024.0, 2e-4), (4096.0, 1e-4)]], ids=str
)
def test_points_that_tell_no_bandwidth(points: Points) -> None:
    assert fit(points) is None

"""Latency and bandwidth from the seconds of collectives of several sizes.

    seconds = α + bytes / β        α >= 0 seconds a call, β > 0 bytes per second

Least squares of the *relative* errors (α + bytes / β - seconds) / seconds, so that a call of a kilobyte weighs as much
as one of a hundred megabytes. `bytes` are those that one rank puts on the wire: `wire_bytes` × the backend's factor.
Latency and sending overlap in part, which the sum does not know: sizes at which both matter are fitted too slow, and an
unbounded β comes out too large. So β is kept below the rate of the link where that is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """The two constants, and by how much they miss each point."""

    latency_seconds: float
    bandwidth: float
    """Bytes per second that one rank sends."""
    residuals: tuple[float, ...]
    """(fitted - measured) / measured, a point each, in their order."""

    @property
    def worst(self) -> float:
        """The largest residual, without its sign."""
        return max(map(abs, self.residuals))


def fit(points: Sequence[tuple[float, float]], most_bandwidth: float | None = None) -> Fit | None:
    """The constants of (bytes, seconds) points, both above 0; β at most `most_bandwidth`.

    None where the points do not tell a bandwidth: fewer than two sizes, or seconds that do not grow with them.
    """
    assert all(size > 0 and seconds > 0 for size, seconds in points), points
    if len({size for size, _ in points}) < 2:
        return None
    # Relative errors are u·α + v·γ - 1, with u = 1/seconds, v = bytes/seconds, γ = 1/β: two normal equations.
    u = [1 / seconds for _, seconds in points]
    v = [size / seconds for size, seconds in points]
    uu, uv, vv = (sum(a * b for a, b in zip(x, y, strict=True)) for x, y in ((u, u), (u, v), (v, v)))
    determinant = uu * vv - uv * uv
    alpha = (sum(u) * vv - sum(v) * uv) / determinant
    gamma = (sum(v) * uu - sum(u) * uv) / determinant
    if alpha < 0:  # the minimum of a convex function over an allowed part is then on its edge
        alpha, gamma = 0.0, sum(v) / vv
    if most_bandwidth is not None and gamma < 1 / most_bandwidth:
        gamma = 1 / most_bandwidth
        alpha = max(0.0, (sum(u) - uv * gamma) / uu)
    if gamma <= 0:
        return None
    return Fit(alpha, 1 / gamma, tuple(a * alpha + b * gamma - 1 for a, b in zip(u, v, strict=True)))

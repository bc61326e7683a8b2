"""What few samples tell of a median, whatever their distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """An interval of the median by order statistics, whatever the distribution, and the confidence that it has.

    The narrowest that has `confidence`; where there are fewer than 6 samples, that of all of them, which has less.
    """
    ordered, n = sorted(samples), len(samples)

    def outside(k: int) -> float:
        """The chance that the median is below the k-th smallest or above the k-th largest, counted from 0."""
        return sum(math.comb(n, i) for i in range(k + 1)) / 2 ** (n - 1)

    k = max((k for k in range((n + 1) // 2) if outside(k) <= 1 - confidence), default=0)
    return ordered[k], ordered[-1 - k], 1 - outside(k)

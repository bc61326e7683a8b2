"""What takes turns is compared in pairs: the ratio of each pair of samples, its median and an interval of that.

Identical work differs by several per cent from run to run; neighbours in time differ by less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from meshwright.bench import record


def ratio_row(
    first: str, second: str, samples: Mapping[str, Sequence[float]], failed: Mapping[str, str], **settings: Any
) -> dict[str, Any]:
    """A row for `first / second`, whose samples with the same index are a pair; `settings` as in `record.row`."""
    comparison = f"{first} / {second}"
    if lost := [name for name in (first, second) if name in failed]:
        return record.row(comparison=comparison, failed=f"{' and '.join(lost)} failed", **settings)
    ratios = [a / b for a, b in zip(samples[first], samples[second], strict=True)]
    low, high, confidence = median_interval(ratios)
    return record.row(
        comparison=comparison, samples=ratios, unit="ratio", interval=[low, high], confidence=confidence, **settings
    )


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

"""What takes turns is compared in pairs: the ratio of each pair of samples, its median and an interval of that.

Identical work differs by several per cent from run to run; neighbours in time differ by less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meshwright.bench import record
from meshwright.intervals import median_interval


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

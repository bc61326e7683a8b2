"""The range of each number that a worksheet asks for, and the line that refuses one outside it."""

from __future__ import annotations

from typing import NamedTuple

from meshwright.errors import UserError


class Range(NamedTuple):
    """Both ends included. They are wide: they keep out zeros, signs and slips of units, and every result finite."""

    low: float
    high: float


SIZE = Range(1, 2**40)
SECONDS = Range(0, 1e6)
RATE = Range(1, 1e24)


def mistakes(asked: dict[str, tuple[float, Range]]) -> list[str]:
    """A line for each number out of its range; keys are options without their dashes."""
    return [
        f"--{name.replace('_', '-')} {value} must be between {_shown(low)} and {_shown(high)}: "
        f"use {low if value < low else high}"
        for name, (value, (low, high)) in asked.items()
        if not low <= value <= high
    ]


def require(asked: dict[str, tuple[float, Range]]) -> None:
    """Raise UserError with all of them."""
    if found := mistakes(asked):
        raise UserError("\n".join(found))


def _shown(end: float) -> str:
    return "2**40" if end == 2**40 else str(end)

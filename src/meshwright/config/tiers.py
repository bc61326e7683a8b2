"""How the groups of a mesh axis lie on hosts: ranks fill one host after another.

A group of n ranks that has r of them on each of h hosts has two tiers: r ranks inside a host, and h ranks, one of each
host, between hosts.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from meshwright.config.tree import AXES, Layout


class Tiers(NamedTuple):
    """The sizes of the two subgroups of a group."""

    intra: int
    """Ranks of the group on each of its hosts."""
    inter: int
    """Hosts that it has ranks on."""


def groups(layout: Layout, axes: Sequence[str]) -> Iterator[tuple[int, ...]]:
    """The ranks, in rising order, of every group of some axes as one, in the order of their first ranks."""
    others = [axis for axis in AXES if axis not in axes]
    offsets = _sums(layout, [axis for axis in AXES if axis in axes])
    for first in _sums(layout, others):
        yield tuple(first + offset for offset in offsets)


def _sums(layout: Layout, axes: Sequence[str]) -> list[int]:
    steps = (range(0, layout.degree(axis) * layout.stride(axis), layout.stride(axis)) for axis in axes)
    return [sum(step) for step in itertools.product(*steps)]


def on_hosts(group: Sequence[int], devices_per_host: int) -> tuple[tuple[int, ...], ...]:
    """The ranks of a group by host."""
    return tuple(tuple(ranks) for _, ranks in itertools.groupby(group, lambda rank: rank // devices_per_host))


def shares(layout: Layout, axes: Sequence[str], devices_per_host: int) -> list[tuple[int, ...]]:
    """Of how many ranks each host of a group has: all that occur, of the first group first."""
    found = (tuple(Counter(rank // devices_per_host for rank in group).values()) for group in groups(layout, axes))
    return list(dict.fromkeys(found))


def is_tiered(share: tuple[int, ...]) -> bool:
    """Whether a group with so many ranks on its hosts has two tiers."""
    return len(share) > 1 and share[0] > 1 and len(set(share)) == 1


def tiers(layout: Layout, axes: Sequence[str], devices_per_host: int) -> Tiers | None:
    """The tiers that all groups of some axes have; None where they have not, or not the same."""
    return _tiers(layout, tuple(axes), devices_per_host)


@functools.cache
def _tiers(layout: Layout, axes: tuple[str, ...], devices_per_host: int) -> Tiers | None:
    found = shares(layout, axes, devices_per_host)
    return Tiers(found[0][0], len(found[0])) if len(found) == 1 and is_tiered(found[0]) else None


def gradient_tiers(layout: Layout, devices_per_host: int) -> Tiers | None:
    """The tiers of the gradient group; None where gradients are not to be summed by tiers."""
    return tiers(layout, layout.token_axes, devices_per_host) if layout.hierarchical else None

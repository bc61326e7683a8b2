"""Worlds that ranks make again and again (importable by name)."""

from __future__ import annotations

import torch

from meshwright.comm.mesh import World
from meshwright.config.tree import Layout


def same_groups(layout: Layout) -> bool:
    """Whether a second world of a layout has the very groups of the first."""
    first, second = (World.create(layout, torch.device("cpu")) for _ in range(2))
    names = [name for name, axis in first.axes.items() if axis.size > 1]
    return bool(names) and all(first.axes[name].group is second.axes[name].group for name in names)

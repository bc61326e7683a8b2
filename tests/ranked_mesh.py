"""Worlds that ranks make again and again (importable by name)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from meshwright.comm import torch_private
from meshwright.comm.mesh import World
from meshwright.config.tree import Layout


def same_groups(layout: Layout) -> bool:
    """Whether a second world of a layout has the very groups of the first."""
    first, second = (World.create(layout, torch.device("cpu")) for _ in range(2))
    names = [name for name, axis in first.axes.items() if axis.size > 1]
    return bool(names) and all(first.axes[name].group is second.axes[name].group for name in names)


def timeouts(layout: Layout) -> list[bool]:
    """For each group that a world has, whether it waits as long as the default group does."""
    axes = World.create(layout, torch.device("cpu")).axes.values()
    default = dist.group.WORLD
    assert default is not None
    expected = torch_private.group_timeout(default)
    return [torch_private.group_timeout(axis.group) == expected for axis in axes if axis.group is not None]

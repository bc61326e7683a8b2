"""Run on ranks: the groups of a grid of `bench collectives`, and what its calls issue."""

from __future__ import annotations

import torch
import torch.distributed as dist

from meshwright.account import Issue
from meshwright.audit.recorder import Recorder
from meshwright.bench import collectives_rank as on_rank
from meshwright.bench.collectives_rank import OPERATIONS, Grid
from meshwright.comm.mesh import World


def members(grid: Grid) -> dict[str, list[int]]:
    axes = World.create(grid.layout, torch.device("cpu")).axes
    groups = {tier: axes[axis].group for tier, axis in on_rank.TIERS.items()}
    return {tier: dist.get_process_group_ranks(group) for tier, group in groups.items() if group is not None}


def issued(size: int) -> list[tuple[str, int, int]]:
    grid = Grid(ranks_per_host=dist.get_world_size())
    axis = World.create(grid.layout, torch.device("cpu")).axes["tensor"]
    found = []
    for operation in OPERATIONS:
        call = on_rank._call(operation, axis, on_rank._rounded(size, axis.size), torch.device("cpu"))
        with Recorder() as recorder:
            call()
        found += [
            (event.operation, event.group_size, event.payload_bytes)
            for event in recorder.trace().expanded()
            if isinstance(event, Issue)
        ]
    return found

"""What ranks do in the tests of the pool (importable by name)."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from meshwright.comm.collectives import Axis
from meshwright.comm.failure import CollectiveError
from meshwright.comm.scope import scope


def rank_times(factor: int) -> int:
    return dist.get_rank() * factor


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("planted")
    dist.all_reduce(torch.zeros(1))


def die_on_one() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.all_reduce(torch.zeros(1))


def hang_on_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def late_on_one(operation: str) -> tuple[str, list[int], bool] | None:
    """Rank 1 comes to a collective when the others have given it up; they return what they know of it."""
    group = dist.new_group(timeout=timedelta(seconds=1.5))
    axis = Axis("replicate", dist.get_world_size(), dist.get_rank(), group)
    if dist.get_rank() == 1:
        dist.barrier()
        return None
    try:
        with scope("layers.0", "backward"):
            if operation == "shift":  # a ring: rank 0 receives from the last and sends to 1, the last from 1 to 0
                to, of = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
                axis.shift(torch.zeros(1 << 20), send_to=to, receive_from=of, site="layers.0").wait()
            else:
                axis.all_reduce(torch.zeros(1), site="layers.0").wait()
    except CollectiveError as error:
        dist.barrier()
        return str(error), error.call.others(), isinstance(error.__cause__, RuntimeError)
    raise AssertionError("nobody was missing")

"""What ranks do in the tests of the pool (importable by name)."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist


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

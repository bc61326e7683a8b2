"""The process group of a running job: joining it, and what ranks tell each other outside of training."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from meshwright.comm.mesh import World
from meshwright.comm.scope import scope
from meshwright.config.tree import Job
from meshwright.training.process import Place, ended_at_once


@contextmanager
def joined(job: Job, place: Place) -> Iterator[World]:
    """The world of a job on this rank, for as long as it trains. Collective; `training.device` is resolved.

    After an exception the group is left as it is: a peer may be gone, and taking it down would wait for it.
    """
    device = _own_device(job, place)
    if place.launched:
        _choose_interface(place)
        with ended_at_once():  # of a rank that failed before it came here, only the launcher's SIGTERM tells the others
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                timeout=timedelta(seconds=job.training.timeout_seconds),
                device_id=device if device.type == "cuda" else None,
            )
    yield World.create(job.layout, device)
    if dist.is_initialized():
        dist.destroy_process_group()


def _own_device(job: Job, place: Place) -> torch.device:
    if job.training.device == "cuda":
        torch.cuda.set_device(place.local_rank)
        return torch.device("cuda", place.local_rank)
    if place.local_world > 1:
        torch.set_num_threads(1)  # ranks share the cores; more threads than cores would make all of them wait
    return torch.device("cpu")


def _choose_interface(place: Place) -> None:
    """Ranks of one host talk over loopback, whatever the host's name resolves to."""
    if place.world == place.local_world:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")


def from_rank_0(value: Any, world: World) -> Any:
    """Rank 0's value on every rank: a control collective, which no account compares."""
    if not dist.is_initialized():
        return value
    box = [value]
    with scope(phase="control"):
        dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def from_all(value: Any, world: World) -> list[Any]:
    """Every rank's value on every rank, in rank order: a control collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    with scope(phase="control"):
        dist.all_gather_object(values, value)
    return values


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exception says that a collective failed, rather than that this rank has a bug."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))

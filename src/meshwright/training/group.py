"""The process group of a running job: joining it, and what ranks tell each other outside of training."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from meshwright.account import WORLD_AXIS
from meshwright.comm.failure import Call, CollectiveError, failing_as, first_line, is_lost_peer
from meshwright.comm.lifeline import Lifeline, own_address
from meshwright.comm.mesh import World
from meshwright.comm.scope import clocked, scope, waiting
from meshwright.config.tree import Job
from meshwright.training.lost import LostPeer, find
from meshwright.training.process import Place, ended_at_once


@contextmanager
def joined(job: Job, place: Place) -> Iterator[World]:
    """The world of a job on this rank, for as long as it trains. Collective; `training.device` is resolved.

    Raises LostPeer where others do not come, or are gone. After an exception the group is left as it is: taking it down
    would wait for peers; and this rank goes on to answer those that ask.
    """
    device, lifeline = _own_device(job, place), None
    try:
        if place.launched:
            lifeline = _meet(job, place, device)
        with nullcontext() if lifeline is None else clocked(lifeline):
            yield World.create(job.layout, device)
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise _lost(error, lifeline, job, place) from error
    if lifeline is not None:
        lifeline.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _meet(job: Job, place: Place, device: torch.device) -> Lifeline:
    one_host = place.world == place.local_world
    if one_host:
        _choose_loopback()
    with ended_at_once():  # of a rank that failed before it came here, only the launcher's SIGTERM tells the others
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=job.training.timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
        return Lifeline.join(place.rank, place.world, own_address(place.master, one_host=one_host))


def _lost(error: RuntimeError, lifeline: Lifeline | None, job: Job, place: Place) -> LostPeer:
    seconds = job.training.timeout_seconds
    if isinstance(error, CollectiveError) and lifeline is not None:
        return find(error, lifeline, place.world, seconds)
    if lifeline is not None:
        return LostPeer(f"a collective failed: {first_line(error)}", patient=True)
    where = f" at {place.master}" if place.master and place.world != place.local_world else ""
    return LostPeer(
        f"not all {place.world} ranks could join{where} within {seconds:g} s (training.timeout_seconds): see that "
        f"every host is up, runs its ranks and reaches the others ({first_line(error)})",
        patient=True,
    )


def _own_device(job: Job, place: Place) -> torch.device:
    if job.training.device == "cuda":
        torch.cuda.set_device(place.local_rank)
        return torch.device("cuda", place.local_rank)
    if place.local_world > 1:
        torch.set_num_threads(1)  # ranks share the cores; more threads than cores would make all of them wait
    return torch.device("cpu")


def _choose_loopback() -> None:
    """Ranks of one host talk over loopback, whatever the host's name resolves to."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")


def from_rank_0(value: Any, world: World) -> Any:
    """Rank 0's value on every rank: a control collective, which no account compares."""
    if not dist.is_initialized():
        return value
    box = [value]
    call = Call("broadcast", WORLD_AXIS, "start", "control", None, issued_seconds=time.perf_counter())
    with scope(phase="control"), failing_as(call), waiting(call):
        dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def from_all(value: Any, world: World) -> list[Any]:
    """Every rank's value on every rank, in rank order: a control collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    call = Call("all_gather", WORLD_AXIS, "start", "control", None, issued_seconds=time.perf_counter())
    with scope(phase="control"), failing_as(call), waiting(call):
        dist.all_gather_object(values, value)
    return values

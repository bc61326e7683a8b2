"""Collectives of an axis as one rank calls them, and what the recorder saw of them (importable by name)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from meshwright.account import Ledger, LedgerKey, Memory, Wait
from meshwright.audit.recorder import Recorder
from meshwright.comm.collectives import Axis, Pending
from meshwright.comm.mesh import World
from meshwright.config.tree import Layout

SITE, PHASE = "here", "optimiser"


class Called(NamedTuple):
    """What was sent and what `wait` returned, as they were after it; whether one is a view of the other."""

    given: torch.Tensor
    result: torch.Tensor
    shared: bool
    rows: dict[LedgerKey, int]
    num_waits: int
    bytes_of_buffers: int
    """The most that communication buffers took."""


def axis() -> Axis:
    """The shard axis over all ranks of the pool."""
    return World.create(Layout(shard=dist.get_world_size()), torch.device("cpu")).axes["shard"]


def values(rank: int, length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Whole numbers, different on every rank; bf16 holds their sums, too."""
    return (torch.arange(length) + 10 * rank).to(dtype)


def _called(call: Callable[[torch.Tensor], Pending], given: torch.Tensor) -> Called:
    with Recorder() as recorder:
        result = call(given).wait()
    events = list(recorder.trace().expanded())
    level = most = 0
    for event in events:
        if isinstance(event, Memory) and event.category == "communication_buffers":
            level += event.delta_bytes
            most = max(most, level)
    shared = result.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    num_waits = sum(isinstance(event, Wait) for event in events)
    return Called(given.clone(), result.clone(), shared, dict(Ledger.of(recorder.trace()).rows), num_waits, most)


def all_gather_in_place(length: int, dtype: torch.dtype) -> Called:
    """Each rank fills its own part; the rest is rubbish."""
    own = axis()
    given = torch.full((length,), -1.0, dtype=dtype)
    part = given.chunk(own.size)[own.rank]
    part.copy_(values(own.rank, len(part), dtype))
    return _called(lambda tensor: own.all_gather_in_place(tensor, site=SITE, phase=PHASE), given)


def reduce_scatter_in_place(length: int, dtype: torch.dtype) -> Called:
    """Of values that differ on every rank."""
    own = axis()
    given = values(own.rank, length, dtype)
    return _called(lambda tensor: own.reduce_scatter_in_place(tensor, site=SITE, phase=PHASE), given)


def reduce_scatter_into(length: int, dtype: torch.dtype) -> Called:
    """The same into another tensor."""
    own = axis()
    part = torch.empty(length // own.size, dtype=dtype)
    given = values(own.rank, length, dtype)
    return _called(lambda tensor: own.reduce_scatter_into(part, tensor, site=SITE, phase=PHASE), given)


def overlapping(length: int) -> list[torch.Tensor]:
    """Three on the wire at once, waited for in the opposite order."""
    own = axis()
    buffers = [values(own.rank, length) + index for index in range(3)]
    pending = [own.reduce_scatter_in_place(buffer, site=SITE) for buffer in buffers]
    parts = [one.wait() for one in reversed(pending)][::-1]
    pending = [own.all_gather_in_place(buffer, site=SITE) for buffer in buffers]
    whole = [one.wait() for one in reversed(pending)][::-1]
    assert all(
        part.data_ptr() == one.chunk(own.size)[own.rank].data_ptr() for part, one in zip(parts, whole, strict=True)
    )
    return [one.clone() for one in whole]

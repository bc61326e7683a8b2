"""Sums by tiers as one rank makes them, of whole numbers and of jobs (importable by name)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from ranked_buckets import _words, prepared

from meshwright.account import Ledger, LedgerKey
from meshwright.audit.recorder import Recorder
from meshwright.comm.mesh import Tiers, World
from meshwright.config.tree import Job, Layout
from meshwright.parallel.hierarchical import (
    HierarchicalSums,
    hierarchical_ring_all_reduce,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
)
from meshwright.training.step import audited_step, step

SITE, PHASE = "here", "backward"


def values(rank: int, numel: int, seed: int = 0) -> torch.Tensor:
    """Small whole numbers, different on every rank."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randint(-9, 10, (numel,), generator=generator).float()


class Summed(NamedTuple):
    """What came out, whether it is the very tensor that went in, and the rows it left."""

    result: torch.Tensor
    in_place: bool
    rows: dict[LedgerKey, int]


def by_ring(method: str, layout: Layout, axis: str, numel: int, devices_per_host: int = 1, segments: int = 1) -> Summed:
    """A ring over an axis, or over both tiers of it, of this rank's values."""
    world = World.create(layout, torch.device("cpu"))
    if method == "hierarchical":
        tiers = world.tiers(axis, devices_per_host)
        return _summed(partial(hierarchical_ring_all_reduce, tiers=tiers, segments=segments), world, numel)
    ring = {"reduce_scatter": ring_reduce_scatter, "all_gather": ring_all_gather, "all_reduce": ring_all_reduce}[method]
    return _summed(partial(ring, axis=world.axes[axis], segments=segments), world, numel)


def _summed(function: Callable[..., torch.Tensor], world: World, numel: int) -> Summed:
    tensor = values(world.rank, numel)
    with Recorder() as recorder:
        result = function(tensor, site=SITE, phase=PHASE)
    rows = dict(Ledger.of(recorder.trace()).rows)
    shared = result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    return Summed(result.clone(), shared, rows)


def in_stages(layout: Layout, axis: str, numels: list[int], devices_per_host: int) -> list[torch.Tensor]:
    """Several tensors on the wire at once, each finished in its turn."""
    world = World.create(layout, torch.device("cpu"))
    sums = HierarchicalSums(world.tiers(axis, devices_per_host))
    tensors = [values(world.rank, numel, index) for index, numel in enumerate(numels)]
    sent = [sums.all_reduce(tensor, site=f"{index}", phase=PHASE) for index, tensor in enumerate(tensors)]
    for one in sent:
        one.wait()
    return tensors


class Places(NamedTuple):
    """Names, sizes and ranks in the world of the tiers of an axis; whether a second world has the same groups."""

    names: tuple[str, str]
    members: tuple[list[int], list[int]]
    ranks: tuple[int, int]
    reused: bool


def places(layout: Layout, axis: str, devices_per_host: int) -> Places:
    """The tiers of an axis on this rank."""
    first, second = (_tiers(layout, axis, devices_per_host) for _ in range(2))
    members = tuple(torch.distributed.get_process_group_ranks(tier.group) for tier in first)
    reused = all(one.group is other.group for one, other in zip(first, second, strict=True))
    return Places((first[0].name, first[1].name), members, (first.intra.rank, first.inter.rank), reused)


def _tiers(layout: Layout, axis: str, devices_per_host: int) -> Tiers:
    return World.create(layout, torch.device("cpu")).tiers(axis, devices_per_host)


def course(job: Job) -> list[str]:
    """The second step's sums of gradients and the modules of its backward, in order, one word an event."""
    state, batch, world = prepared(job)
    step(state, batch, world)
    _, account = audited_step(state, batch, world)
    return _words(account.trace.expanded())

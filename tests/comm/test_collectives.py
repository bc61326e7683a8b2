"""Collectives of an axis that work in place: values, whose storage holds them, and the row they leave."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import ranked_axes as ranked
import torch

from meshwright.account import LedgerKey
from meshwright.comm import scope
from meshwright.comm.collectives import Axis, Pending, _wired
from meshwright.comm.ranks import Ranks

Pool = Callable[[int], Ranks]
LENGTH = 12
WORLDS = pytest.mark.parametrize("world", [2, 4])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def row(operation: str, world: int, dtype: torch.dtype) -> dict[LedgerKey, int]:
    """The payload is the full tensor."""
    name = str(dtype).removeprefix("torch.")
    return {LedgerKey(operation, "shard", world, ranked.PHASE, ranked.SITE, name, LENGTH * dtype.itemsize): 1}


@WORLDS
@DTYPES
def test_all_gather_in_place(ranks: Pool, world: int, dtype: torch.dtype) -> None:
    """Every part from its owner; nothing but the tensor is allocated."""
    whole = torch.cat([ranked.values(rank, LENGTH // world, dtype) for rank in range(world)])
    for called in ranks(world).run(ranked.all_gather_in_place, LENGTH, dtype):
        assert torch.equal(called.result, whole) and torch.equal(called.given, whole)
        assert called.shared
        assert (called.rows, called.num_waits) == (row("all_gather", world, dtype), 1)
        assert called.bytes_of_buffers == LENGTH * dtype.itemsize


@WORLDS
@DTYPES
@pytest.mark.parametrize("in_place", [True, False])
def test_reduce_scatter(ranks: Pool, world: int, dtype: torch.dtype, in_place: bool) -> None:
    """This rank's part of the sum; what is sent from another tensor stays as it was."""
    function = ranked.reduce_scatter_in_place if in_place else ranked.reduce_scatter_into
    given = [ranked.values(rank, LENGTH, dtype) for rank in range(world)]
    total = torch.stack(given).double().sum(0).to(dtype)
    assert torch.equal(total.double(), torch.stack(given).double().sum(0)), "whole numbers that the dtype holds"
    for rank, called in enumerate(ranks(world).run(function, LENGTH, dtype)):
        assert torch.equal(called.result, total.chunk(world)[rank])
        assert called.shared is in_place
        own = called.given.chunk(world)[rank]
        assert torch.equal(own, called.result) if in_place else torch.equal(called.given, given[rank])
        assert (called.rows, called.num_waits) == (row("reduce_scatter", world, dtype), 1)
        assert called.bytes_of_buffers == (LENGTH if in_place else LENGTH // world) * dtype.itemsize


def test_several_in_place_at_once(ranks: Pool) -> None:
    """Reduced and gathered again: the sums, on every rank, whatever is waited for first."""
    total = sum(ranked.values(rank, LENGTH) for rank in range(4))
    for buffers in ranks(4).run(ranked.overlapping, LENGTH):
        for index, buffer in enumerate(buffers):
            assert torch.equal(buffer, total + 4 * index)


@pytest.mark.parametrize("method", ["all_gather_in_place", "reduce_scatter_in_place"])
def test_one_rank_has_it_all(method: str) -> None:
    tensor = torch.arange(3.0)
    pending = getattr(Axis("shard"), method)(tensor, site="here")
    assert pending.wait() is tensor and not pending.works


@pytest.mark.parametrize("holds", ["itself", "a view"])
def test_waiting_outlasts_the_backends_hold_of_the_tensors(holds: str) -> None:
    """While somebody observes: who lets go later than that may free memory on a thread that nobody follows."""

    class Done:
        def wait(self) -> None: ...

    class Onlooker:
        def waited(self, pending: Pending) -> None: ...

    tensor = torch.ones(2)
    pending = Pending(tensor, (Done(),), _wired(tensor))  # type: ignore[arg-type]
    held = [alias if holds == "itself" else alias[:1] for alias in pending.wired]
    let_go = threading.Event()
    timer = threading.Timer(0.2, lambda: (let_go.set(), held.clear()))
    timer.start()
    with scope.observe(Onlooker()):
        assert pending.wait() is tensor
    assert let_go.is_set() and not pending.wired
    timer.join()

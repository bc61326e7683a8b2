"""Sums by tiers on real ranks: groups, rings, pipelined stages, and gradients of jobs.

Whole numbers are summed exactly in any order. Of four ranks by tiers two sums of two are added: to the bit what plain
autograd finds if its shares are added in that order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import ranked_hierarchical as ranked
import ranked_states
import torch
from jobs import tiny_job

from meshwright.account import CATEGORIES, LedgerKey
from meshwright.comm.ranks import Ranks
from meshwright.config.tree import Cluster, Job, Layout, Model
from meshwright.planner.step import formula
from meshwright.rehearsal.rehearse import rehearse_job
from meshwright.schemes.replicate import Strategy
from meshwright.verify.agreement import differences_of

Pool = Callable[[int], Ranks]
MODEL = Model(layers=2, d_model=6, d_ff=10, heads=4, kv_heads=1, head_dim=2, vocab_size=13)
STRATEGIES: tuple[Strategy, ...] = ("naive", "flat", "per_parameter", "bucketed")
KIB = 1 / 1024
"""MiB in a bucket: so that there are several."""


def job_of(strategy: Strategy = "bucketed", *, hierarchical: bool = True, accumulation: int = 1, **degrees: int) -> Job:
    layout = Layout(**{"replicate": 4, **degrees}, gradients=strategy, bucket_mib=KIB, hierarchical=hierarchical)
    job = tiny_job(MODEL, layout, accumulation=accumulation, seq_len=8)
    return replace(job, cluster=Cluster(hosts=2, devices_per_host=layout.world // 2))


# --- groups -----------------------------------------------------------------------------------------------------------


def test_tiers_of_an_axis(ranks: Pool) -> None:
    found = ranks(4).run(ranked.places, Layout(replicate=4), "replicate", 2)
    assert [places.members for places in found] == [
        ([0, 1], [0, 2]),
        ([0, 1], [1, 3]),
        ([2, 3], [0, 2]),
        ([2, 3], [1, 3]),
    ]
    assert [places.ranks for places in found] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert all(places.names == ("replicate:intra", "replicate:inter") and places.reused for places in found)


def test_tiers_of_a_flattened_axis(ranks: Pool) -> None:
    found = ranks(4).run(ranked.places, Layout(replicate=2, ring=2), "replicate*ring", 2)
    assert [places.members for places in found][:2] == [([0, 1], [0, 2]), ([0, 1], [1, 3])]
    assert found[0].names == ("replicate*ring:intra", "replicate*ring:inter")


# --- rings ------------------------------------------------------------------------------------------------------------

NUMEL = 24


def total(world: int) -> torch.Tensor:
    return torch.stack([ranked.values(rank, NUMEL) for rank in range(world)]).sum(0)


def hops(axis: str, size: int, elements: int, count: int) -> dict[LedgerKey, int]:
    return {LedgerKey("shift", axis, size, ranked.PHASE, ranked.SITE, "float32", 4 * elements): count}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("segments", [1, 2])
def test_rings_sum_and_gather(ranks: Pool, world: int, segments: int) -> None:
    """In place, in n-1 hops of an n-th each, which may be cut."""

    def run(method: str) -> list[ranked.Summed]:
        return ranks(world).run(ranked.by_ring, method, layout, "replicate", NUMEL, 1, segments)

    layout, part = Layout(replicate=world), NUMEL // world
    row = hops("replicate", world, part // segments, segments * (world - 1)) if world > 1 else {}
    for rank, found in enumerate(run("reduce_scatter")):
        assert torch.equal(found.result, total(world)[rank * part : (rank + 1) * part])
        assert (found.rows, found.in_place) == (row, True)
    gathered = torch.cat([ranked.values(rank, NUMEL)[rank * part : (rank + 1) * part] for rank in range(world)])
    for found in run("all_gather"):
        assert torch.equal(found.result, gathered)
        assert (found.rows, found.in_place) == (row, True)
    for found in run("all_reduce"):
        assert torch.equal(found.result, total(world))
        assert found.rows == {key: 2 * count for key, count in row.items()}


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(
    ("layout", "axis"), [(Layout(replicate=4), "replicate"), (Layout(replicate=2, ring=2), "replicate*ring")]
)
def test_a_ring_in_each_tier(ranks: Pool, layout: Layout, axis: str, segments: int) -> None:
    """Between hosts a hop is a quarter of a segment: half of the half that this rank has summed."""
    inside = hops(f"{axis}:intra", 2, NUMEL // segments // 2, 2 * segments)
    between = hops(f"{axis}:inter", 2, NUMEL // segments // 4, 2 * segments)
    for found in ranks(4).run(ranked.by_ring, "hierarchical", layout, axis, NUMEL, 2, segments):
        assert torch.equal(found.result, total(4))
        assert (found.rows, found.in_place) == (inside | between, True)


# --- stages -----------------------------------------------------------------------------------------------------------


def test_several_tensors_in_stages(ranks: Pool) -> None:
    numels = [2, 24, 6, 100, 8]
    expected = [
        torch.stack([ranked.values(rank, numel, index) for rank in range(4)]).sum(0)
        for index, numel in enumerate(numels)
    ]
    for found in ranks(4).run(ranked.in_stages, Layout(replicate=4), "replicate", numels, 2):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# --- jobs -------------------------------------------------------------------------------------------------------------


def sums_of(job: Job) -> ranked_states.Tensors:
    """By plain autograd: ranks add their micro-batches, then hosts their ranks, then hosts are added."""
    shares = []
    for rank in range(4):
        first, *others = (ranked_states.plain_gradients(job, rank, i) for i in range(job.training.accumulation))
        for other in others:
            first = {name: share + other[name] for name, share in first.items()}
        shares.append(first)
    return {name: (shares[0][name] + shares[1][name]) + (shares[2][name] + shares[3][name]) for name in shares[0]}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_are_the_sums_of_hosts_to_the_bit(ranks: Pool, accumulation: int) -> None:
    expected = sums_of(job_of(accumulation=accumulation))
    for strategy in STRATEGIES:
        for found in ranks(4).run(ranked_states.gradients, job_of(strategy, accumulation=accumulation)):
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                assert torch.equal(gradient, expected[name]), (strategy, name)


def test_gradients_are_those_of_the_flat_sum(ranks: Pool) -> None:
    """Sums of four float32 numbers in two orders; they may cancel, so the yardstick is the largest of a parameter."""
    own, flat = (ranks(4).run(ranked_states.gradients, job_of(hierarchical=on)) for on in (True, False))
    epsilon = torch.finfo(torch.float32).eps
    for mine, theirs in zip(own, flat, strict=True):
        for name, gradient in mine.items():
            assert float((gradient - theirs[name]).abs().max()) <= 8 * epsilon * float(theirs[name].abs().max()), name


def test_stages_run_under_backward_and_each_is_waited_for_only_when_the_next_bucket_is_sent(ranks: Pool) -> None:
    """The first sum between hosts is on the wire while backward computes."""
    job = job_of("per_parameter")
    for words in ranks(4).run(ranked.course, job):
        end = max(index for index, word in enumerate(words) if word.startswith("compute "))
        first = next(word.removeprefix("send ") for word in words if word.startswith("send "))
        at = [index for index, word in enumerate(words) if word == f"send {first}"]
        assert len(at) == 3 and at[2] < end, "all three stages"
        waits = [index for index, word in enumerate(words) if word == f"wait {first}"]
        assert words[waits[0] - 1].startswith("send ") and words[waits[0] - 1] != f"send {first}"
        assert waits[2] > end, "the sum itself is waited for after backward"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_formula_equals_rehearsal_where_gradients_are_partial_too(strategy: Strategy) -> None:
    """Norms, keys and values are summed over `tensor` besides, with the padding of their buckets."""
    job = job_of(strategy, tensor=2)
    job = replace(job, layout=replace(job.layout, sequence_parallel=True))
    planned, rehearsed = formula(job, 5), rehearse_job(job, 5)
    assert not list(differences_of(planned, rehearsed))
    assert {c: planned.footprint.bytes[c] for c in CATEGORIES} == {c: rehearsed.footprint.bytes[c] for c in CATEGORIES}
    assert {"replicate:intra", "replicate:inter", "tensor"} <= set(planned.ledger.axes())

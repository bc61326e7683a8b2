"""Loss curves: the same for every layout, from the same seed, on data with missing labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import pytest
import ranked_curves
from jobs import LAYOUTS, sampled, tiny_job

from meshwright.comm.ranks import Ranks
from meshwright.config.tree import Job, Layout

STEPS = 20


LONG = {
    "ring 4": Layout(ring=4),
    "ring 2 × ulysses 2": Layout(ring=2, ulysses=2),
    "tensor 2, sequence parallel, full recompute": Layout(tensor=2, sequence_parallel=True, recompute="full"),
    "tensor 4, pipelined both ways": Layout(
        tensor=4, sequence_parallel=True, overlap="pipelined", overlap_chunks=3, overlap_ring="bidirectional"
    ),
}

STATES = {
    "replicate 2, per_parameter": Layout(replicate=2, gradients="per_parameter"),
    "zero 1 over shard and ring": Layout(shard=2, ring=2, zero=1, bucket_mib=0.02),
    "zero 2 × tensor 2": Layout(shard=2, tensor=2, zero=2, sequence_parallel=True),
    "zero 3, replicated": Layout(replicate=2, shard=2, recompute="full"),
    "zero 3 over ulysses": Layout(ulysses=2, zero=3),
}


@cache
def one_device(model: str, labelled: int | None = None) -> tuple[float, ...]:
    curve = tuple(ranked_curves.losses(_job(model, Layout()), STEPS, labelled))
    assert curve[-1] <= 0.9 * curve[0], "the curve must fall to prove anything"
    return curve


def _job(model: str, layout: str | Layout, accumulation: int = 1) -> Job:
    return tiny_job(model, layout, accumulation=accumulation, learning_rate=1e-3)


CASES = itertools.product(["grouped_query", "odd_vocabulary"], [name for name in LAYOUTS if name != "1"], [1, 2])


@pytest.mark.parametrize(("model", "layout", "accumulation"), sampled(CASES, 7))
def test_losses_equal_those_of_one_device(
    ranks: Callable[[int], Ranks], model: str, layout: str, accumulation: int
) -> None:
    job = _job(model, layout, accumulation)
    for losses in ranks(job.layout.world).run(ranked_curves.losses, job, STEPS):
        assert losses == pytest.approx(one_device(model), rel=2e-6, abs=0)


@pytest.mark.parametrize("layout", sampled(LONG, 2))
def test_losses_of_sequences_that_ranks_divide(ranks: Callable[[int], Ranks], layout: str) -> None:
    """replicate = shard = 1: the gradient group must hold ring and ulysses, and partial gradients their sums."""
    job = _job("grouped_query", LONG[layout])
    assert job.layout.batch_ranks == 1
    for losses in ranks(job.layout.world).run(ranked_curves.losses, job, STEPS):
        assert losses == pytest.approx(one_device("grouped_query"), rel=2e-6, abs=0)


@pytest.mark.parametrize("layout", sampled(STATES, 3))
def test_losses_of_sharded_states(ranks: Callable[[int], Ranks], layout: str) -> None:
    """What owners step must reach all: a rank that misses it goes another way from the second step on."""
    job = _job("tied", STATES[layout], accumulation=2)
    for losses in ranks(job.layout.world).run(ranked_curves.losses, job, STEPS):
        assert losses == pytest.approx(one_device("tied"), rel=2e-6, abs=0)


def test_losses_where_ranks_have_few_labels_or_none(ranks: Callable[[int], Ranks]) -> None:
    """Only the first 5 of 16 tokens have labels: the ranks of a contiguous ring have 4, 1, 0 and 0 a sequence."""
    job = _job("grouped_query", Layout(ring=4, ring_order="contiguous"))
    assert ranks(4).run(ranked_curves.num_labels, job, 5) == [8 * 4, 8 * 1, 0, 0]
    for losses in ranks(4).run(ranked_curves.losses, job, STEPS, 5):
        assert losses == pytest.approx(one_device("grouped_query", 5), rel=2e-6, abs=0)


def test_initial_weights_do_not_depend_on_the_layout(ranks: Callable[[int], Ranks]) -> None:
    (whole,) = [ranked_curves.full_parameters(_job("odd_vocabulary", Layout()))]
    for layout in ("tensor 2", "replicate 2 × tensor 2", "tensor 4"):
        job = _job("odd_vocabulary", layout)
        parts = ranks(job.layout.world).run(ranked_curves.local_parameters, job)
        for name, full in ranked_curves.assembled(job, parts).items():
            assert full.equal(whole[name]), name


def test_initialisation_holds_one_full_parameter_at_most(ranks: Callable[[int], Ranks]) -> None:
    job = _job("grouped_query", "tensor 4")
    for peak, local, largest in ranks(4).run(ranked_curves.memory_of_building, job):
        assert local < peak <= local + 2 * largest, (
            "its own slices, one full parameter, and the slice being cut from it"
        )

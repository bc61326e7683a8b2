"""Data parallelism on real ranks: where gradients live, when they are sent, and their values.

Of two ranks the sum of gradients is exact to the bit, whatever is sent together: a + b is b + a. Small modules compute
with small whole numbers, whose sums are exact in any order.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import ranked_buckets as ranked
import ranked_states
import torch
from jobs import tiny_job
from ranked_states import Tensors

from meshwright.comm.ranks import Ranks
from meshwright.config.tree import Job, Layout, Model
from meshwright.model.build import specs_of
from meshwright.planner.buckets import bucket_bytes
from meshwright.schemes.replicate import Bucket, Strategy, buckets

Pool = Callable[[int], Ranks]
MODEL = Model(layers=2, d_model=6, d_ff=10, heads=4, kv_heads=1, head_dim=2, vocab_size=13)
TIED = Model(layers=2, d_model=6, d_ff=10, heads=4, kv_heads=1, head_dim=2, vocab_size=13, tied=True)
MODELS = pytest.mark.parametrize("model", [MODEL, TIED], ids=["untied", "tied"])
STRATEGIES: tuple[Strategy, ...] = ("naive", "flat", "per_parameter", "bucketed")
OVERLAPPED: tuple[Strategy, ...] = ("per_parameter", "bucketed")
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
PARTIAL = Layout(replicate=2, tensor=2, sequence_parallel=True)
"""Norms, keys and values are partial over `tensor`, too."""
EPSILON = torch.finfo(torch.float32).eps
KIB = 1 / 1024
"""MiB in a bucket: some parameters of the model are larger, some much smaller."""


def job_of(model: Model, strategy: Strategy, accumulation: int = 1, **degrees: int | bool) -> Job:
    layout = Layout(**{"replicate": 2, "gradients": strategy, "bucket_mib": KIB, **degrees})
    return tiny_job(model, layout, accumulation=accumulation, seq_len=8)


def plan(job: Job) -> tuple[Bucket, ...]:
    return buckets(specs_of(job), job.layout.gradients, bucket_bytes(job), job.layout.state_group_size)


def assert_equal(found: Tensors, expected: Tensors) -> None:
    """To the bit."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


# --- where gradients live ---------------------------------------------------------------------------------------------


@MODELS
@every_strategy
@pytest.mark.parametrize("degrees", [{}, {"replicate": 1, "shard": 2, "zero": 1}], ids=["zero 0", "zero 1"])
def test_gradients_live_in_their_buckets(
    ranks: Pool, model: Model, strategy: Strategy, degrees: dict[str, int]
) -> None:
    """From the beginning on: as many storages as buckets, tiled by gradients in order; none has a copy."""
    job = job_of(model, strategy, 2, **degrees)
    parts = plan(job)
    for found in ranks(2).run(ranked.homes, job):
        for places in found.places:
            for bucket in parts:
                own = [places[spec.name] for spec in bucket.members]
                assert {(place.storage, place.storage_bytes) for place in own} == {(own[0].storage, bucket.numel * 4)}
                ends = [place.stop for place in own]
                assert [place.start for place in own] == [0, *ends[:-1]], bucket.site
                assert ends[-1] == sum(spec.local_numel for spec in bucket.members) * 4
            assert len({place.storage for place in places.values()}) == len(parts)
        assert found.places[1:] == found.places[:1] * 2, "they moved"
        assert sorted(found.allocated) == sorted(bucket.numel * 4 for bucket in parts)
        assert found.at_peak == sum(bucket.numel * 4 for bucket in parts)


def test_the_plan_of_these_tests_has_buckets_of_one_and_of_several() -> None:
    sizes = [len(bucket.members) for bucket in plan(job_of(MODEL, "bucketed"))]
    assert len(sizes) >= 3 and min(sizes) < max(sizes)


# --- when they are sent -----------------------------------------------------------------------------------------------


@MODELS
@every_strategy
def test_buckets_are_sent_in_the_order_of_the_plan(ranks: Pool, model: Model, strategy: Strategy) -> None:
    """Once, in the second of two micro-batches."""
    job = job_of(model, strategy, 2)
    for course in ranks(2).run(ranked.course, job):
        assert course.all("send ") == course.all("wait ") == [bucket.site for bucket in plan(job)]


@MODELS
@pytest.mark.parametrize("strategy", OVERLAPPED)
def test_buckets_are_on_the_wire_under_backward(ranks: Pool, model: Model, strategy: Strategy) -> None:
    """The first as soon as it is complete; nothing is waited for until backward is over."""
    job = job_of(model, strategy, 2)
    parts = plan(job)
    first_layer = "layers.1" if model.tied else "head"
    assert parts[0].members[0].name.startswith(("norm", "head"))
    for course in ranks(2).run(ranked.course, job):
        first, end = course.index(f"send {parts[0].site}"), course.last("compute ")
        assert first < end < course.index(f"wait {parts[0].site}")
        assert course.index(f"compute {first_layer}{'.mlp' if model.tied else ''}") < first
        under = [word for word in course.words[first:end] if word.startswith("compute layers.0")]
        assert under, "all of the first layer's backward runs beside the first bucket"
        assert len([word for word in course.words[:end] if word.startswith("send ")]) >= len(parts) - 2


@pytest.mark.parametrize("strategy", ["naive", "flat"])
def test_without_overlap_each_is_sent_after_backward_and_waited_for(ranks: Pool, strategy: Strategy) -> None:
    job = job_of(MODEL, strategy)
    for course in ranks(2).run(ranked.course, job):
        sent = [word for bucket in plan(job) for word in (f"send {bucket.site}", f"wait {bucket.site}")]
        assert course.words[course.last("compute ") + 1 :] == sent


# --- values -----------------------------------------------------------------------------------------------------------


def sums_of(job: Job) -> Tensors:
    """The gradient by plain autograd: each of two ranks adds up its micro-batches, then the two are added."""
    shares = []
    for rank in range(2):
        first, *others = (ranked_states.plain_gradients(job, rank, i) for i in range(job.training.accumulation))
        for other in others:
            first = {name: share + other[name] for name, share in first.items()}
        shares.append(first)
    return {name: share + shares[1][name] for name, share in shares[0].items()}


@MODELS
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("degrees", [{}, {"replicate": 1, "shard": 2, "zero": 1}], ids=["zero 0", "zero 1"])
def test_gradients_are_the_sums_of_the_ranks(
    ranks: Pool, model: Model, accumulation: int, degrees: dict[str, int]
) -> None:
    """A tied table adds up the head's and the embedding's share of each micro-batch one by one, plain autograd first
    the two of a micro-batch: the same sum of 4 numbers, in another order."""
    jobs = [job_of(model, strategy, accumulation, **degrees) for strategy in STRATEGIES]
    expected = sums_of(jobs[0])
    for job in jobs:
        for found in ranks(2).run(ranked_states.gradients, job):
            if model.tied and accumulation > 1:
                table, plain = found["embedding.weight"], expected["embedding.weight"]
                assert float((table - plain).abs().max()) <= 4 * EPSILON * float(plain.abs().max())
                found["embedding.weight"] = plain
            assert_equal(found, expected)


@every_strategy
def test_partial_gradients_are_summed_over_both_groups(ranks: Pool, strategy: Strategy) -> None:
    """Sums of two over `replicate`, then of two over `tensor`: to the bit those of naive."""
    naive = ranks(4).run(ranked_states.gradients, job_of(MODEL, "naive", tensor=2, sequence_parallel=True))
    found = ranks(4).run(ranked_states.gradients, job_of(MODEL, strategy, tensor=2, sequence_parallel=True))
    for own, expected in zip(found, naive, strict=True):
        assert_equal(own, expected)
    assert torch.equal(found[0]["norm.weight"], found[1]["norm.weight"])


@pytest.mark.parametrize(("model", "accumulation"), [(MODEL, 1), (MODEL, 2), (TIED, 1)])
def test_gradients_of_two_ranks_are_to_the_bit_those_of_distributed_data_parallel(
    ranks: Pool, model: Model, accumulation: int
) -> None:
    """DDP averages: halving and doubling are exact."""
    job = job_of(model, "bucketed", accumulation)
    ours, theirs = (ranks(2).run(function, job) for function in (ranked_states.gradients, ranked_states.ddp_gradients))
    for own, other in zip(ours, theirs, strict=True):
        assert_equal(own, other)


@MODELS
@pytest.mark.parametrize("strategy", ["bucketed", "naive"])
def test_gradients_of_four_ranks_are_those_of_distributed_data_parallel(
    ranks: Pool, model: Model, strategy: Strategy
) -> None:
    """Sums of four float32 numbers in two orders; they may cancel, so the yardstick is the largest of a parameter."""
    job = job_of(model, strategy, 2, replicate=4)
    ours, theirs = (ranks(4).run(function, job) for function in (ranked_states.gradients, ranked_states.ddp_gradients))
    for own, other in zip(ours, theirs, strict=True):
        assert own.keys() == other.keys()
        for name, gradient in own.items():
            assert float((gradient - other[name]).abs().max()) <= 8 * EPSILON * float(other[name].abs().max()), name


# --- small modules ----------------------------------------------------------------------------------------------------

PATHS = {
    "reverse of registration": [["abcd"], ["abcd"]],
    "in the order of registration": [["dcba"], ["dcba"]],
    "in another order on each rank": [["abcd"], ["cadb"]],
    "a branch that one rank does not take": [["abcd"], ["ad"]],
    "each rank has a branch of its own": [["abd"], ["acd"]],
    "one rank uses one parameter": [["abcd"], ["b"]],
    "a parameter that nobody uses": [["acd"], ["acd"]],
    "used twice": [["abacd"], ["abcda"]],
    "micro-batches": [["abcd", "abcd", "abcd"], ["abcd", "abcd", "abcd"]],
    "used in another micro-batch only": [["abcd", "ad"], ["ad", "abcd"]],
    "the last micro-batch uses one parameter": [["abcd", "abcd", "c"], ["abcd", "abcd", "a"]],
}


@pytest.mark.parametrize("case", PATHS)
@every_strategy
def test_small_modules(ranks: Pool, case: str, strategy: Strategy) -> None:
    """Also in the second step; every rank sends all buckets, in the plan's order, in the last backward or after it."""
    paths = PATHS[case]
    expected = ranked.plain_sums("small", "abcd", paths)
    assert any(gradient.any() for gradient in expected.values())
    sites = [bucket.site for bucket in ranked.plan(ranked.small("small", "abcd"), strategy)]
    for found in ranks(2).run(ranked.summed, "small", "abcd", strategy, paths, 2):
        assert_equal(found.gradients, expected)
        *early, under, after = found.sent
        assert early == [[]] * (len(paths[0]) - 1), "sent before the last backward"
        assert [*under, *after] == sites
        if strategy not in OVERLAPPED:
            assert not under
        elif case == "reverse of registration":
            assert not after, "all were complete in backward"


@every_strategy
def test_a_parameter_with_two_names(ranks: Pool, strategy: Strategy) -> None:
    paths = [["azb", "bcz"], ["zcba", "abc"]]
    expected = ranked.plain_sums("tied", "abc", paths)
    assert expected.keys() == set("abc")
    for found in ranks(2).run(ranked.summed, "tied", "abc", strategy, paths):
        assert_equal(found.gradients, expected)


@every_strategy
@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_only_the_last_micro_batch_sends(ranks: Pool, strategy: Strategy, num_micro_batches: int) -> None:
    """By the recorder's count."""
    num_buckets = {"naive": 4, "per_parameter": 4, "flat": 1, "bucketed": 2}[strategy]
    in_backward = num_buckets if strategy in OVERLAPPED else 0
    counts = [0] * (num_micro_batches - 1) + [in_backward, num_buckets]
    assert ranks(2).run(ranked.recorded, strategy, num_micro_batches) == [counts] * 2

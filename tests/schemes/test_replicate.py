"""Buckets of gradients: every parameter once, in order of readiness, within their size; and what they send."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.account import Footprint, Issue, Ledger, LedgerKey, Trace, Wait
from meshwright.schemes.params import ParamSpec, Split
from meshwright.schemes.replicate import (
    FIRST_BUCKET_BYTES,
    PARTIAL_SITE,
    Bucket,
    Strategy,
    buckets,
    is_overlapped,
    partial_buckets,
    sum_partial,
    synchronise,
)
from meshwright.schemes.tape import Group, Tape

STRATEGIES: tuple[Strategy, ...] = ("naive", "flat", "per_parameter", "bucketed")
repeatable = settings(max_examples=100, derandomize=True, deadline=None)
MIB = 2**20
PARTIAL_GROUPS = (None, None, None, ("tensor", 4), ("tensor", 2))
"""Most parameters are whole."""


@st.composite
def models(draw: st.DrawFn) -> tuple[ParamSpec, ...]:
    """Parameters of all sizes around those of buckets; some partial, some divided over a tensor axis of 4."""
    shapes = st.tuples(st.integers(1, 9), st.sampled_from([1, 3, 100, 2**15, 2**17]))
    drawn = draw(st.lists(st.tuples(shapes, st.sampled_from(PARTIAL_GROUPS), st.booleans()), min_size=1, max_size=25))
    return tuple(
        ParamSpec(f"p{i}", shape, Split("tensor", 4, 0, 4) if divided and not partial else None, summed_over=partial)
        for i, (shape, partial, divided) in enumerate(drawn)
    )


sizes = st.sampled_from([1, 4, 1000, MIB // 2, MIB, 3 * MIB, 25 * MIB])
ranks = st.sampled_from([1, 2, 3, 4, 7, 64])


def names(members: Sequence[ParamSpec]) -> list[str]:
    return [spec.name for spec in members]


def nbytes(members: Sequence[ParamSpec]) -> int:
    return 4 * sum(spec.local_numel for spec in members)


def whole(parts: Sequence[Bucket]) -> list[Bucket]:
    return [bucket for bucket in parts if bucket.partial_over is None]


# --- the plan ---------------------------------------------------------------------------------------------------------


@given(specs=models(), strategy=st.sampled_from(STRATEGIES), size=sizes, ranks=ranks)
@repeatable
def test_every_parameter_is_in_one_bucket_at_a_place_of_its_own(
    specs: tuple[ParamSpec, ...], strategy: Strategy, size: int, ranks: int
) -> None:
    parts = buckets(specs, strategy, size, ranks)
    assert sorted(name for bucket in parts for name in names(bucket.members)) == sorted(names(specs))
    assert len({bucket.site for bucket in parts}) == len(parts)
    for bucket in parts:
        places = list(bucket.places())
        assert [spec for spec, _ in places] == list(bucket.members)
        ends = [start + spec.local_numel for spec, start in places]
        assert [start for _, start in places] == [0, *ends[:-1]]
        assert 0 <= bucket.numel - ends[-1] < ranks
        assert bucket.numel == ranks * bucket.shard_numel
        assert len({spec.partial_over for spec in bucket.members}) == 1


@given(specs=models(), size=sizes, ranks=ranks)
@repeatable
def test_buckets_are_filled_in_order_of_readiness(specs: tuple[ParamSpec, ...], size: int, ranks: int) -> None:
    """The first up to 1 MiB; each is closed by a parameter for which it has no room, and by none else."""
    found = whole(buckets(specs, "bucketed", size, ranks))
    in_order = [name for bucket in found for name in names(bucket.members)]
    assert in_order == names([spec for spec in reversed(specs) if spec.partial_over is None])
    limits = [min(size, FIRST_BUCKET_BYTES), *[size] * len(found)]
    for bucket, limit in zip(found, limits, strict=False):
        assert nbytes(bucket.members) <= limit or len(bucket.members) == 1
    for (bucket, after), limit in zip(pairwise(found), limits, strict=False):
        assert nbytes([*bucket.members, after.members[0]]) > limit


@given(specs=models(), strategy=st.sampled_from(["bucketed", "flat"]), size=sizes)
@repeatable
def test_partial_gradients_are_alone_and_last(specs: tuple[ParamSpec, ...], strategy: Strategy, size: int) -> None:
    """One bucket for each group, in order of readiness inside."""
    parts = buckets(specs, strategy, size)
    partial = parts[len(whole(parts)) :]
    assert all(bucket.partial_over is not None for bucket in partial)
    assert len({bucket.partial_over for bucket in partial}) == len(partial)
    for bucket in partial:
        own = [spec for spec in reversed(specs) if spec.partial_over == bucket.partial_over]
        assert list(bucket.members) == own
    assert [bucket.site for bucket in parts] == [f"bucket.{i}" for i in range(len(parts))]
    assert strategy == "bucketed" or len(whole(parts)) <= 1


@given(specs=models(), size=sizes)
@repeatable
def test_a_bucket_a_parameter(specs: tuple[ParamSpec, ...], size: int) -> None:
    """Naive in order of registration, per_parameter in order of readiness; the site is the parameter."""
    naive, ready = (buckets(specs, strategy, size) for strategy in ("naive", "per_parameter"))
    assert [names(bucket.members) for bucket in naive] == [[spec.name] for spec in specs]
    assert ready == naive[::-1]
    assert [bucket.site for bucket in naive] == names(specs)


def test_which_are_sent_under_backward() -> None:
    assert [strategy for strategy in STRATEGIES if is_overlapped(strategy)] == ["per_parameter", "bucketed"]


def test_a_plan_by_hand() -> None:
    """KiB of float32: 512, 300, 400, 2000 and 300, of which the second is partial; buckets of 1500."""
    sizes = {"a": 512, "b": 300, "c": 400, "d": 2000, "e": 300}
    specs = [
        ParamSpec(name, (kib, 256), summed_over=("tensor", 2) if name == "b" else None) for name, kib in sizes.items()
    ]
    found = [(bucket.site, names(bucket.members)) for bucket in buckets(specs, "bucketed", 1500 * 1024)]
    assert found == [("bucket.0", ["e"]), ("bucket.1", ["d"]), ("bucket.2", ["c", "a"]), ("bucket.3", ["b"])]
    small_first = [ParamSpec(name, (600, 256)) for name in "abc"]
    assert [names(bucket.members) for bucket in buckets(small_first, "bucketed", 1500 * 1024)] == [["c"], ["b", "a"]]


# --- what is sent -----------------------------------------------------------------------------------------------------

SPECS = (
    ParamSpec("w", (10, 3)),
    ParamSpec("norm", (7,), summed_over=("tensor", 4)),
    ParamSpec("key", (2, 3), Split("tensor", 4, 0, 2)),
    ParamSpec("bias", (5,), summed_over=("tensor", 4)),
    ParamSpec("up", (8, 2), Split("tensor", 4, 0, 4)),
)
"""Of this rank: 30, 7, 3, 5 and 4 elements; norm and bias are partial over all 4 ranks of the axis, key over 2."""

REPLICAS = Group("replicate*ring", 6)


def written(strategy: Strategy, group: Group = REPLICAS, ranks: int = 1) -> Trace:
    tape = Tape()
    synchronise(tape, buckets(SPECS, strategy, 25 * MIB, ranks), group)
    return tape.trace()


def row(axis: str, size: int, site: str, elements: int, count: int = 1) -> dict[LedgerKey, int]:
    return {LedgerKey("all_reduce", axis, size, "backward", site, "float32", 4 * elements): count}


def own(site: str, elements: int) -> dict[LedgerKey, int]:
    return row("replicate*ring", 6, site, elements)


PARTIAL_ROWS = row("tensor", 4, PARTIAL_SITE, 7 + 5) | row("tensor", 2, PARTIAL_SITE, 3)


@pytest.mark.parametrize("strategy", ["naive", "per_parameter"])
def test_rows_of_a_bucket_a_parameter(strategy: Strategy) -> None:
    rows = own("w", 30) | own("norm", 7) | own("key", 3) | own("bias", 5) | own("up", 4)
    assert Ledger.of(written(strategy)).rows == rows | PARTIAL_ROWS


@pytest.mark.parametrize("strategy", ["flat", "bucketed"])
def test_rows_of_buckets(strategy: Strategy) -> None:
    rows = own("bucket.0", 4 + 30) | own("bucket.1", 5 + 7) | own("bucket.2", 3)
    assert Ledger.of(written(strategy)).rows == rows | PARTIAL_ROWS


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank_sends_only_what_is_partial(strategy: Strategy) -> None:
    assert Ledger.of(written(strategy, Group("replicate", 1))).rows == PARTIAL_ROWS


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_is_sent_in_order_and_waited_for(strategy: Strategy) -> None:
    """The sums over the gradient group first: the partial ones need them."""
    events = written(strategy).events
    issued = [event for event in events if isinstance(event, Issue)]
    sites = [bucket.site for bucket in buckets(SPECS, strategy, 25 * MIB)]
    assert [event.site for event in issued] == [*sites, PARTIAL_SITE, PARTIAL_SITE]
    waited = [event.ticket for event in events if isinstance(event, Wait)]
    assert waited == [event.ticket for event in issued]


@pytest.mark.parametrize(("strategy", "copied"), [("naive", 12), ("per_parameter", 12), ("flat", 0), ("bucketed", 0)])
def test_several_partial_buckets_go_through_a_copy(strategy: Strategy, copied: int) -> None:
    """Norm and bias; the key's is one bucket in any case."""
    footprint = Footprint.of(written(strategy))
    assert footprint.peak == footprint.bytes["communication_buffers"] == 4 * copied


def test_partial_sums_of_a_sharded_bucket_are_of_the_own_part() -> None:
    """5 ranks: 12 elements are padded to 15, of which each has 3; 3 elements to 5, of which each has 1."""
    tape = Tape()
    sum_partial(tape, buckets(SPECS, "bucketed", 25 * MIB, 5))
    assert Ledger.of(tape.trace()).rows == row("tensor", 4, PARTIAL_SITE, 3) | row("tensor", 2, PARTIAL_SITE, 1)
    tape = Tape()
    sum_partial(tape, buckets(SPECS, "naive", 25 * MIB, 5))
    rows = row("tensor", 4, PARTIAL_SITE, 2 + 1) | row("tensor", 2, PARTIAL_SITE, 1)
    assert Ledger.of(tape.trace()).rows == rows, "7 and 5 elements: 2 and 1 each"


def test_partial_buckets_by_group() -> None:
    groups = partial_buckets(buckets(SPECS, "per_parameter", MIB))
    assert {group: [bucket.site for bucket in own] for group, own in groups.items()} == {
        ("tensor", 4): ["bias", "norm"],
        ("tensor", 2): ["key"],
    }

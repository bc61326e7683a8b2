"""ZeRO-1: the ranks' pieces are the parameters, each element once, and what is sent for them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.account import Issue, Ledger, LedgerKey
from meshwright.schemes.params import ParamSpec
from meshwright.schemes.replicate import PARTIAL_SITE, Bucket, buckets
from meshwright.schemes.shard import gather_parameters, pieces, scatter_gradients
from meshwright.schemes.tape import Group, Tape

SPECS = (ParamSpec("a", (5,)), ParamSpec("b", (3, 2)), ParamSpec("c", (2,)), ParamSpec("d", (4,)))


@given(numels=st.lists(st.integers(1, 40), min_size=1, max_size=12), ranks=st.integers(1, 9))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_pieces_of_all_ranks_are_the_parameters(numels: list[int], ranks: int) -> None:
    """Each element once, none of the padding; inside the rank's own part, in rising order."""
    bucket = Bucket("bucket", tuple(ParamSpec(f"p{i}", (n,)) for i, n in enumerate(numels)), ranks)
    owned: Counter[int] = Counter()
    elements: Counter[str] = Counter()
    begins = {spec.name: start for spec, start in bucket.places()}
    for coordinate in range(ranks):
        own = list(pieces(bucket, coordinate))
        for spec, start, stop in own:
            owned.update(range(start, stop))
            elements[spec.name] += stop - start
            assert coordinate * bucket.shard_numel <= start < stop <= (coordinate + 1) * bucket.shard_numel
            assert begins[spec.name] <= start and stop <= begins[spec.name] + spec.local_numel
        assert [piece.stop for piece in own][:-1] == [piece.start for piece in own][1:], "no holes inside a part"
        assert len({piece.spec.name for piece in own}) == len(own)
    assert owned == Counter(range(sum(numels)))
    assert elements == {spec.name: spec.local_numel for spec in bucket.members}


def test_the_third_of_four_ranks_by_hand() -> None:
    """17 elements, padded to 20: parts of 5. d is [0, 4), c [4, 6), b [6, 12), a [12, 17)."""
    (bucket,) = buckets(SPECS, "flat", 2**20, 4)
    assert (bucket.numel, bucket.shard_numel) == (20, 5)
    found = [[(piece.spec.name, piece.start, piece.stop) for piece in pieces(bucket, rank)] for rank in range(4)]
    assert found[3] == [("a", 15, 17)], "[15, 20), of which the last 3 are padding"
    assert found[2] == [("b", 10, 12), ("a", 12, 15)]
    assert found[1] == [("c", 5, 6), ("b", 6, 10)]
    assert found[0] == [("d", 0, 4), ("c", 4, 5)]


def test_a_rank_may_own_nothing_of_a_bucket() -> None:
    """5 elements on 4 ranks: 2, 2, 1 and none."""
    bucket = Bucket("a", SPECS[:1], 4)
    assert [sum(stop - start for _, start, stop in pieces(bucket, rank)) for rank in range(4)] == [2, 2, 1, 0]


def row(operation: str, axis: str, size: int, phase: str, site: str, elements: int) -> dict[LedgerKey, int]:
    return {LedgerKey(operation, axis, size, phase, site, "float32", 4 * elements): 1}


PARTIAL = ParamSpec("norm", (3,), summed_over=("tensor", 2))
STATES, REPLICAS = Group("shard*ring", 4), Group("replicate", 3)


@pytest.mark.parametrize("replicas", [1, 3])
def test_rows_of_gradients(replicas: int) -> None:
    """17 elements and padding over the 4 ranks, 5 of them over the replicas; of the partial 3, padded to 4, one."""
    tape = Tape()
    scatter_gradients(tape, buckets((*SPECS, PARTIAL), "flat", 2**20, 4), STATES, Group("replicate", replicas))
    rows = row("reduce_scatter", "shard*ring", 4, "backward", "bucket.0", 20)
    rows |= row("reduce_scatter", "shard*ring", 4, "backward", "bucket.1", 4)
    if replicas > 1:
        rows |= row("all_reduce", "replicate", 3, "backward", "bucket.0", 5)
        rows |= row("all_reduce", "replicate", 3, "backward", "bucket.1", 1)
    rows |= row("all_reduce", "tensor", 2, "backward", PARTIAL_SITE, 1)
    assert Ledger.of(tape.trace()).rows == rows


def test_rows_of_parameters() -> None:
    """Gathered once; nobody waits inside the step."""
    tape = Tape()
    names = [spec.name for spec in (*SPECS, PARTIAL)]
    gather_parameters(tape, buckets((*SPECS, PARTIAL), "per_parameter", 2**20, 4), names, STATES)
    padded = {"a": 8, "b": 8, "c": 4, "d": 4, "norm": 4}
    rows = [row("all_gather", "shard*ring", 4, "optimiser", site, n) for site, n in padded.items()]
    assert Ledger.of(tape.trace()).rows == {key: count for one in rows for key, count in one.items()}
    assert all(isinstance(event, Issue) for event in tape.trace().events)

"""Sums by tiers as plans and formulas: rings by hand and by simulation, the order of stages, bytes of each tier."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.account import Footprint, Issue, Ledger, LedgerKey, Wait
from meshwright.config.tree import Layout
from meshwright.schemes.hierarchical import (
    STAGES,
    Hop,
    Relay,
    Stage,
    TierGroups,
    all_gather_hops,
    reduce_scatter_hops,
    synchronise,
    tier_groups,
)
from meshwright.schemes.params import ParamSpec
from meshwright.schemes.replicate import PARTIAL_SITE, Strategy, buckets
from meshwright.schemes.tape import Group, Tape

sizes = st.integers(1, 9)

# --- rings ------------------------------------------------------------------------------------------------------------


def test_rings_by_hand() -> None:
    """Rank 0 of 3 ends with the sum of part 0, and begins to gather with it."""
    assert reduce_scatter_hops(0, 3) == (Hop(2, 1, 1, 2), Hop(1, 0, 1, 2))
    assert all_gather_hops(0, 3) == (Hop(0, 2, 1, 2), Hop(2, 1, 1, 2))
    assert reduce_scatter_hops(0, 1) == all_gather_hops(0, 1) == ()


@given(size=sizes)
def test_every_message_is_expected(size: int) -> None:
    """What a rank sends in a hop is what its neighbour receives in that hop."""
    for hops in (reduce_scatter_hops, all_gather_hops):
        plans = [hops(rank, size) for rank in range(size)]
        for rank, plan in enumerate(plans):
            for index, hop in enumerate(plan):
                other = plans[hop.send_to][index]
                assert (other.receives, other.receive_from) == (hop.sends, rank)


@given(size=sizes)
def test_reduce_scatter_leaves_the_whole_sum_on_its_owner(size: int) -> None:
    """Parts as the sets of ranks whose terms are in them: disjoint whenever they are added."""
    held = [[{rank} for _ in range(size)] for rank in range(size)]
    for index in range(size - 1):
        sent = [held[rank][reduce_scatter_hops(rank, size)[index].sends] for rank in range(size)]
        for rank in range(size):
            hop = reduce_scatter_hops(rank, size)[index]
            assert not held[rank][hop.receives] & sent[hop.receive_from]
            held[rank][hop.receives] = held[rank][hop.receives] | sent[hop.receive_from]
    assert all(held[rank][rank] == set(range(size)) for rank in range(size))


@given(size=sizes)
def test_all_gather_brings_every_part(size: int) -> None:
    held = [{rank} for rank in range(size)]
    for index in range(size - 1):
        plans = [all_gather_hops(rank, size)[index] for rank in range(size)]
        assert all(plan.sends in held[rank] and plan.receives not in held[rank] for rank, plan in enumerate(plans))
        for rank, plan in enumerate(plans):
            held[rank].add(plan.receives)
    assert all(parts == set(range(size)) for parts in held)


# --- the order of stages ----------------------------------------------------------------------------------------------


def course(program: str) -> str:
    """What a relay does for `s0` (send 0) and `f0` (finish 0): stages R, A and G, after what they wait for in (…)."""
    words: list[str] = []
    letters: dict[Stage, str] = {"reduce_scatter": "R", "all_reduce": "A", "all_gather": "G"}

    def start(name: str, stage: Stage, before: str | None) -> str:
        words.append((f"({before})" if before else "") + letters[stage] + name)
        return letters[stage] + name

    relay, sent = Relay[str](), {}
    for verb, name in program.split():
        if verb == "s":
            sent[name] = relay.send(lambda stage, before, name=name: start(name, stage, before))
        else:
            words.append(f"({relay.finish(sent[name])})")
    return " ".join(words)


def test_the_order_of_stages_by_hand() -> None:
    """The youngest is put on first: its sum between hosts is on the wire before an older one is waited for."""
    assert course("s0 f0 s1 f1") == "R0 (R0)A0 (A0)G0 (G0) R1 (R1)A1 (A1)G1 (G1)"
    assert course("s0 s1 s2 s3 f0 f1 f2 f3") == (
        "R0 R1 (R0)A0 R2 (R1)A1 (A0)G0 R3 (R2)A2 (A1)G1 (R3)A3 (A2)G2 (A3)G3 (G0) (G1) (G2) (G3)"
    )


@given(number=st.integers(1, 8))
def test_each_stage_of_each_bucket_happens_once_and_in_order(number: int) -> None:
    names = "01234567"[:number]
    found = course(" ".join([*(f"s{name}" for name in names), *(f"f{name}" for name in names)])).split()
    for name in names:
        own = [word for word in found if word.endswith(name) or word == f"(G{name})"]
        assert own == [f"R{name}", f"(R{name})A{name}", f"(A{name})G{name}", f"(G{name})"]
    for stage in "RAG":
        assert [word[-1] for word in found if word[-2] == stage and word[-1] != ")"] == list(names)


# --- what is sent -----------------------------------------------------------------------------------------------------

SPECS = (ParamSpec("w", (10, 3)), ParamSpec("norm", (7,), summed_over=("tensor", 4)), ParamSpec("up", (4, 2)))
GROUPS = TierGroups(Group("replicate*ring:intra", 4), Group("replicate*ring:inter", 2))


def rows(site: str, numel: int) -> dict[LedgerKey, int]:
    """A bucket of so many elements, a multiple of 4."""
    intra, inter = (("replicate*ring:intra", 4), ("replicate*ring:inter", 2))
    calls = (("reduce_scatter", *intra, numel), ("all_reduce", *inter, numel // 4), ("all_gather", *intra, numel))
    return {
        LedgerKey(operation, axis, size, "backward", site, "float32", 4 * count): 1
        for operation, axis, size, count in calls
    }


@pytest.mark.parametrize("strategy", ["naive", "per_parameter", "flat", "bucketed"])
def test_rows(strategy: Strategy) -> None:
    """30, 7 and 8 elements are padded to 32, 8 and 8, 38 to 40; partial ones are summed whole, with their padding."""
    tape = Tape()
    synchronise(tape, buckets(SPECS, strategy, 2**20, 4), strategy, GROUPS)
    partial = {LedgerKey("all_reduce", "tensor", 4, "backward", PARTIAL_SITE, "float32", 4 * 8): 1}
    if strategy in ("naive", "per_parameter"):
        expected = rows("w", 32) | rows("norm", 8) | rows("up", 8)
    else:
        expected = rows("bucket.0", 40) | rows("bucket.1", 8)
    trace = tape.trace()
    assert Ledger.of(trace).rows == expected | partial
    assert Footprint.of(trace).peak == 0
    issued = [event.ticket for event in trace.events if isinstance(event, Issue)]
    assert sorted(event.ticket for event in trace.events if isinstance(event, Wait)) == issued


def test_one_after_another_or_as_a_pipeline() -> None:
    def operations(strategy: Strategy) -> list[str]:
        tape = Tape()
        synchronise(tape, buckets(SPECS[::2], strategy, 2**20, 4), strategy, GROUPS)
        return [event.operation for event in tape.trace().events if isinstance(event, Issue)]

    assert operations("naive") == [*STAGES, *STAGES]
    assert operations("per_parameter") == [
        "reduce_scatter",
        "reduce_scatter",
        "all_reduce",
        "all_reduce",
        "all_gather",
        "all_gather",
    ]


@pytest.mark.parametrize(
    ("hosts", "ranks", "limit"), [(2, 2, Fraction(3, 2)), (2, 4, Fraction(7, 4)), (4, 2, Fraction(7, 6))]
)
def test_what_a_host_sends_to_others(hosts: int, ranks: int, limit: Fraction) -> None:
    """Of the ring over all ranks one link leaves a host; by tiers each of its ranks has a ring between hosts."""
    layout = Layout(replicate=hosts * ranks, hierarchical=True)
    groups = tier_groups(layout, ranks)
    assert groups == (Group("replicate:intra", ranks), Group("replicate:inter", hosts))
    numel, tape = 840 * hosts * ranks, Tape()
    synchronise(tape, buckets([ParamSpec("w", (numel,))], "flat", 2**20, ranks), "flat", groups)
    ledger, n, nbytes = Ledger.of(tape.trace()), hosts * ranks, 4 * numel
    assert ledger.wire_bytes("replicate:intra") == Fraction(2 * (ranks - 1), ranks) * nbytes
    assert ledger.wire_bytes("replicate:inter") == Fraction(2 * (hosts - 1), hosts * ranks) * nbytes
    assert Fraction(2 * (n - 1), n) * nbytes / (ranks * ledger.wire_bytes("replicate:inter")) == limit


def test_no_tiers_where_the_option_is_off() -> None:
    assert tier_groups(Layout(replicate=4), 2) is None

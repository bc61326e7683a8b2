"""The account's folds, on traces small enough to add up by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshwright.account import (
    CATEGORIES,
    Compute,
    Event,
    Footprint,
    Issue,
    Ledger,
    LedgerKey,
    Memory,
    Repeat,
    StepAccount,
    Trace,
    Wait,
    Work,
    diff,
    wire_bytes,
)


def test_wire_bytes_of_the_ring_algorithm() -> None:
    assert wire_bytes("all_reduce", 4, 1000) == 1500
    assert wire_bytes("all_gather", 4, 1000) == wire_bytes("reduce_scatter", 4, 1000) == 750
    assert wire_bytes("all_to_all", 4, 1000) == wire_bytes("broadcast", 4, 1000) == 750
    assert wire_bytes("shift", 4, 1000) == 1000
    assert wire_bytes("all_reduce", 3, 8) == 11, "2·2/3·8 = 10.67 is rounded up"


def test_ledger_counts_rows_and_leaves_out_control_and_groups_of_one() -> None:
    sent = Issue("all_reduce", "tensor", 2, "float32", 64, "forward", "a", 1)
    trace = Trace(
        (
            sent,
            Wait(1, "forward", "a"),
            sent._replace(ticket=2),
            sent._replace(group_size=1),
            sent._replace(phase="control"),
        )
    )
    ledger = Ledger.of(trace)
    assert ledger.rows == {LedgerKey("all_reduce", "tensor", 2, "forward", "a", "float32", 64): 2}
    assert ledger.wire_bytes() == ledger.wire_bytes("tensor") == 128 and ledger.wire_bytes("replicate") == 0
    assert Ledger.from_json(ledger.to_json()) == ledger


def test_footprint_keeps_the_first_highest_moment_and_its_categories() -> None:
    trace = Trace(
        (
            Memory("parameters", 100, "forward", ""),
            Memory("temporaries", 50, "forward", "a"),
            Memory("temporaries", -50, "forward", "a"),
            Memory("saved_activations", 50, "forward", "b"),
            Memory("saved_activations", -50, "backward", "b"),
        )
    )
    footprint = Footprint.of(trace)
    assert (footprint.peak, footprint.peak_site) == (150, "a")
    assert footprint.bytes["temporaries"] == 50 and footprint.bytes["saved_activations"] == 0


def test_a_repeat_spells_its_sites() -> None:
    body = (Issue("all_reduce", "tensor", 2, "float32", 8, "backward", "layers.*.mlp", 1),)
    ledger = Ledger.of(Trace((Repeat(3, body, first=2, step=-1),)))
    assert [key.site for key in ledger.rows] == ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]


_events = st.lists(
    st.one_of(
        st.builds(
            Memory,
            st.sampled_from(CATEGORIES),
            st.integers(-9, 9),
            st.just("forward"),
            st.sampled_from(["layers.*.a", "b"]),
        ),
        st.builds(
            Compute,
            st.sampled_from(["matmul", "elementwise"]),
            st.integers(0, 9),
            st.integers(0, 9),
            st.just("forward"),
            st.just("c"),
        ),
        st.builds(
            Issue,
            st.just("all_reduce"),
            st.just("tensor"),
            st.integers(1, 3),
            st.just("float32"),
            st.integers(1, 9),
            st.just("forward"),
            st.sampled_from(["layers.*.a", "b"]),
        ),
    ),
    max_size=8,
)


@given(_events, _events, st.integers(1, 4), st.integers(1, 3))
def test_folding_a_repeat_equals_folding_it_unrolled(
    before: list[Event], body: list[Event], times: int, outer: int
) -> None:
    inner = Repeat(times, tuple(body), first=times - 1, step=-1)
    trace = Trace((*before, Repeat(outer, (inner, *before)), *before))
    unrolled = Trace(tuple(trace.expanded()))
    assert Footprint.of(trace) == Footprint.of(unrolled)
    assert Work.of(trace) == Work.of(unrolled)
    plain = {key._replace(site=key.site.replace("*", "0")): 0 for key in Ledger.of(unrolled).rows}
    assert sum(Ledger.of(trace).rows.values()) == sum(Ledger.of(unrolled).rows.values())
    assert plain.keys() <= {key._replace(site=key.site.replace("*", "0")) for key in Ledger.of(trace).rows}


def _account(*events: object) -> StepAccount:
    return StepAccount.of(Trace(events), source="formula", rank=0, world=2)  # type: ignore[arg-type]


def test_diff_lists_what_differs_and_nothing_else() -> None:
    sent = Issue("all_reduce", "tensor", 2, "float32", 8, "forward", "a", 1)
    a = _account(sent, Compute("matmul", 10, 4, "forward", "a"), Memory("parameters", 1000, "forward", ""))
    same = _account(Compute("matmul", 10, 99, "forward", "z"), Memory("parameters", 1000, "forward", ""), sent)
    assert diff(a, same) == []
    b = _account(
        sent,
        sent,
        Compute("matmul", 11, 4, "forward", "a"),
        Memory("parameters", 1000, "forward", ""),
        Memory("temporaries", 30, "forward", ""),
    )
    parts = {(d.part, d.row.get("category", d.row.get("kind", d.site))): (d.first, d.second) for d in diff(a, b)}
    assert parts == {("ledger", "a"): (1, 2), ("work", "matmul"): (10, 11), ("footprint", "peak"): (1000, 1030)}
    assert not diff(
        a,
        _account(
            sent,
            Compute("matmul", 10, 4, "forward", "a"),
            Memory("parameters", 1000, "", ""),
            Memory("temporaries", 20, "", ""),
        ),
    )

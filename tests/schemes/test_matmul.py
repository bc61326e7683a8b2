"""The rings' schedules: rows that pass every rank once, sums that end at their owner, and what can be hidden."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.account import Compute, Footprint, Issue, Ledger, Memory, Trace, Wait
from meshwright.config.tree import Cluster, Layout, Model, Training
from meshwright.schemes.matmul import (
    GatherRing,
    Hop,
    ScatterRing,
    Segment,
    Steps,
    Wire,
    gather_steps,
    runs,
    scatter_steps,
    segments,
    slices,
)
from meshwright.schemes.tape import Group, Pipeline, Tape

repeatable = settings(max_examples=60, derandomize=True, deadline=None)
sizes = st.integers(2, 8)
rows_of_a_part = st.integers(1, 13)
pipelines = st.builds(Pipeline, st.integers(1, 6), st.sampled_from(["unidirectional", "bidirectional"]))

ONE = Pipeline(1)
BOTH_WAYS = Pipeline(2, "bidirectional")


def ring(steps: Callable[..., Steps], size: int, rows: int, pipeline: Pipeline) -> list[Steps]:
    return [steps(rank, size, rows, pipeline) for rank in range(size)]


# --- literal ----------------------------------------------------------------------------------------------------------


def test_a_gather_of_three() -> None:
    """Rank 1 of 3: its own rows, then those of rank 0, which come from it, then those of rank 2."""
    assert gather_steps(1, 3, 4, ONE) == tuple((Hop(part, 0, 4, send_to=2, receive_from=0),) for part in (1, 0, 2))


def test_a_scatter_of_three() -> None:
    """Rank 1 of 3 adds first for rank 0, whom its sums reach over rank 2; then for rank 2; at last for itself."""
    assert scatter_steps(1, 3, 4, ONE) == tuple((Hop(part, 0, 4, send_to=2, receive_from=0),) for part in (0, 2, 1))


def test_pieces_go_both_ways() -> None:
    """Rank 0 of 4, 3 rows in two pieces: the first comes from rank 3, the second from rank 1."""
    assert gather_steps(0, 4, 3, BOTH_WAYS) == tuple(
        (Hop(ahead, 0, 1, 1, 3), Hop(behind, 1, 3, 3, 1)) for ahead, behind in ((0, 0), (3, 1), (2, 2), (1, 3))
    )
    assert [(ahead.part, behind.part) for ahead, behind in scatter_steps(0, 4, 3, BOTH_WAYS)] == [
        (3, 1),
        (2, 2),
        (1, 3),
        (0, 0),
    ]


def test_of_an_odd_number_of_pieces_one_more_goes_ahead() -> None:
    (hops, _) = gather_steps(0, 2, 7, Pipeline(3, "bidirectional"))
    assert [hop.rows for hop in hops] == [2, 2, 3]
    (hops, *_) = gather_steps(0, 3, 7, Pipeline(3, "bidirectional"))
    assert [hop.send_to for hop in hops] == [1, 1, 2]


def test_one_chunk_goes_one_way() -> None:
    assert gather_steps(2, 5, 6, Pipeline(1, "bidirectional")) == gather_steps(2, 5, 6, ONE)


@pytest.mark.parametrize(
    ("rows", "count", "expected"),
    [
        (8, 4, ((0, 2), (2, 4), (4, 6), (6, 8))),
        (7, 3, ((0, 2), (2, 4), (4, 7))),
        (2, 4, ((0, 1), (1, 2))),
        (5, 1, ((0, 5),)),
    ],
)
def test_slices(rows: int, count: int, expected: tuple[tuple[int, int], ...]) -> None:
    assert slices(rows, count) == expected


def test_segments_of_a_piece_that_two_sequences_share() -> None:
    """2 sequences of 6 positions on 2 ranks, 3 of each: rows 2 to 5 of rank 1's part are one's last, the other's first
    two."""
    assert list(segments(1, 2, 5, length=3, size=2)) == [Segment(2, 5, 1), Segment(3, 9, 2)]


# --- properties -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(1, 12))
@repeatable
def test_slices_are_nearly_equal_and_leave_nothing_out(rows: int, count: int) -> None:
    found = slices(rows, count)
    assert [row for start, stop in found for row in range(start, stop)] == list(range(rows))
    lengths = [stop - start for start, stop in found]
    assert len(found) == min(rows, count) and max(lengths) - min(lengths) <= 1


@given(sizes, rows_of_a_part, pipelines)
@repeatable
def test_every_rank_holds_every_row_once(size: int, rows: int, pipeline: Pipeline) -> None:
    for steps in ring(gather_steps, size, rows, pipeline) + ring(scatter_steps, size, rows, pipeline):
        held = Counter((hop.part, row) for hops in steps for hop in hops for row in range(hop.start, hop.stop))
        assert held == Counter((part, row) for part in range(size) for row in range(rows))


@given(st.sampled_from([gather_steps, scatter_steps]), sizes, rows_of_a_part, pipelines)
@repeatable
def test_what_is_received_is_what_the_neighbour_sent(
    steps_of: Callable[..., Steps], size: int, rows: int, pipeline: Pipeline
) -> None:
    """Piece by piece, in the order in which both put them on the wire."""
    by_rank = ring(steps_of, size, rows, pipeline)
    for step in range(size - 1):
        for rank, steps in enumerate(by_rank):
            for number, (sent, expected) in enumerate(zip(steps[step], steps[step + 1], strict=True)):
                sender = by_rank[sent.receive_from][step][number]
                assert sender.send_to == rank
                assert (sender.part, sender.start, sender.stop) == (expected.part, expected.start, expected.stop)
            for neighbour in {hop.receive_from for hop in steps[step]}:
                messages = [(hop.start, hop.stop) for hop in by_rank[neighbour][step] if hop.send_to == rank]
                assert messages == [(hop.start, hop.stop) for hop in steps[step] if hop.receive_from == neighbour]


@given(sizes, rows_of_a_part, pipelines)
@repeatable
def test_gathered_rows_arrive(size: int, rows: int, pipeline: Pipeline) -> None:
    """Numbers instead of names: what the messages carry is what a step says that it holds."""
    by_rank = ring(gather_steps, size, rows, pipeline)
    held = [[100 * rank + row for row in range(rows)] for rank in range(size)]
    for step in range(size):
        for rank, steps in enumerate(by_rank):
            for hop in steps[step]:
                assert held[rank][hop.start : hop.stop] == [100 * hop.part + r for r in range(hop.start, hop.stop)]
        held = delivered(held, [steps[step] for steps in by_rank])


@given(sizes, rows_of_a_part, pipelines)
@repeatable
def test_sums_end_at_their_owner_with_every_share_once(size: int, rows: int, pipeline: Pipeline) -> None:
    """Rank r's share of row i for rank p is a power of a base of its own: another sum cannot be the same."""

    def shares(rank: int, hops: tuple[Hop, ...]) -> list[int]:
        """In the order of the rows, which is that of the pieces."""
        return [((rank + 1) * 1000 + hop.part) * 100**rank + i for hop in hops for i in range(hop.start, hop.stop)]

    by_rank = ring(scatter_steps, size, rows, pipeline)
    sums = [shares(rank, steps[0]) for rank, steps in enumerate(by_rank)]
    for step in range(1, size):
        sums = delivered(sums, [steps[step - 1] for steps in by_rank])
        own = [shares(rank, steps[step]) for rank, steps in enumerate(by_rank)]
        sums = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(sums, own, strict=True)]
    for owner in range(size):
        whole = (Hop(owner, 0, rows, 0, 0),)
        expected = [sum(column) for column in zip(*(shares(rank, whole) for rank in range(size)), strict=True)]
        assert sums[owner] == expected


def delivered(held: list[list[int]], hops: list[tuple[Hop, ...]]) -> list[list[int]]:
    """What each rank has after the hops of one step."""
    received = [list(rows) for rows in held]
    for sender, pieces in enumerate(hops):
        for hop in pieces:
            received[hop.send_to][hop.start : hop.stop] = held[sender][hop.start : hop.stop]
    return received


@given(sizes, rows_of_a_part, pipelines)
@repeatable
def test_runs_join_only_neighbours_of_one_part(size: int, rows: int, pipeline: Pipeline) -> None:
    for hops in gather_steps(0, size, rows, pipeline):
        joined = list(runs(hops))
        assert [row for run in joined for row in range(run.start, run.stop)] == list(range(rows))
        for run in joined:
            assert {hop.part for hop in hops if run.start <= hop.start < run.stop} == {run.part}
        assert len(joined) == len({hop.part for hop in hops})


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.data())
@repeatable
def test_segments_map_rows_as_a_reshape_does(batch: int, length: int, size: int, data: st.DataObject) -> None:
    """Against [B, S] cut along S into parts, written out."""
    start = data.draw(st.integers(0, batch * length - 1))
    stop = data.draw(st.integers(start + 1, batch * length))
    for part in range(size):
        in_whole = [b * size * length + part * length + i for b in range(batch) for i in range(length)]
        found = list(segments(part, start, stop, length, size))
        assert [row for s in found for row in range(s.in_part, s.in_part + s.rows)] == list(range(start, stop))
        assert [row for s in found for row in range(s.in_whole, s.in_whole + s.rows)] == in_whole[start:stop]


# --- what is hidden ---------------------------------------------------------------------------------------------------


def ring_trace(size: int, chunks: int, kind: str) -> Trace:
    """A ring's events on a tape: as many FLOPs, and as many bytes on the wire, as there are rows."""
    rows = chunks * (size - 1) * size
    tape = Tape()
    wire = Wire(Group("tensor", size), rows, 1, "float32", Pipeline(chunks))
    if kind == "gather":
        gather = GatherRing(tape, wire)
        for index in range(size):
            gather.step(tape, index, lambda hop: tape.matmul(hop.rows, 1, 1, 0))
    else:
        scatter = ScatterRing(wire)
        for index in range(size):
            scatter.step(tape, index, lambda hop: tape.matmul(hop.rows, 1, 1, 0))
    return tape.trace()


def seconds(trace: Trace, per_row: Fraction) -> Fraction:
    """One lane that computes a row a second, one that sends a row in so many, in order; every rank does the same."""
    now = free = Fraction(0)
    arrivals: dict[int, Fraction] = {}
    for event in trace.expanded():
        if isinstance(event, Compute) and event.kind == "matmul":
            now += event.flops // 2
        elif isinstance(event, Issue):
            free = arrivals[event.ticket] = max(now, free) + event.payload_bytes * per_row
        elif isinstance(event, Wait):
            now = max(now, arrivals[event.ticket])
    return now


@pytest.mark.parametrize("kind", ["gather", "scatter"])
@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_hidden_share_of_equal_communication_and_product(kind: str, chunks: int, size: int) -> None:
    """1 - 1/(T·k), the bound, is reached: all but one of T·k slices of the product has company."""
    trace = ring_trace(size, chunks, kind)
    product = sum(event.flops // 2 for event in trace.expanded() if isinstance(event, Compute))
    per_row = Fraction(size, size - 1)  # (T-1)·M rows take as long as the products of T·M
    sent = sum(event.payload_bytes for event in trace.expanded() if isinstance(event, Issue))
    assert sent * per_row == product
    hidden = (2 * product - seconds(trace, per_row)) / product
    assert hidden == 1 - Fraction(1, size * chunks)


@pytest.mark.parametrize("kind", ["gather", "scatter"])
@pytest.mark.parametrize("ratio", [Fraction(1, 2), Fraction(2)])
@pytest.mark.parametrize("size", [2, 4])
def test_nothing_hides_more_than_the_bound(kind: str, ratio: Fraction, size: int) -> None:
    trace = ring_trace(size, 4, kind)
    product = sum(event.flops // 2 for event in trace.expanded() if isinstance(event, Compute))
    communication = product * ratio
    hidden = product + communication - seconds(trace, ratio * Fraction(size, size - 1))
    assert 0 < hidden <= min(product, communication)
    if ratio > 1:
        assert hidden <= (1 - Fraction(1, size * 4)) * product


@pytest.mark.parametrize(("size", "least"), [(2, 1), (3, 1), (4, 0.95), (8, 0.95)])
def test_two_rings_side_by_side_hide_more(size: int, least: float) -> None:
    """Backward of a column-parallel layer: each ring's hop has the other ring's products to run under as well."""
    rows, tape = size * (size - 1), Tape()
    wire = Wire(Group("tensor", size), rows, 1, "float32", Pipeline(1))
    gather, scatter = GatherRing(tape, wire), ScatterRing(wire)
    for index in range(size):
        scatter.compute(tape, index, lambda hop: tape.matmul(hop.rows, 1, 1, 0))
        gather.step(tape, index, lambda hop: tape.matmul(hop.rows, 1, 1, 0), whole=True)
        scatter.combine(tape, index)
    products = 2 * size * rows
    hidden = (2 * products - seconds(tape.trace(), Fraction(size, size - 1))) / products
    assert least <= hidden <= 1


# --- the account ------------------------------------------------------------------------------------------------------


def events(trace: Trace) -> Iterator[tuple[str, int]]:
    """(what, rows or ticket) of products and messages."""
    for event in trace.expanded():
        if isinstance(event, Compute) and event.kind == "matmul":
            yield "product", event.flops // 2
        elif isinstance(event, Issue):
            yield "send", event.payload_bytes
        elif isinstance(event, Wait):
            yield "wait", event.ticket


def test_order_of_a_gather() -> None:
    """Two ranks, two pieces of 2 rows: both leave, the own 4 rows are multiplied, then each piece as it comes."""
    assert list(events(ring_trace(2, 2, "gather"))) == [
        ("send", 2),
        ("send", 2),
        ("product", 4),
        ("wait", 1),
        ("product", 2),
        ("wait", 2),
        ("product", 2),
    ]


def test_order_of_a_scatter() -> None:
    """The other's sums leave piece by piece as they are made; all own products are made before one is waited for."""
    assert list(events(ring_trace(2, 2, "scatter"))) == [
        ("product", 2),
        ("send", 2),
        ("product", 2),
        ("send", 2),
        ("product", 4),
        ("wait", 1),
        ("wait", 2),
    ]


@pytest.mark.parametrize("kind", ["gather", "scatter"])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_what_a_ring_sends_and_holds(kind: str, size: int) -> None:
    """(T-1)·M rows, as a gather or scatter of T·M does. On the way are, of a gather, what comes, what is held and
    what left last; of a scatter, the share of the rank, too."""
    trace, rows = ring_trace(size, 3, kind), 3 * (size - 1) * size
    assert Ledger.of(trace).wire_bytes() == (size - 1) * rows
    assert sum(Ledger.of(trace).rows.values()) == 3 * (size - 1)
    assert Footprint.of(trace).peak == rows * {"gather": min(size - 1, 3), "scatter": min(size + 1, 4)}[kind]
    left = sum(event.delta_bytes for event in trace.expanded() if isinstance(event, Memory))
    assert left == (0 if kind == "gather" else rows), "of a scatter the result is the caller's"


def test_when_products_are_cut() -> None:
    assert Pipeline.of(Layout(tensor=2, overlap="pipelined", overlap_chunks=3)) == Pipeline(3)
    assert Pipeline.of(Layout(tensor=1, overlap="pipelined")) is None
    assert Pipeline.of(Layout(tensor=2, overlap="none")) is None
    both = Layout(overlap="pipelined", overlap_chunks=1, overlap_ring="bidirectional")
    for layout in (both, Layout(tensor=1, overlap="pipelined")):
        assert not layout.violations(Model(), Cluster(), Training())

"""The ring's schedule: every pair that the mask allows once, evenly over the ranks, and hops that lead home."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.schemes.ring import Block, Order, Schedule, Step, grid, owned_chunks, pairs, schedule

ORDERS: tuple[Order, ...] = ("contiguous", "zigzag")
every_size = pytest.mark.parametrize("size", range(1, 9))
every_order = pytest.mark.parametrize("order", ORDERS)
repeatable = settings(max_examples=20, derandomize=True, deadline=None)
orders = st.sampled_from(ORDERS)
chunk_lengths = st.integers(1, 5)

Pairs = np.ndarray  # [S, S], a row for each query position: how often it sees each key position


def ring(size: int, order: Order) -> list[Schedule]:
    return [schedule(rank, size, order) for rank in range(size)]


def num_chunks(size: int, order: Order) -> int:
    return size if order == "contiguous" else 2 * size


def positions(rank: int, size: int, order: Order, length: int) -> list[int]:
    """Global positions of a rank's local sequence, for chunks of `length`."""
    return [chunk * length + i for chunk in owned_chunks(rank, size, order) for i in range(length)]


def seen(plan: Schedule, step: Step, order: Order, length: int) -> Pairs:
    """What one step computes, from what a block says it is: position by position, nothing asked of `pairs`."""
    counts = np.zeros((num_chunks(plan.size, order) * length,) * 2, dtype=int)
    ours, theirs = (positions(rank, plan.size, order, length) for rank in (plan.rank, step.source))
    for block in step.blocks:
        queries = ours[block.first_query * length : block.end_query * length]
        keys = theirs[block.first_key * length : block.end_key * length]
        assert queries and keys, f"rank {plan.rank}: {block} is empty"
        assert not block.masked or len(queries) == len(keys), f"rank {plan.rank}: {block} has no triangle"
        counts[np.ix_(queries, keys)] += np.tri(len(queries), dtype=int) if block.masked else 1
    return counts


def check_each_pair_once(plans: Sequence[Schedule], order: Order, length: int) -> None:
    """Together the ranks compute the lower triangle: each allowed pair of positions once, no other pair at all."""
    counts = sum(seen(plan, step, order, length) for plan in plans for step in plan.steps)
    wrong = np.argwhere(counts != np.tri(len(counts), dtype=int)).tolist()
    assert not wrong, f"query {wrong[0][0]} sees key {wrong[0][1]} {counts[tuple(wrong[0])]} times"


def check_hops(plans: Sequence[Schedule]) -> None:
    """Follow the keys by what the steps say of their hops: they are what the next step says, and end at home."""
    held = list(range(len(plans)))
    for steps in zip(*(plan.steps for plan in plans), strict=True):
        assert held == [step.source for step in steps], f"ranks hold {held}"
        for rank, step in enumerate(steps):
            sender = step.receive_from
            assert steps[sender].send_to == rank, f"rank {rank} waits for {sender}, which sends to another"
        held = [held[step.receive_from] for step in steps]
    assert held == list(range(len(plans))), f"after the last hop ranks hold {held}"


@every_size
@given(order=orders, length=chunk_lengths)
@repeatable
def test_each_allowed_pair_is_computed_once(size: int, order: Order, length: int) -> None:
    check_each_pair_once(ring(size, order), order, length)


@every_size
@every_order
@given(length=chunk_lengths, seed=st.integers(0, 2**32 - 1))
@repeatable
def test_a_ring_of_sums(size: int, order: Order, length: int, seed: int) -> None:
    """A ring in miniature: a query adds up the values it sees, a value's gradient is the sum of the queries' own.

    So forward is the running sum from the left and backward from the right. Values travel and gradients with them.
    """
    total = num_chunks(size, order) * length
    values, grads = np.random.default_rng(seed).integers(-99, 100, (2, total))
    plans = ring(size, order)
    local = [positions(rank, size, order, length) for rank in range(size)]

    outputs = [np.zeros(len(local[0]), dtype=int) for _ in range(size)]
    travelling = [(values[local[rank]], np.zeros(len(local[0]), dtype=int)) for rank in range(size)]
    for index in range(size):
        steps = [plan.steps[index] for plan in plans]
        for rank, (plan, step) in enumerate(zip(plans, steps, strict=True)):
            weights = seen(plan, step, order, length)[np.ix_(local[rank], local[step.source])]
            held_values, held_grads = travelling[rank]
            outputs[rank] += weights @ held_values
            held_grads += weights.T @ grads[local[rank]]
        travelling = [travelling[step.receive_from] for step in steps]

    for rank, (_, value_grads) in enumerate(travelling):
        assert outputs[rank].tolist() == values.cumsum()[local[rank]].tolist()
        assert value_grads.tolist() == grads[::-1].cumsum()[::-1][local[rank]].tolist()


@every_size
@given(order=orders, length=chunk_lengths)
@repeatable
def test_chunks_partition_the_sequence(size: int, order: Order, length: int) -> None:
    local = [positions(rank, size, order, length) for rank in range(size)]
    assert sorted(position for mine in local for position in mine) == list(range(num_chunks(size, order) * length))
    assert all(a < b for mine in local for a, b in pairwise(mine)), "local positions rise"
    assert len({len(mine) for mine in local}) == 1, "every rank holds as much"
    chunks = tuple(owned_chunks(rank, size, order) for rank in range(size))
    assert [(plan.rank, plan.size, plan.chunks) for plan in ring(size, order)] == [
        (rank, size, chunks) for rank in range(size)
    ]


def full_and_half(plan: Schedule, step: Step, order: Order) -> tuple[int, int]:
    """How many chunk pairs a step computes whole, and how many by half. Of chunks of 2, 4 positions or 3."""
    n = num_chunks(plan.size, order)
    found = seen(plan, step, order, 2).reshape(n, 2, n, 2).sum(axis=(1, 3))
    assert set(found.ravel().tolist()) <= {0, 3, 4}
    return int((found == 4).sum()), int((found == 3).sum())


@every_size
def test_zigzag_is_even_at_every_step(size: int) -> None:
    for plan in ring(size, "zigzag"):
        work = [full_and_half(plan, step, "zigzag") for step in plan.steps]
        assert work == [(1, 2), *[(2, 0)] * (size - 1)], "two full pairs' worth, on any rank at any step"
        assert sum(full for full, _ in work) == 2 * size - 1
        assert all(len(step.blocks) == 1 for step in plan.steps), "one call of the kernel"


@every_size
def test_contiguous_waits_for_the_last_rank(size: int) -> None:
    for rank, plan in enumerate(ring(size, "contiguous")):
        work = [full_and_half(plan, step, "contiguous") for step in plan.steps]
        assert work == [(0, 1), *[(1, 0)] * rank, *[(0, 0)] * (size - 1 - rank)]


@every_size
@every_order
def test_pairs_are_those_of_the_blocks(size: int, order: Order) -> None:
    for plan in ring(size, order):
        for step in plan.steps:
            found = seen(plan, step, order, 2)
            expected = [
                (query, key, bool(found[2 * query, 2 * key + 1] == 0))
                for query in range(num_chunks(size, order))
                for key in range(num_chunks(size, order))
                if found[2 * query, 2 * key]
            ]
            assert sorted(pairs(plan, step)) == expected


@every_size
@every_order
def test_hops_bring_what_the_next_step_needs(size: int, order: Order) -> None:
    check_hops(ring(size, order))


def test_a_ring_of_three_by_hand() -> None:
    assert schedule(1, 3, "zigzag") == Schedule(
        rank=1,
        size=3,
        chunks=((0, 5), (1, 4), (2, 3)),
        steps=(
            Step(1, (Block(0, 2, 0, 2, True),), send_to=2, receive_from=0),
            Step(0, (Block(0, 2, 0, 1, False),), send_to=2, receive_from=0),
            Step(2, (Block(1, 2, 0, 2, False),), send_to=2, receive_from=0),
        ),
    )
    assert schedule(1, 3) == schedule(1, 3, "zigzag"), "zigzag is the default"


def test_a_contiguous_ring_of_four_by_hand() -> None:
    assert schedule(2, 4, "contiguous") == Schedule(
        rank=2,
        size=4,
        chunks=((0,), (1,), (2,), (3,)),
        steps=(
            Step(2, (Block(0, 1, 0, 1, True),), send_to=3, receive_from=1),
            Step(1, (Block(0, 1, 0, 1, False),), send_to=3, receive_from=1),
            Step(0, (Block(0, 1, 0, 1, False),), send_to=3, receive_from=1),
            Step(3, (), send_to=3, receive_from=1),
        ),
    )


@pytest.mark.parametrize(("order", "chunks"), [("contiguous", 1), ("zigzag", 2)])
def test_a_ring_of_one_is_plain_causal_attention(order: Order, chunks: int) -> None:
    only = Step(0, (Block(0, chunks, 0, chunks, True),), send_to=0, receive_from=0)
    assert schedule(0, 1, order) == Schedule(0, 1, (tuple(range(chunks)),), (only,))


LEGEND = r"number: the step that computes the pair   \: only its lower triangle   .: forbidden by the mask"


def printed(rows: str) -> str:
    """A picture below its opening quotes, and the line that explains it."""
    return rows.removeprefix("\n") + LEGEND


def test_one_rank_printed() -> None:
    assert str(schedule(1, 3)) == printed(r"""
       keys of rank  0  1  2  2  1  0
queries of    chunk  0  1  2  3  4  5
rank 1    chunk 1    1  0\ .  .  .  .
rank 1    chunk 4    1  0  2  2  0\ .
""")


def test_a_whole_ring_printed() -> None:
    assert grid(ring(4, "zigzag")) == printed(r"""
       keys of rank  0  1  2  3  3  2  1  0
queries of    chunk  0  1  2  3  4  5  6  7
rank 0    chunk 0    0\ .  .  .  .  .  .  .
rank 1    chunk 1    1  0\ .  .  .  .  .  .
rank 2    chunk 2    2  1  0\ .  .  .  .  .
rank 3    chunk 3    3  2  1  0\ .  .  .  .
rank 3    chunk 4    3  2  1  0  0\ .  .  .
rank 2    chunk 5    2  1  0  3  3  0\ .  .
rank 1    chunk 6    1  0  3  2  2  3  0\ .
rank 0    chunk 7    0  3  2  1  1  2  3  0\
""")


def test_chunk_numbers_of_two_digits_stay_in_their_columns() -> None:
    head, chunks, *rows, _ = grid(ring(8, "zigzag")).splitlines()
    columns = [chunks.index(f" {key} ") + 1 for key in range(15)] + [chunks.index(" 15") + 1]
    assert [int(head[column]) for column in columns] == [*range(8), *reversed(range(8))]
    for query, row in enumerate(rows):
        assert all(row[column - 1] == " " and row[column].isdigit() for column in columns[: query + 1])
        assert row[columns[query] :].startswith("0\\"), "the diagonal is step 0's"
        assert row[columns[query] + 2 :].split() == ["."] * (15 - query)


def edited(plan: Schedule, index: int, step: Step) -> Schedule:
    return replace(plan, steps=(*plan.steps[:index], step, *plan.steps[index + 1 :]))


@every_size
@every_order
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda block: (), id="removed"),
        pytest.param(lambda block: (block, block), id="doubled"),
        pytest.param(lambda block: (block._replace(masked=not block.masked),), id="mask-flipped"),
    ],
)
@given(data=st.data())
@repeatable
def test_a_wrong_block_is_caught(
    size: int, order: Order, spoil: Callable[[Block], tuple[Block, ...]], data: st.DataObject
) -> None:
    """In any one step of any one rank. Of chunks of 1, a contiguous triangle is a square: those need 2 to tell."""
    plans = ring(size, order)
    rank, index = data.draw(
        st.sampled_from([(plan.rank, i) for plan in plans for i, step in enumerate(plan.steps) if step.blocks])
    )
    step = plans[rank].steps[index]
    plans[rank] = edited(plans[rank], index, step._replace(blocks=spoil(step.blocks[0])))
    with pytest.raises(AssertionError, match=r"sees key|has no triangle"):
        check_each_pair_once(plans, order, length=data.draw(st.integers(2, 5)))


@pytest.mark.parametrize("size", range(2, 9))
@pytest.mark.parametrize("field", ["source", "send_to", "receive_from"])
@given(data=st.data())
@repeatable
def test_a_wrong_hop_is_caught(size: int, field: str, data: st.DataObject) -> None:
    plans = ring(size, "zigzag")
    rank, index = data.draw(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)))
    step = plans[rank].steps[index]
    other = data.draw(st.integers(0, size - 1).filter(lambda peer: peer != getattr(step, field)))
    plans[rank] = edited(plans[rank], index, step._replace(**{field: other}))
    with pytest.raises(AssertionError):
        check_hops(plans)


@pytest.mark.parametrize("size", range(3, 9))
def test_a_ring_that_turns_the_other_way_is_caught(size: int) -> None:
    """The peers agree with each other, and bring the keys in another order than the steps expect."""
    backwards = [
        replace(
            plan,
            steps=tuple(s._replace(send_to=s.receive_from, receive_from=s.send_to) for s in plan.steps),
        )
        for plan in ring(size, "zigzag")
    ]
    with pytest.raises(AssertionError, match="ranks hold"):
        check_hops(backwards)


def test_a_ring_cut_short_is_caught() -> None:
    short = [replace(plan, steps=plan.steps[:-1]) for plan in ring(4, "zigzag")]
    with pytest.raises(AssertionError, match="after the last hop"):
        check_hops(short)

"""Attention over Ulysses × ring on real ranks, as a layer calls it: values against unsharded attention, and traffic.

Problems are whole and float64. A ring rank's chunks are joined in rising order, then divided among its Ulysses ranks.
"""

import pytest
import ranked_context as ranked
import torch
from ranked_context import Problem, joined, plain_attention
from reference.precision import error

from meshwright.account import LedgerKey

D = 4
ORDERS = pytest.mark.parametrize("order", ["contiguous", "zigzag"])
BATCHES = pytest.mark.parametrize("batch", [1, 2])
HEADS = pytest.mark.parametrize(
    ("heads", "kv_heads"),
    [pytest.param(4, 4, id="multi-head"), pytest.param(8, 4, id="grouped"), pytest.param(4, 1, id="one-kv-head")],
)

ROUNDING = 1e-13
"""Relative to the largest element: float64, sums of at most a few dozen terms."""

NAMES = "out", "dq", "dk", "dv"


def problem_of(seq_len, heads, kv_heads, batch):
    def randn(i, n):
        return torch.randn(batch, seq_len, n, D, generator=torch.Generator().manual_seed(i), dtype=torch.float64)

    return Problem(2 * randn(0, heads), 2 * randn(1, kv_heads), randn(2, kv_heads), randn(3, heads))


def assert_attention(by_rank, positions, problem):
    """The outcomes of all ranks, together, are unsharded attention."""
    leaves = [x.clone().requires_grad_() for x in problem[:3]]
    out = plain_attention(*leaves)
    whole = [out.detach(), *torch.autograd.grad(out, leaves, problem.dout)]
    for i, (name, expected) in enumerate(zip(NAMES, whole, strict=True)):
        found = joined([[*own.outputs, *own.gradients][i] for own in by_rank], positions)
        assert found.shape == expected.shape
        assert error(found, expected) <= ROUNDING * expected.abs().max(), name


def row(operation, axis, size, phase, elements, count):
    return {LedgerKey(operation, axis, size, phase, ranked.SITE, "float64", elements * 8): count}


def exchanges(ulysses, phase, q, kv):
    """q and out are exchanged whole, and k and v."""
    return row("all_to_all", "ulysses", ulysses, phase, q, 4 if q == kv else 2) | (
        row("all_to_all", "ulysses", ulysses, phase, kv, 2) if q != kv else {}
    )


def test_positions_of_two_by_two():
    """Ranks in the order of the mesh: ring outside, ulysses inside."""
    zigzag = ranked.context_positions(2, 2, "zigzag", 8)
    assert [part.tolist() for part in zigzag] == [[0, 1], [6, 7], [2, 3], [4, 5]]
    zigzag = ranked.context_positions(2, 2, "zigzag", 16)
    assert zigzag[0].tolist() == [0, 1, 2, 3]
    contiguous = ranked.context_positions(2, 2, "contiguous", 8)
    assert [part.tolist() for part in contiguous] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("ulysses", [2, 4])
@HEADS
@BATCHES
def test_ulysses_attention(ranks, ulysses, heads, kv_heads, batch):
    local = 3
    problem = problem_of(ulysses * local, heads, kv_heads, batch)
    by_rank = ranks(ulysses).run(ranked.context, problem, 1, ulysses, "zigzag")
    assert_attention(by_rank, ranked.context_positions(1, ulysses, "contiguous", ulysses * local), problem)
    q, kv = (batch * local * n * D for n in (heads, max(kv_heads, ulysses)))
    for own in by_rank:
        assert own.rows == exchanges(ulysses, "forward", q, kv) | exchanges(ulysses, "backward", q, kv)


@ORDERS
@HEADS
@BATCHES
@pytest.mark.parametrize("recompute", [False, True])
def test_ring_of_ulysses(ranks, order, heads, kv_heads, batch, recompute):
    """2 × 2. Recomputation moves keys once more, inside the exchange: nothing is exchanged again."""
    local = 6
    problem = problem_of(4 * local, heads, kv_heads, batch)
    by_rank = ranks(4).run(ranked.context, problem, 2, 2, order, recompute)
    assert_attention(by_rank, ranked.context_positions(2, 2, order, 4 * local), problem)
    q, kv = (batch * local * n * D for n in (heads, max(kv_heads, 2)))
    moved = kv  # twice as long a sequence, half the heads
    forward = exchanges(2, "forward", q, kv) | row("shift", "ring", 2, "forward", moved, 2)
    again = row("shift", "ring", 2, "recompute", moved, 2) if recompute else {}
    for own in by_rank:
        backward = exchanges(2, "backward", q, kv) | row("shift", "ring", 2, "backward", moved, 2 + 4)
        assert own.rows == forward | again | backward


@ORDERS
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ring_alone(ranks, order, world):
    """No Ulysses: nothing is exchanged."""
    problem = problem_of(world * 6, 2, 2, 1)
    arguments = ranked.context, problem, world, 1, order
    by_rank = [ranked.context(*arguments[1:])] if world == 1 else ranks(world).run(*arguments)
    assert_attention(by_rank, ranked.context_positions(world, 1, order, world * 6), problem)
    assert all({key.axis for key in own.rows} == ({"ring"} if world > 1 else set()) for own in by_rank)


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 4), (2, 2), (4, 1)])
def test_recomputation_changes_no_number(ranks, ring, ulysses):
    """To the bit: the same kernels on the same numbers."""
    problem = problem_of(4 * 6, 4, 4, 1)
    kept, again = (
        ranks(4).run(ranked.context, problem, ring, ulysses, "zigzag", recompute) for recompute in (False, True)
    )
    for a, b in zip(kept, again, strict=True):
        for x, y in zip([*a.outputs, *a.gradients], [*b.outputs, *b.gradients], strict=True):
            assert torch.equal(x, y)

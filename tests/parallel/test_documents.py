"""Attention within documents, where ranks divide the sequence: values against unsharded masked attention, and traffic.

Problems are whole and float64. Documents are known where queries are: nothing more is sent than without them.
"""

import pytest
import ranked_context
import ranked_documents as ranked
import torch
import torch.nn.functional as F
from ranked_context import Problem, joined, ring_positions
from reference.precision import error

from meshwright.config.tree import Layout
from meshwright.schemes.ring import Block, Schedule, Step

D = 4
ORDERS = pytest.mark.parametrize("order", ["contiguous", "zigzag"])
HEADS = pytest.mark.parametrize(
    ("heads", "kv_heads"), [pytest.param(4, 4, id="multi-head"), pytest.param(4, 2, id="grouped")]
)

ROUNDING = 1e-13
"""Relative to the largest element: float64, sums of at most a few dozen terms."""

NAMES = "out", "dq", "dk", "dv"

LENGTHS = {
    "one document": [[12], [12]],
    "across ranks": [[5, 7], [1, 10, 1]],
    "within ranks": [[3, 3, 3, 3], [2, 1, 3, 4, 2]],
    "of one token": [[1] * 12, [11, 1]],
}
"""Of the documents of each of two rows, where a sequence has 12 tokens; twice as long if there are 24, and so on."""


def beginnings(name, seq_len):
    """[B, S]: the position at which the document of each token begins."""
    rows = []
    for row in LENGTHS[name]:
        lengths = [n * seq_len // 12 for n in row] if name != "of one token" or len(row) < 12 else [1] * seq_len
        ends = torch.tensor(lengths).cumsum(0)
        rows.append(torch.repeat_interleave(ends - torch.tensor(lengths), torch.tensor(lengths)))
    return torch.stack(rows)


def problem_of(seq_len, heads, kv_heads, batch=2):
    """Scores of a few units either way: softmax is far from uniform."""

    def randn(i, n):
        return torch.randn(batch, seq_len, n, D, generator=torch.Generator().manual_seed(i), dtype=torch.float64)

    return Problem(2 * randn(0, heads), 2 * randn(1, kv_heads), randn(2, kv_heads), randn(3, heads))


def unsharded(problem, first):
    """out, dq, dk, dv on one device."""
    leaves = [x.clone().requires_grad_() for x in problem[:3]]
    out = ranked.masked_attention(*leaves, first)
    return [out.detach(), *torch.autograd.grad(out, leaves, problem.dout)]


def assert_attention(by_rank, positions, problem, first):
    """The outcomes of all ranks, together, are unsharded attention."""
    for i, (name, expected) in enumerate(zip(NAMES, unsharded(problem, first), strict=True)):
        found = joined([[*own.outputs, *own.gradients][i] for own in by_rank], positions)
        assert found.shape == expected.shape
        assert error(found, expected) <= ROUNDING * expected.abs().max(), name


@pytest.mark.parametrize("name", LENGTHS)
def test_documents_are_what_they_claim(name):
    first = beginnings(name, 24)
    assert first.shape == (2, 24)
    assert (first <= torch.arange(24)).all() and (first.diff() >= 0).all() and not first[:, 0].any()
    assert (name == "one document") == (not first.any())


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", LENGTHS)
@ORDERS
@HEADS
def test_ring(ranks, world, name, order, heads, kv_heads):
    problem, first = problem_of(12, heads, kv_heads), beginnings(name, 12)
    if world == 1:
        by_rank, without = [ranked.ring(problem, first, order)], [ranked_context.ring(problem, order)]
    else:
        by_rank = ranks(world).run(ranked.ring, problem, first, order)
        without = ranks(world).run(ranked_context.ring, problem, order)
    assert_attention(by_rank, ring_positions(world, order, 12), problem, first)
    assert [own.rows for own in by_rank] == [own.rows for own in without]


def late_rows_first(rank):
    """Contiguous, in two chunks a rank, of which the second sees the first before itself."""
    own = Block(1, 2, 0, 1, False), Block(1, 2, 1, 2, True), Block(0, 1, 0, 1, True)
    steps = Step(rank, own, 1 - rank, 1 - rank), Step(1 - rank, (Block(0, 2, 0, 2, False),) * rank, 1 - rank, 1 - rank)
    return Schedule(rank, 2, ((0, 1), (2, 3)), steps)


@pytest.mark.parametrize("name", LENGTHS)
@HEADS
def test_blocks_that_show_nothing_to_rows_that_have_seen_nothing(ranks, name, heads, kv_heads):
    problem, first = problem_of(24, heads, kv_heads), beginnings(name, 24)
    by_rank = ranks(2).run(ranked.by_hand, problem, first, [late_rows_first(rank) for rank in range(2)])
    assert_attention(by_rank, ring_positions(2, "contiguous", 24), problem, first)


LAYOUTS = {
    "ulysses 2": Layout(ulysses=2),
    "ring 2": Layout(ring=2),
    "ring 2 × ulysses 2": Layout(ring=2, ulysses=2),
    "ring 2 × ulysses 2, contiguous": Layout(ring=2, ulysses=2, ring_order="contiguous"),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", LENGTHS)
@HEADS
def test_context(ranks, layout, name, heads, kv_heads):
    """Beginnings as `training.shard` makes them of a batch."""
    problem, first = problem_of(24, heads, kv_heads), beginnings(name, 24)
    by_rank = ranks(layout.world).run(ranked.context, problem, first, layout)
    assert_attention(by_rank, ranked.local_positions(layout, 24), problem, first)
    shape = layout.ring, layout.ulysses, layout.ring_order
    without = ranks(layout.world).run(ranked_context.context, problem, *shape)
    assert [own.rows for own in by_rank] == [own.rows for own in without]


@ORDERS
def test_recomputation_changes_no_number(ranks, order):
    """To the bit: the mask is there when attention is computed again."""
    problem, first = problem_of(24, 4, 2), beginnings("across ranks", 24)
    layout = Layout(ring=2, ulysses=2, ring_order=order)
    kept, again = (ranks(4).run(ranked.context, problem, first, layout, recompute) for recompute in (False, True))
    assert_attention(again, ranked.local_positions(layout, 24), problem, first)
    for a, b in zip(kept, again, strict=True):
        for x, y in zip([*a.outputs, *a.gradients], [*b.outputs, *b.gradients], strict=True):
            assert torch.equal(x, y)


@ORDERS
@pytest.mark.parametrize("seq_len", [9, 13, 15])
def test_padding_is_a_document_of_its_own(ranks, order, seq_len):
    """It sees no token, and whatever gradient reaches it leaves none with them."""
    layout, lengths = Layout(ring=2, ulysses=2, ring_order=order), torch.tensor([4, seq_len - 6, 2])
    first = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths).unsqueeze(0)
    padded = layout.padded(seq_len)
    problem = problem_of(padded, 4, 2, batch=1)
    by_rank = ranks(4).run(ranked.context, problem, first, layout)
    filled = F.pad(first, (0, padded - seq_len), value=seq_len)
    assert_attention(by_rank, ranked.local_positions(layout, padded), problem, filled)


def test_beginnings_of_two_by_two():
    """Zigzag's chunks of four tokens, both ulysses ranks those of their ring rank; padding begins at the end."""
    first = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 7, 7, 9, 9, 9, 12, 12]])
    layout = Layout(ring=2, ulysses=2)
    found = [ranked.part_of(first, layout, rank) for rank in range(4)]
    assert [part.positions.tolist() for part in found] == [[0, 1, 2, 3], [12, 13, 13, 13], [4, 5, 6, 7], [8, 9, 10, 11]]
    ends, middle = [0, 0, 0, 3, 12, 12, 14, 14], [3, 3, 3, 7, 7, 9, 9, 9]
    assert [part.first.flatten().tolist() for part in found] == [ends, ends, middle, middle]


def test_a_wrong_beginning_shows(ranks):
    """The comparison can fail: one token of 24 that sees one key more."""
    problem, first = problem_of(24, 4, 4), beginnings("across ranks", 24)
    layout, wrong = Layout(ring=2, ulysses=2), first.clone()
    wrong[0, 20] -= 1
    by_rank = ranks(4).run(ranked.context, problem, wrong, layout)
    with pytest.raises(AssertionError, match="out"):
        assert_attention(by_rank, ranked.local_positions(layout, 24), problem, first)

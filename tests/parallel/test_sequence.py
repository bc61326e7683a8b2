"""Sequence parallelism on real ranks: a split region against the unsharded operation, DTensor's, and its traffic.

Problems are float64 and whole; `ranked_tensor` cuts them. S is the whole sequence, of which a rank has S/T outside.
"""

import pytest
import ranked_tensor as ranked
import torch
import torch.nn.functional as F
from reference.precision import error
from reference.unsharded import assert_equal, randn, unsharded

from meshwright.account import LedgerKey
from meshwright.comm.collectives import Axis
from meshwright.parallel.sequence import Region

S, E, FEATURES = 8, 8, 12
WORLDS = pytest.mark.parametrize("world", [2, 4])
BATCHES = pytest.mark.parametrize("batch", [1, 2])
"""A batch of one is gathered and scattered without a copy: that is another path."""


def rows_of(world, elements, *calls):
    """One row for each (operation, phase) that is named."""
    return {LedgerKey(op, "tensor", world, phase, ranked.SITE, "float64", elements * 8): 1 for op, phase in calls}


def sent_elements(rows):
    """What one rank puts on the wire."""
    return sum(key.wire_bytes * count for key, count in rows.items()) // 8


@WORLDS
@BATCHES
@pytest.mark.parametrize("biased", [False, True])
def test_column_linear(ranks, world, batch, biased):
    x, widths = randn(batch, S, E), (FEATURES, 4)
    weights, dys = [randn(w, E) for w in widths], [randn(batch, S, w, seed=1) for w in widths]
    biases = [randn(w, seed=2) for w in widths] if biased else []

    def plain(x, *p):
        return [F.linear(x, p[i], p[2 + i] if biased else None) for i in range(2)]

    ys, (dx, *dps) = unsharded(plain, [x, *weights, *biases], dys)
    by_rank = ranks(world).run(ranked.column, x, weights, biases, dys, True)
    for i, y in enumerate(ys):
        assert_equal(torch.cat([own.outputs[i] for own in by_rank], -1), y)
    assert_equal(torch.cat([own.gradients[0] for own in by_rank], 1), dx)
    for i, dp in enumerate(dps, start=1):
        assert_equal(torch.cat([own.gradients[i] for own in by_rank]), dp)
    calls = ("all_gather", "forward"), ("all_gather", "backward"), ("reduce_scatter", "backward")
    for own in by_rank:
        assert own.rows == rows_of(world, batch * S * E, *calls)


@WORLDS
@BATCHES
@pytest.mark.parametrize("biased", [False, True])
def test_row_linear(ranks, world, batch, biased):
    x, weight, dy = randn(batch, S, FEATURES), randn(E, FEATURES), randn(batch, S, E, seed=1)
    biases = [randn(E, seed=2)] if biased else []
    (y,), (dx, dw, *db) = unsharded(lambda *p: [F.linear(*p)], [x, weight, *biases], [dy])
    by_rank = ranks(world).run(ranked.row, x, weight, biases, dy, True)
    assert_equal(torch.cat([own.outputs[0] for own in by_rank], 1), y)
    assert_equal(torch.cat([own.gradients[0] for own in by_rank], -1), dx)
    assert_equal(torch.cat([own.gradients[1] for own in by_rank], 1), dw)
    if biased:  # each rank has the sum over its own positions: whoever sums gradients adds them up
        assert_equal(sum(own.gradients[2] for own in by_rank), db[0])
        for own, part in zip(by_rank, dy.chunk(world, dim=1), strict=True):
            assert_equal(own.gradients[2], part.sum((0, 1)))
    for own in by_rank:
        assert own.rows == rows_of(world, batch * S * E, ("reduce_scatter", "forward"), ("all_gather", "backward"))


@WORLDS
@BATCHES
def test_vocab_embedding(ranks, world, batch):
    vocab_size = 10  # on 4 ranks the last one has a row of padding
    table, dy = randn(vocab_size, E), randn(batch, S, E, seed=1)
    tokens = torch.randint(vocab_size, (batch, S), generator=torch.Generator().manual_seed(0))
    (y,), (dtable,) = unsharded(lambda w: [w[tokens]], [table], [dy])
    by_rank = ranks(world).run(ranked.embedding, tokens, table, dy, True)
    assert torch.equal(torch.cat([own.outputs[0] for own in by_rank], 1), y)
    found = torch.cat([own.gradients[0] for own in by_rank])
    assert_equal(found[:vocab_size], dtable)
    assert not found[vocab_size:].any()
    for own in by_rank:
        assert own.rows == rows_of(world, batch * S * E, ("reduce_scatter", "forward"), ("all_gather", "backward"))


@WORLDS
@BATCHES
@pytest.mark.parametrize("split", [False, True])
def test_what_a_pair_of_layers_sends(ranks, world, batch, split):
    """Whole: an all-reduce each way. Split: gather and scatter send as much, and backward gathers the input again."""
    x, up, h = randn(batch, S, E), randn(FEATURES, E), randn(batch, S, FEATURES)
    down, dy = randn(E, FEATURES), randn(batch, S, E, seed=1)
    columns = ranks(world).run(ranked.column, x, [up], [], [h], split)
    rows = ranks(world).run(ranked.row, h, down, [], dy, split)
    for column, row in zip(columns, rows, strict=True):
        sent = sent_elements(column.rows) + sent_elements(row.rows)
        assert 2 * world * sent == (10 if split else 8) * (world - 1) * batch * S * E


@WORLDS
@BATCHES
def test_dtensor_column_row(ranks, world, batch):
    """torch's ColwiseParallel and RowwiseParallel between activations that are sharded along the sequence."""
    x, up, down = randn(batch, S, E), randn(FEATURES, E), randn(E, FEATURES, seed=1)
    for theirs, ours in ranks(world).run(ranked.dtensor_pair, x, up, down, randn(batch, S, E, seed=1), True):
        assert ours[0].shape == (batch, S // world, E)
        for expected, found in zip(theirs, ours, strict=True):
            assert_equal(found, expected)


def test_bf16_within_twice_plain_pytorch(ranks):
    """Activations in bf16, weights and their gradients in float32; half the bytes on the wire.

    Beyond the rule, one unit in the last place: the two terms of the sum over the ranks are each rounded before it.
    """
    world, batch = 2, 2
    x, weight, dy = (t.bfloat16() for t in (randn(batch, S, 64), randn(E, 64), randn(batch, S, E, seed=1)))

    def results(*whole):
        (y,), gradients = unsharded(lambda *p: [F.linear(*p)], whole[:2], whole[2:])
        return [t.double() for t in (y, *gradients)]

    exact, plain = results(x.double(), weight.double(), dy.double()), results(x, weight, dy)
    by_rank = ranks(world).run(ranked.row, x, weight.float(), [], dy, True)
    ours = [
        torch.cat([own.outputs[0] for own in by_rank], 1),
        torch.cat([own.gradients[0] for own in by_rank], -1),
        torch.cat([own.gradients[1] for own in by_rank], 1),
    ]
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for found, same_precision, expected in zip(ours, plain, exact, strict=True):
        allowed = 2 * error(same_precision, expected) + torch.finfo(torch.bfloat16).eps * expected.abs().max()
        assert error(found.double(), expected) <= allowed
    payload = batch * S * E * 2
    assert by_rank[1].rows == {
        LedgerKey("reduce_scatter", "tensor", world, "forward", ranked.SITE, "bfloat16", payload): 1,
        LedgerKey("all_gather", "tensor", world, "backward", ranked.SITE, "bfloat16", payload): 1,
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_own_part_of_the_positions(size):
    positions = torch.arange(S)
    parts = [Region(Axis("tensor", size, rank), split=True).own(positions) for rank in range(size)]
    assert torch.equal(torch.cat(parts), positions)
    assert all(len(part) == S // size for part in parts)
    assert torch.equal(Region(Axis("tensor", size, size - 1)).own(positions), positions)


@pytest.mark.parametrize("split", [False, True])
def test_one_rank_sends_nothing(split):
    region, x = Region(Axis("tensor"), split), randn(1, S, E)
    assert region.enter(x, "here").wait() is x
    assert region.leave(x, "here").wait() is x

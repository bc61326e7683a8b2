"""Tensor parallelism on real ranks: values against the unsharded operation and DTensor's, traffic against the contract.

Problems are float64 and whole; `ranked_tensor` cuts them. Every rank's results are compared.
"""

import pytest
import ranked_tensor as ranked
import torch
import torch.nn.functional as F
from reference.precision import error

from meshwright.account import LedgerKey
from meshwright.parallel.loss import IGNORE

B, S, E, FEATURES = 2, 3, 8, 12
WORLDS = pytest.mark.parametrize("world", [2, 4])
VOCABULARIES = pytest.mark.parametrize("vocab_size", [12, 10, 9, 5])
"""On 4 ranks: even; a last rank that is partly padding; ranks without a column of their own (9 and 5)."""

ROUNDING = 1e-13
"""Relative to the largest element: float64, sums of at most a few dozen terms."""


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def tokens_below(vocab_size, seed=0):
    return torch.randint(vocab_size, (B, S), generator=torch.Generator().manual_seed(seed))


def assert_equal(found, expected, tolerance=ROUNDING):
    assert found.shape == expected.shape
    assert error(found, expected) <= tolerance * expected.abs().max().clamp_min(1e-300)


def unsharded(function, leaves, dys):
    """Outputs and gradients on one device."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    return [y.detach() for y in outputs], torch.autograd.grad(outputs, leaves, dys)


def joined(parts, dim, size):
    """The whole of what ranks hold, padding cut off; the padding must be zero."""
    whole = torch.cat(parts, dim)
    assert not whole.narrow(dim, size, whole.shape[dim] - size).any()
    return whole.narrow(dim, 0, size)


def row_of(operation, world, phase, elements, dtype="float64", itemsize=8, count=1):
    return {LedgerKey(operation, "tensor", world, phase, ranked.SITE, dtype, elements * itemsize): count}


@WORLDS
@pytest.mark.parametrize("biased", [False, True])
def test_column_linear(ranks, world, biased):
    x, widths = randn(B, S, E), (FEATURES, 4)
    weights, dys = [randn(w, E) for w in widths], [randn(B, S, w, seed=1) for w in widths]
    biases = [randn(w, seed=2) for w in widths] if biased else []

    def plain(x, *p):
        return [F.linear(x, p[i], p[2 + i] if biased else None) for i in range(2)]

    ys, (dx, *dps) = unsharded(plain, [x, *weights, *biases], dys)
    by_rank = ranks(world).run(ranked.column, x, weights, biases, dys)
    for i, y in enumerate(ys):
        assert_equal(torch.cat([own.outputs[i] for own in by_rank], -1), y)
    for i, dp in enumerate(dps, start=1):
        assert_equal(torch.cat([own.gradients[i] for own in by_rank]), dp)
    for own in by_rank:
        assert_equal(own.gradients[0], dx)
        assert own.rows == row_of("all_reduce", world, "backward", B * S * E)


@WORLDS
@pytest.mark.parametrize("biased", [False, True])
def test_row_linear(ranks, world, biased):
    x, weight, dy = randn(B, S, FEATURES), randn(E, FEATURES), randn(B, S, E, seed=1)
    biases = [randn(E, seed=2)] if biased else []
    (y,), (dx, dw, *db) = unsharded(lambda *p: [F.linear(*p)], [x, weight, *biases], [dy])
    by_rank = ranks(world).run(ranked.row, x, weight, biases, dy)
    assert_equal(torch.cat([own.gradients[0] for own in by_rank], -1), dx)
    assert_equal(torch.cat([own.gradients[1] for own in by_rank], 1), dw)
    for own in by_rank:
        assert_equal(own.outputs[0], y)
        for found, expected in zip(own.gradients[2:], db, strict=True):
            assert_equal(found, expected)  # whole on every rank: the bias is added once, after the sum
        assert own.rows == row_of("all_reduce", world, "forward", B * S * E)


@WORLDS
@VOCABULARIES
def test_vocab_embedding(ranks, world, vocab_size):
    table, dy = randn(vocab_size, E), randn(B, S, E, seed=1)
    tokens = tokens_below(vocab_size)
    tokens[0, 0] = vocab_size - 1
    (y,), (dtable,) = unsharded(lambda w: [w[tokens]], [table], [dy])
    by_rank = ranks(world).run(ranked.embedding, tokens, table, dy)
    assert_equal(joined([own.gradients[0] for own in by_rank], 0, vocab_size), dtable)
    for own in by_rank:
        assert torch.equal(own.outputs[0], y)
        assert own.rows == row_of("all_reduce", world, "forward", B * S * E)


@WORLDS
@VOCABULARIES
def test_vocab_cross_entropy(ranks, world, vocab_size):
    logits, dloss = 3 * randn(B, S, vocab_size), torch.tensor(0.37, dtype=torch.float64)
    labels = tokens_below(vocab_size)
    labels[0, 0], labels[0, 1], labels[1, 2] = vocab_size - 1, IGNORE, IGNORE

    def plain(y):
        return [F.cross_entropy(y.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE)]

    (loss,), (dlogits,) = unsharded(plain, [logits], [dloss])
    by_rank = ranks(world).run(ranked.cross_entropy, logits, labels, 1e4, dloss)  # padding holds 1e4 and never enters
    assert_equal(joined([own.gradients[0] for own in by_rank], -1, vocab_size), dlogits)
    for own in by_rank:
        assert_equal(own.outputs[0], loss)
        sent = [row_of("all_reduce", world, "forward", n * B * S) for n in (1, 2)]
        assert own.rows == sent[0] | sent[1]


@WORLDS
def test_no_label_at_all(ranks, world):
    labels, one = torch.full((B, S), IGNORE), torch.ones((), dtype=torch.float64)
    for own in ranks(world).run(ranked.cross_entropy, randn(B, S, 6), labels, 0.0, one):
        assert own.outputs[0] == 0
        assert not own.gradients[0].any()


@WORLDS
def test_large_logits_do_not_overflow(ranks, world):
    """Float32 logits of ±1000, whose exponentials are not numbers."""
    logits = torch.linspace(-1000, 1000, B * S * 8).view(B, S, 8)
    labels = tokens_below(8)
    expected = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="sum")
    for own in ranks(world).run(ranked.cross_entropy, logits, labels, 0.0, torch.ones((), dtype=torch.float64)):
        assert_equal(own.outputs[0], expected, 4 * torch.finfo(torch.float32).eps)
        assert own.gradients[0].dtype == torch.float32
        assert own.gradients[0].isfinite().all()


def test_bf16_within_twice_plain_pytorch(ranks):
    """Activations in bf16, weights and their gradients in float32; half the bytes on the wire."""
    x, weight, dy = (t.bfloat16() for t in (randn(B, S, 64), randn(E, 64), randn(B, S, E, seed=1)))

    def results(*whole):
        (y,), gradients = unsharded(lambda *p: [F.linear(*p)], whole[:2], whole[2:])
        return [t.double() for t in (y, *gradients)]

    exact, plain = results(x.double(), weight.double(), dy.double()), results(x, weight, dy)
    by_rank = ranks(2).run(ranked.row, x, weight.float(), [], dy)
    ours = [
        by_rank[0].outputs[0],
        torch.cat([own.gradients[0] for own in by_rank], -1),
        torch.cat([own.gradients[1] for own in by_rank], 1),
    ]
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for found, same_precision, expected in zip(ours, plain, exact, strict=True):
        allowed = 2 * error(same_precision, expected) + torch.finfo(torch.bfloat16).eps * expected.abs().max()
        assert error(found.double(), expected) <= allowed
    assert by_rank[1].rows == row_of("all_reduce", 2, "forward", B * S * E, "bfloat16", 2)


@WORLDS
def test_dtensor_column_row(ranks, world):
    """torch's ColwiseParallel and RowwiseParallel on the same weights."""
    x, up, down, dy = randn(B, S, E), randn(FEATURES, E), randn(E, FEATURES, seed=1), randn(B, S, E, seed=1)
    for theirs, ours in ranks(world).run(ranked.dtensor_pair, x, up, down, dy):
        for expected, found in zip(theirs, ours, strict=True):
            assert_equal(found, expected)


@WORLDS
def test_dtensor_loss_parallel(ranks, world):
    """torch's loss_parallel on the same logits, some labels ignored."""
    logits, labels = 3 * randn(B, S, 12), tokens_below(12)
    labels[1, 0] = IGNORE
    theirs = ranks(world).run(ranked.dtensor_loss, logits, labels)
    ours = ranks(world).run(ranked.cross_entropy, logits, labels, 0.0, torch.ones((), dtype=torch.float64))
    for (loss, dlogits), own in zip(theirs, ours, strict=True):
        assert_equal(own.outputs[0], loss)
        assert_equal(own.gradients[0], dlogits)


@WORLDS
def test_dtensor_embedding(ranks, world):
    """torch's row-wise embedding on the same table."""
    table, dy, tokens = randn(12, E), randn(B, S, E, seed=1), tokens_below(12)
    theirs = ranks(world).run(ranked.dtensor_embedding, tokens, table, dy)
    ours = ranks(world).run(ranked.embedding, tokens, table, dy)
    for (y, dtable), own in zip(theirs, ours, strict=True):
        assert_equal(own.outputs[0], y)
        assert_equal(own.gradients[0], dtable)

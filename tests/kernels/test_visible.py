"""Attention within documents: output, log-sum-exp and every gradient against a masked softmax written out.

Tiles are made short, so that small problems have several; one test has the length that the kernel is used with.
"""

import math

import pytest
import torch
from reference.precision import assert_exact, assert_within_twice, error

from meshwright.kernels import visible as module
from meshwright.kernels.attention import attention_backward, attention_forward, causal_attention
from meshwright.kernels.visible import Visible, tiles, visible_backward
from meshwright.schemes.attention import QUERY_TILE

KERNEL = "sdpa_cpu"
TILE = 8
"""For 19 queries: two full tiles and a rest."""

HEADS = {"multi-head": (4, 4), "grouped": (6, 2), "multi-query": (4, 1)}

DOCUMENTS = {
    "one a row": [[19], [19]],
    "another division for each row": [[3, 9, 7], [11, 8]],
    "of one token": [[1, 17, 1], [5, 1, 1, 12]],
    "all of one token": [[1] * 19, [19]],
    "beginning with a tile": [[8, 8, 3], [16, 3]],
}
"""Their lengths, for each of two rows."""


@pytest.fixture
def _short_tiles(monkeypatch):
    monkeypatch.setattr(module, "QUERY_TILE", TILE)


def beginnings(lengths):
    """[B, S]: the position at which the document of each token begins."""
    rows = [[start for n, start in zip(row, starts_of(row), strict=True) for _ in range(n)] for row in lengths]
    return torch.tensor(rows)


def starts_of(row):
    return [sum(row[:i]) for i in range(len(row))]


def inputs(heads, kv_heads, S=19, Z=None, B=2, D=8):
    generator = torch.Generator().manual_seed(heads * 10 + kv_heads)
    lengths = (S, heads), (Z or S, kv_heads), (Z or S, kv_heads)
    return [torch.randn(B, n, h, D, generator=generator, dtype=torch.float64) for n, h in lengths]


def seen_in(first, queries, keys):
    """[B, 1, S, Z]: by the definition, one pair of positions at a time."""
    seen = [
        [[begin <= key <= query for key in keys.tolist()] for query, begin in zip(queries.tolist(), row, strict=True)]
        for row in first.tolist()
    ]
    return torch.tensor(seen).unsqueeze(1)


def plain_scores(q, k):
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return torch.einsum("bshd,bthd->bhst", q, k) / math.sqrt(q.shape[-1])


def plain(q, k, v, seen):
    """Masked softmax; a row that sees no key is zero, and so is its gradient."""
    v, empty = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2), ~seen.any(-1, keepdim=True)
    weights = plain_scores(q, k).masked_fill(~seen & ~empty, -math.inf).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights.masked_fill(empty, 0), v)


def plain_lse(q, k, seen):
    return plain_scores(q, k).masked_fill(~seen, -math.inf).logsumexp(-1)


class Block(torch.autograd.Function):
    """One block of a ring, differentiable.

    Queries that see no key of the block see others elsewhere: in backward their output and log-sum-exp are of those.
    """

    @staticmethod
    def forward(ctx, q, k, v, visible):
        out, lse, _ = attention_forward(q, k, v, KERNEL, causal=False, visible=visible)
        empty = lse == -math.inf
        of_others = out.masked_fill(empty.transpose(1, 2).unsqueeze(-1), 0.5), lse.masked_fill(empty, 1.5)
        ctx.saved, ctx.visible = (q, k, v, *of_others), visible
        return out

    @staticmethod
    def backward(ctx, dout):
        return *attention_backward(dout, *ctx.saved, (), KERNEL, causal=False, visible=ctx.visible), None


def whole(first):
    """Ours and plain, for queries and keys of a whole sequence."""
    positions = torch.arange(first.shape[1])
    seen = seen_in(first, positions, positions)
    return lambda q, k, v: causal_attention(q, k, v, KERNEL, first)[0], lambda q, k, v: plain(q, k, v, seen)


def test_tiles():
    assert tiles(QUERY_TILE) == [slice(0, QUERY_TILE)]
    assert tiles(2 * QUERY_TILE + 5) == [slice(0, 128), slice(128, 256), slice(256, 261)]


@pytest.mark.usefixtures("_short_tiles")
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("heads", HEADS)
def test_float64(documents, heads):
    first = beginnings(DOCUMENTS[documents])
    ours, plainly = whole(first)
    q, k, v = inputs(*HEADS[heads])
    assert_exact(ours, plainly, [q, k, v])
    _, lse = causal_attention(q.requires_grad_(), k, v, KERNEL, first)
    positions = torch.arange(19)
    assert not lse.requires_grad
    assert error(lse, plain_lse(q, k, seen_in(first, positions, positions))) <= 1e-13


@pytest.mark.usefixtures("_short_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_twice_the_error_of_plain_pytorch(heads, dtype):
    ours, plainly = whole(beginnings(DOCUMENTS["another division for each row"]))
    assert_within_twice(ours, plainly, inputs(*HEADS[heads]), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_tiles_as_they_are(dtype):
    """Two full tiles and a rest; a document that covers parts of all three."""
    ours, plainly = whole(beginnings([[100, 160, 9], [269]]))
    problem = inputs(2, 1, S=2 * QUERY_TILE + 13)
    if dtype == torch.float64:
        assert_exact(ours, plainly, problem)
    else:
        assert_within_twice(ours, plainly, problem, dtype)


@pytest.mark.parametrize("tile", [TILE, QUERY_TILE])
def test_one_document_is_causal_attention(monkeypatch, tile):
    monkeypatch.setattr(module, "QUERY_TILE", tile)
    first = torch.zeros(2, 19, dtype=torch.int64)
    assert_exact(
        lambda q, k, v: causal_attention(q, k, v, KERNEL, first)[0],
        lambda q, k, v: causal_attention(q, k, v, KERNEL)[0],
        inputs(6, 2),
    )


@pytest.mark.usefixtures("_short_tiles")
def test_documents_do_not_see_each_other():
    """To the bit, and in both directions."""
    first, (q, k, v) = beginnings([[7, 12], [7, 12]]), inputs(4, 2)
    out = causal_attention(q, k, v, KERNEL, first)[0]
    for own, other in ((slice(0, 7), slice(7, 19)), (slice(7, 19), slice(0, 7))):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, other] += 1
        found = causal_attention(*changed, KERNEL, first)[0]
        assert torch.equal(found[:, own], out[:, own])
        assert not torch.equal(found[:, other], out[:, other])


def chunks(length, *numbers):
    """Positions of the chunks that a rank of a ring holds."""
    return torch.cat([torch.arange(n * length, (n + 1) * length) for n in numbers])


BLOCKS = {
    "earlier keys": (chunks(6, 2, 3), chunks(6, 0, 1)),
    "first and last chunk, keys from between": (chunks(6, 0, 3), chunks(6, 1, 2)),
    "chunks between, keys of the first and last": (chunks(6, 1, 2), chunks(6, 0, 3)),
    "more keys than queries": (chunks(6, 3), chunks(6, 0, 1, 3)),
    "later keys": (chunks(6, 0, 1), chunks(6, 2, 3)),
    "keys in no order": (chunks(6, 1, 2), chunks(3, 6, 2, 4, 0)),
}
"""Queries and keys of a sequence of 24. Of the fourth all queries see a key, of the fifth none, of the others some."""

WITHIN = [[2, 9, 1, 12], [15, 9]]


def block_of(name):
    queries, keys = BLOCKS[name]
    first = beginnings(WITHIN)[:, queries]
    return Visible(first, queries, keys), seen_in(first, queries, keys)


def test_blocks_are_what_they_claim():
    empty = {name: ~block_of(name)[1].any(-1) for name in BLOCKS}
    assert {name for name in BLOCKS if not empty[name].any()} == {"more keys than queries"}
    assert {name for name in BLOCKS if empty[name].all()} == {"later keys"}


@pytest.mark.usefixtures("_short_tiles")
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("heads", HEADS)
def test_keys_at_other_positions(name, heads):
    """A block of a ring: rows that see no key have output 0, log-sum-exp -inf, and gradients that add nothing."""
    visible, seen = block_of(name)
    q, k, v = inputs(*HEADS[heads], S=len(visible.queries_S), Z=len(visible.keys_Z))
    out, lse, random = attention_forward(q, k, v, KERNEL, causal=False, visible=visible)
    empty = ~seen.any(-1).expand(lse.shape)
    expected = plain_lse(q, k, seen)
    assert random == ()
    assert not out.transpose(1, 2)[empty].any()
    assert (lse[empty] == -math.inf).all()
    assert error(lse.masked_fill(empty, 0), expected.masked_fill(empty, 0)) <= 1e-13
    assert error(out, plain(q, k, v, seen)) <= 1e-12

    leaves = [x.requires_grad_() for x in (q, k, v)]
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    found = torch.autograd.grad(Block.apply(*leaves, visible), leaves, dout)
    wanted = torch.autograd.grad(plain(*leaves, seen), leaves, dout)
    for a, b in zip(found, wanted, strict=True):
        assert error(a, b) <= 1e-12
    assert not found[0].transpose(1, 2)[empty].any()
    unseen = ~seen.any(dim=(1, 2))
    assert not any(dx[unseen].any() for dx in found[1:]), "keys that nobody sees"


@pytest.mark.usefixtures("_short_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_within_twice_plain_pytorch(name, dtype):
    visible, seen = block_of(name)
    problem = inputs(6, 2, S=len(visible.queries_S), Z=len(visible.keys_Z))
    assert_within_twice(
        lambda q, k, v: Block.apply(q, k, v, visible), lambda q, k, v: plain(q, k, v, seen), problem, dtype
    )


@pytest.mark.usefixtures("_short_tiles")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dtypes_and_shapes(dtype):
    visible, _ = block_of("more keys than queries")
    q, k, v = (x.to(dtype) for x in inputs(6, 2, S=len(visible.queries_S), Z=len(visible.keys_Z)))
    out, lse, _ = attention_forward(q, k, v, KERNEL, causal=False, visible=visible)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert (lse.shape, lse.dtype) == ((2, 6, 6), torch.promote_types(dtype, torch.float32))
    gradients = attention_backward(out, q, k, v, out, lse, (), KERNEL, causal=False, visible=visible)
    assert [(dx.shape, dx.dtype) for dx in gradients] == [(x.shape, dtype) for x in (q, k, v)]
    expanded = q, k.repeat_interleave(3, dim=2), v.repeat_interleave(3, dim=2)
    heads_first = [x.transpose(1, 2) for x in (out, *expanded, out)]
    dq, dk, dv = visible_backward(*heads_first, lse, visible)
    sums = torch.promote_types(dtype, torch.float32)  # over tiles
    assert [(dx.shape, dx.dtype) for dx in (dq, dk, dv)] == [
        (x.shape, d) for x, d in zip(expanded, (dtype, sums, sums), strict=True)
    ]


@pytest.mark.usefixtures("_short_tiles")
def test_log_sum_exp_over_more_keys_than_the_block_has():
    """Then gradients are the block's shares: those of two blocks add up to those of both together.

    No query of the first row sees keys of the first block: its shares are nothing at all.
    """
    queries, first = chunks(6, 2, 3), beginnings(WITHIN)[:, 12:]
    q, k, v = inputs(4, 2, S=12, Z=24)
    both = Visible(first, queries, torch.arange(24))
    out, lse, _ = attention_forward(q, k, v, KERNEL, causal=False, visible=both)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    dq, dk, dv = attention_backward(dout, q, k, v, out, lse, (), KERNEL, causal=False, visible=both)
    shares = []
    for columns in (slice(0, 12), slice(12, 24)):
        part = Visible(first, queries, torch.arange(24)[columns])
        saved = q, k[:, columns], v[:, columns], out, lse, ()
        shares.append(attention_backward(dout, *saved, KERNEL, causal=False, visible=part))
    assert not any(share[0].any() for share in shares[0])
    assert all(share[1].any() for share in shares[0])
    assert error(shares[0][0] + shares[1][0], dq) <= 1e-12
    for i, whole_gradient in ((1, dk), (2, dv)):
        assert error(torch.cat([share[i] for share in shares], 1), whole_gradient) <= 1e-12


def test_gradients_in_any_memory_order():
    """Autograd may hand us a gradient of any strides."""
    ours, plainly = whole(beginnings(DOCUMENTS["of one token"]))
    q, k, v = (x.requires_grad_() for x in inputs(4, 2))
    dout = torch.randn(2, 4, 8, 19, dtype=torch.float64).permute(0, 3, 1, 2)
    found = torch.autograd.grad(ours(q, k, v), (q, k, v), dout)
    expected = torch.autograd.grad(plainly(q, k, v), (q, k, v), dout)
    assert all(error(a, b) <= 1e-12 for a, b in zip(found, expected, strict=True))

"""The references of flash attention: against the definition, one query at a time, and against each other in float64.

Tiles are short, so that small problems have several, whole and ragged, on both sides.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.precision import assert_exact, assert_within_twice, error

from meshwright.kernels import reference
from meshwright.kernels.reference import naive_attention, tiled_attention, tiled_attention_backward


def problem(S, Z, H, K, D, B=2, seed=0):
    """q, k, v in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, n, h, D, generator=generator, dtype=torch.float64) for n, h in ((S, H), (Z, K), (Z, K))]


def by_hand(q, k, v, causal, offset):
    """By the definition, for one query of one head at a time."""
    (B, S, H, D), (Z, K) = q.shape, k.shape[1:3]
    out, lse = torch.zeros_like(q), q.new_full((B, H, S), -math.inf)
    for b in range(B):
        for h in range(H):
            for i in range(S):
                keys = [j for j in range(Z) if not causal or j <= i + offset]
                if keys:
                    scores = k[b, keys, h * K // H] @ q[b, i, h] / math.sqrt(D)
                    lse[b, h, i] = scores.exp().sum().log()
                    out[b, i, h] = (scores - lse[b, h, i]).exp() @ v[b, keys, h * K // H]
    return out, lse


class Tiled(torch.autograd.Function):
    """Algorithms 1 and 2 as one operation."""

    @staticmethod
    def forward(ctx, q, k, v, options):
        out, lse = tiled_attention(q, k, v, **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, dout):
        return *tiled_attention_backward(dout, *ctx.saved_tensors, **ctx.options), None


def assert_same(found, expected, limit=1e-13):
    """Equal lse, infinities at the same places; equal outputs."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        infinite = b == -math.inf
        assert torch.equal(a == -math.inf, infinite)
        if b.numel():
            assert error(a.masked_fill(infinite, 0), b.masked_fill(infinite, 0)) <= limit


CASES = {
    "causal": (7, 7, True, 0),
    "full": (7, 5, False, 0),
    "more keys": (4, 9, True, 2),
    "rows that see nothing": (7, 5, True, -3),
    "no row sees anything": (3, 4, True, -3),
    "all see all": (3, 4, True, 3),
    "no keys": (3, 0, False, 0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
def test_flash_naive_reference_is_the_definition(heads, case):
    S, Z, causal, offset = CASES[case]
    q, k, v = problem(S, Z, *heads, D=8)
    assert_same(naive_attention(q, k, v, causal=causal, offset=offset), by_hand(q, k, v, causal, offset))


@given(
    S=st.integers(1, 12),
    Z=st.integers(0, 12),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    causal=st.booleans(),
    offset=st.integers(-14, 14),
    blocks=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=60)
def test_flash_tiled_reference_equals_the_naive_one(S, Z, heads, causal, offset, blocks, seed):
    """Output, log-sum-exp and, for any tiles, every gradient."""
    q, k, v = problem(S, Z, *heads, D=4, B=1, seed=seed)
    mask = {"causal": causal, "offset": offset}
    options = mask | {"block_q": blocks[0], "block_k": blocks[1]}
    assert_same(tiled_attention(q, k, v, **options), naive_attention(q, k, v, **mask))
    dout = problem(S, Z, *heads, D=4, B=1, seed=seed + 1)[0]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    found = torch.autograd.grad(Tiled.apply(*leaves, options), leaves, dout)
    expected = torch.autograd.grad(naive_attention(*leaves, **mask)[0], leaves, dout)
    assert_same(found, expected, limit=1e-12)


def test_flash_references_have_no_gradient_of_the_log_sum_exp():
    q, k, v = (x.requires_grad_() for x in problem(3, 3, 2, 1, D=4))
    out, lse = naive_attention(q, k, v, causal=True)
    assert out.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_flash_tiled_reference_within_twice_the_error_of_the_naive_one(causal, dtype):
    options = {"causal": causal, "block_q": 16, "block_k": 8}
    assert_within_twice(
        lambda q, k, v: Tiled.apply(q, k, v, options),
        lambda q, k, v: naive_attention(q, k, v, causal=causal)[0],
        problem(40, 40, 4, 2, D=16),
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", [naive_attention, tiled_attention])
def test_flash_references_keep_dtypes(attention, dtype):
    q, k, v = (x.to(dtype) for x in problem(5, 7, 4, 2, D=8))
    out, lse = attention(q, k, v, causal=True)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert (lse.shape, lse.dtype) == ((2, 4, 5), torch.promote_types(dtype, torch.float32))
    gradients = tiled_attention_backward(out, q, k, v, out, lse, causal=True)
    assert [(d.shape, d.dtype) for d in gradients] == [(x.shape, dtype) for x in (q, k, v)]


def test_flash_tiled_reference_looks_at_no_tile_that_the_mask_forbids():
    rows = list(reference.tiles(10, 4))
    assert rows == [range(4), range(4, 8), range(8, 10)]
    assert [len(list(reference.visited(r, 10, 4, True, 0))) for r in rows] == [1, 2, 3]
    assert [len(list(reference.visited(r, 10, 4, True, -4))) for r in rows] == [0, 1, 2]
    assert [len(list(reference.visited(r, 10, 4, False, 0))) for r in rows] == [3, 3, 3]


@pytest.mark.parametrize("fault", [{"offset": 1}, {"offset": -1}, {"causal": False}], ids=str)
def test_flash_a_wrong_mask_is_noticed(fault):
    """A test of the tests: what they compare with tells one key from another."""
    q, k, v = problem(9, 9, 2, 2, D=8)
    wrong = {"causal": True, "offset": 0, "block_q": 4, "block_k": 4} | fault
    with pytest.raises(AssertionError):
        assert_same(tiled_attention(q, k, v, **wrong), naive_attention(q, k, v, causal=True))
    with pytest.raises(AssertionError):
        assert_exact(
            lambda q, k, v: Tiled.apply(q, k, v, wrong),
            lambda q, k, v: naive_attention(q, k, v, causal=True)[0],
            [q, k, v],
        )

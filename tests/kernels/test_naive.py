"""Attention without a fused kernel: output, log-sum-exp and gradients, of a sequence and of a block of a ring."""

from __future__ import annotations

import math

import pytest
import torch
from reference.precision import assert_exact, assert_within_twice

from meshwright.kernels.attention import attention_backward, attention_forward, causal_attention

SHAPES = {"multi-head": (4, 4), "grouped": (6, 2), "multi-query": (4, 1), "one head": (1, 1)}


def inputs(heads: int, kv_heads: int, S: int = 19, D: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(heads * 10 + kv_heads)
    shapes = ((2, S, heads, D), (2, S, kv_heads, D), (2, S, kv_heads, D))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def plain_scores(q: torch.Tensor, k: torch.Tensor, *, causal: bool = True) -> torch.Tensor:
    scores = torch.einsum("bshd,bthd->bhst", q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2))
    hidden = torch.full_like(scores, -math.inf).triu(1) if causal else 0
    return scores / math.sqrt(q.shape[-1]) + hidden


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhst,bthd->bshd", torch.softmax(plain_scores(q, k), dim=-1), v)


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return causal_attention(q, k, v, "naive")[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_float64(shape: str) -> None:
    assert_exact(ours, plain, inputs(*SHAPES[shape]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_twice_the_error_of_plain_pytorch(shape: str, dtype: torch.dtype) -> None:
    assert_within_twice(ours, plain, inputs(*SHAPES[shape]), dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_log_sum_exp(shape: str) -> None:
    q, k, v = inputs(*SHAPES[shape])
    _, lse = causal_attention(q.requires_grad_(), k, v, "naive")
    assert not lse.requires_grad
    assert torch.allclose(lse, torch.logsumexp(plain_scores(q, k), dim=-1), rtol=1e-13)


def test_the_future_is_not_seen() -> None:
    q, k, v = inputs(4, 2)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, 7:] += 1
    assert torch.equal(ours(q, k, v)[:, :7], ours(*changed)[:, :7])


def test_gradients_in_any_memory_order() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(4, 2))
    dout = torch.randn(2, 4, 16, 19, dtype=torch.float64).permute(0, 3, 1, 2)
    found = torch.autograd.grad(ours(q, k, v), (q, k, v), dout)
    expected = torch.autograd.grad(plain(q, k, v), (q, k, v), dout)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_it_saves_what_plain_autograd_does() -> None:
    """q, k, v and the probabilities; neither out nor the log-sum-exp."""
    q, k, v = (x.to(torch.bfloat16).requires_grad_() for x in inputs(4, 2))
    saved: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ours(q, k, v)
    assert [x.data_ptr() for x in saved[:3]] == [x.data_ptr() for x in (q, k, v)]
    (probabilities,) = saved[3:]
    assert (probabilities.numel(), probabilities.dtype) == (2 * 4 * 19 * 19, torch.bfloat16)


@pytest.mark.parametrize("kernel", ["naive", "sdpa_cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_blocks_add_up(kernel: str, dtype: torch.dtype) -> None:
    """Late queries: a full block of early keys and a causal one of their own; gradients from output and log-sum-exp
    over both."""
    q, k, v = inputs(6, 2, S=24)
    out, lse = (x[..., 12:] for x in (plain(q, k, v).transpose(1, 3), torch.logsumexp(plain_scores(q, k), -1)))
    out_BSHD = out.transpose(1, 3)
    dout = torch.randn(out_BSHD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(plain(*leaves)[:, 12:], leaves, dout)
    exact = lse if dtype == torch.float64 else lse.float()
    sums = [torch.zeros_like(x) for x in (q, k, v)]
    for rows, causal in ((slice(0, 12), False), (slice(12, 24), True)):
        block = [x.to(dtype) for x in (q[:, 12:], k[:, rows], v[:, rows])]
        part, lse_of_part, random = attention_forward(*block, kernel, causal=causal)  # type: ignore[arg-type]
        assert part.shape == out_BSHD.shape and lse_of_part.shape == lse.shape
        assert torch.allclose(
            lse_of_part.double(),
            torch.logsumexp(plain_scores(block[0].double(), block[1].double(), causal=causal), -1),
            rtol=0,
            atol=1e-12 if dtype == torch.float64 else 0.02,
        )
        operands = dout.to(dtype), *block, out_BSHD.to(dtype), exact, random
        dq, dk, dv = attention_backward(*operands, kernel, causal=causal)  # type: ignore[arg-type]
        for total, where, term in zip(sums, (slice(12, 24), rows, rows), (dq, dk, dv), strict=True):
            total[:, where] += term
    tolerance = 1e-12 if dtype == torch.float64 else 0.03
    for found, wanted in zip(sums, expected, strict=True):
        assert (found - wanted).norm() <= tolerance * wanted.norm()

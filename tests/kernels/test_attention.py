"""Causal attention: output, log-sum-exp and every gradient against the score matrix written out."""

import math
from typing import get_args

import pytest
import torch
from reference.precision import assert_exact, assert_within_twice

from meshwright.config.attention import Kernel
from meshwright.kernels.attention import causal_attention, choose_kernel
from meshwright.schemes.attention import expands_heads

SHAPES = {"multi-head": (4, 4), "grouped": (6, 2), "multi-query": (4, 1), "one head": (1, 1)}


def inputs(heads, kv_heads, S=19, D=16):
    generator = torch.Generator().manual_seed(heads * 10 + kv_heads)
    shapes = ((2, S, heads, D), (2, S, kv_heads, D), (2, S, kv_heads, D))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def plain_scores(q, k):
    """[B, H, S, S], -inf above the diagonal."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bshd,bthd->bhst", q, k) / math.sqrt(q.shape[-1])
    return scores + torch.full_like(scores, -math.inf).triu(1)


def plain(q, k, v):
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhst,bthd->bshd", torch.softmax(plain_scores(q, k), dim=-1), v)


def ours(q, k, v):
    return causal_attention(q, k, v, "sdpa_cpu")[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_float64(shape):
    assert_exact(ours, plain, inputs(*SHAPES[shape]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_twice_the_error_of_plain_pytorch(shape, dtype):
    assert_within_twice(ours, plain, inputs(*SHAPES[shape]), dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_log_sum_exp(shape):
    q, k, v = inputs(*SHAPES[shape])
    _, lse = causal_attention(q.requires_grad_(), k, v, "sdpa_cpu")
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert not lse.requires_grad
    assert torch.allclose(lse, torch.logsumexp(plain_scores(q, k), dim=-1), rtol=1e-13)


def test_the_future_is_not_seen():
    q, k, v = inputs(4, 2)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, 7:] += 1
    assert torch.equal(ours(q, k, v)[:, :7], ours(*changed)[:, :7])


def test_gradients_in_any_memory_order():
    """Autograd may hand us a gradient of any strides."""
    q, k, v = (x.requires_grad_() for x in inputs(4, 2))
    dout = torch.randn(2, 4, 16, 19, dtype=torch.float64).permute(0, 3, 1, 2)
    found = torch.autograd.grad(ours(q, k, v), (q, k, v), dout)
    expected = torch.autograd.grad(plain(q, k, v), (q, k, v), dout)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_the_kernel_follows_the_device():
    assert choose_kernel("sdpa", "cpu", torch.bfloat16) == "sdpa_cpu"
    assert choose_kernel("sdpa", "cuda", torch.bfloat16) == "sdpa_flash"
    assert choose_kernel("sdpa", "cuda", torch.float32) == "sdpa_efficient"
    expanding = [kernel for kernel in get_args(Kernel) if expands_heads(kernel, 8, 2)]
    assert expanding == ["naive", "sdpa_cpu", "sdpa_efficient"]
    assert not expands_heads("sdpa_cpu", 8, 8)

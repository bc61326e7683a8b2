"""torch's FlexAttention behind our operators: numbers on a GPU, and what a rehearsal sees of it without one."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from reference.precision import assert_within_twice
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_block_mask

from meshwright.audit.recorder import Recorder
from meshwright.comm import torch_private
from meshwright.kernels.attention import attention_backward, attention_forward, causal_attention
from meshwright.kernels.flex import block_mask

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch compiles its backward for GPUs only")


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.full_like(scores, -math.inf).triu(1)
    return torch.einsum("bhst,bthd->bshd", torch.softmax(scores + hidden, dim=-1), v)


def inputs(device: str, S: int = 200, D: int = 64, heads: int = 4, kv_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, S, heads, D), (2, S, kv_heads, D), (2, S, kv_heads, D))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]


@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (200, 200), (640, 640), (200, 640), (384, 100)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_the_block_mask_is_that_of_torch(shape: tuple[int, int], causal: bool) -> None:
    if causal and shape[0] != shape[1]:
        return
    ours = block_mask(*shape, causal, torch.device("cpu"))
    theirs = create_block_mask(ours.mask_mod, None, None, *shape, device="cpu")
    for a, b in zip(ours.as_tuple()[:-1], theirs.as_tuple()[:-1], strict=True):
        if isinstance(a, torch.Tensor) and a.dim() == 4:
            continue  # the order of blocks that are not counted is free
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert torch.equal(ours.to_dense(), theirs.to_dense())


def test_nothing_is_differentiated_where_backward_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the autograd engine's thread waits for it: whatever it differentiated there would wait for ever."""
    monkeypatch.setattr(torch.autograd, "grad", pytest.fail)
    q, k, v = (x.float().transpose(1, 2) for x in inputs("cpu"))
    trace = make_fx(functools.partial(torch_private.flex_backward, block_mask(200, 200, True, q.device)))
    calls = [node.target for node in trace(q, k, v, q, q, q[..., 0]).graph.nodes]
    assert torch.ops.higher_order.flex_attention_backward in calls


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
def test_twice_the_error_of_plain_pytorch(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    tensors = inputs("cuda", heads=heads[0], kv_heads=heads[1])
    assert_within_twice(lambda q, k, v: causal_attention(q, k, v, "flex")[0], plain, tensors, dtype)


@on_gpu
def test_blocks_of_a_ring_add_up() -> None:
    q, k, v = (x.bfloat16() for x in inputs("cuda", S=256))
    out, lse = causal_attention(q, k, v, "flex")
    dout = torch.randn_like(out)[:, 128:]
    late = out[:, 128:], lse[..., 128:]
    total = torch.zeros_like(q[:, 128:], dtype=torch.float32)
    for rows, causal in ((slice(0, 128), False), (slice(128, 256), True)):
        block = q[:, 128:], k[:, rows], v[:, rows]
        assert attention_forward(*block, "flex", causal=causal)[0].shape == total.shape
        total += attention_backward(dout, *block, *late, (), "flex", causal=causal)[0]
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(plain(*leaves)[:, 128:], leaves, dout.float())[0][:, 128:]
    assert (total - expected).norm() <= 0.02 * expected.norm()


@on_gpu
def test_no_score_matrix_is_made_while_a_recorder_looks_on() -> None:
    q, k, v = (x.bfloat16().requires_grad_() for x in inputs("cuda", S=4096, heads=8, kv_heads=8))
    scores = 2 * 8 * 4096**2 * 2
    for _ in range(2):  # the first compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with Recorder() as recorder:
            causal_attention(q, k, v, "flex")[0].sum().backward()
        for x in (q, k, v):
            x.grad = None
    assert torch.cuda.max_memory_allocated() - before < scores / 2
    kinds = [event.kind for event in recorder.trace().events if hasattr(event, "kind")]
    assert kinds.count("attention") == 2


def test_a_rehearsal_sees_two_operations_and_what_they_make() -> None:
    with torch_private.FakeTensorMode():
        q, k, v = (x.bfloat16().requires_grad_() for x in inputs("cpu"))
        out, lse = causal_attention(q, k, v, "flex")
        found = torch.autograd.grad(out.sum(), (q, k, v))
    assert (out.shape, out.dtype, out.is_contiguous()) == (q.shape, torch.bfloat16, True)
    assert (lse.shape, lse.dtype) == ((2, 4, 200), torch.float32)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in (q, k, v)]

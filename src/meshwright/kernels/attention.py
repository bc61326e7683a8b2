"""Causal attention on one device: a dispatcher over kernels, and the block contract that they keep.

    q_BSHD  [B, S, H, D]    queries
    k_BSKD  [B, S, K, D]    keys; H/K query heads share one key head
    v_BSKD  [B, S, K, D]    values
    ->
    out_BSHD [B, S, H, D]   in the dtype of q
    lse_BHS  [B, H, S]      log-sum-exp of the scaled scores, float32 (float64 for float64)

    forward   out = softmax(q kᵀ/√D + causal mask) v
    saved     q, k, v, out, lse: no score matrix is kept (on CUDA also the kernel's random state, a few bytes)
    FLOPs     4·B·H·S²·D forward, 10·B·H·S²·D backward (the scores again), the masked half included

The kernel follows the *job's* device, not a tensor's, so that a rehearsal on a laptop calls what the GPU would call.
"""

from __future__ import annotations

from typing import Any

import torch

from meshwright.schemes.local import Kernel, attention_kernel, expands_heads

aten = torch.ops.aten


def choose_kernel(attention: str, device_kind: str, dtype: torch.dtype) -> Kernel:
    """The kernel of `training.attention` (only `sdpa` exists) for a job's device and compute dtype."""
    assert attention == "sdpa", attention
    return attention_kernel(device_kind, half=dtype in (torch.bfloat16, torch.float16))


def causal_attention(
    q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, kernel: Kernel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention by the contract above; the gradient of `lse` is not propagated."""
    return _CausalAttention.apply(q_BSHD, k_BSKD, v_BSKD, kernel)


def _expand(x_BSKD: torch.Tensor, heads: int) -> torch.Tensor:
    B, S, K, D = x_BSKD.shape
    if heads == K:
        return x_BSKD
    return x_BSKD.unsqueeze(3).expand(B, S, K, heads // K, D).reshape(B, S, heads, D)


def _collapse(dx_BSHD: torch.Tensor, kv_heads: int) -> torch.Tensor:
    B, S, H, D = dx_BSHD.shape
    if kv_heads == H:
        return dx_BSHD
    return dx_BSHD.reshape(B, S, kv_heads, H // kv_heads, D).sum(dim=3)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: Kernel) -> Any:
        ctx.set_materialize_grads(False)
        ctx.kernel = kernel
        random: tuple[Any, ...] = ()
        heads = q.shape[2] if expands_heads(kernel, q.shape[2], k.shape[2]) else k.shape[2]
        q_BHSD, k_BHSD, v_BHSD = q.transpose(1, 2), _expand(k, heads).transpose(1, 2), _expand(v, heads).transpose(1, 2)
        if kernel == "flash_for_cpu":
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q_BHSD, k_BHSD, v_BHSD, 0.0, True)
        elif kernel == "flash":
            out, lse, *_, seed, offset, _ = aten._scaled_dot_product_flash_attention(q_BHSD, k_BHSD, v_BHSD, 0.0, True)
            random = (seed, offset)
        else:
            out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
                q_BHSD, k_BHSD, v_BHSD, None, True, 0.0, True
            )
            random = (seed, offset)
        out_BSHD = out.transpose(1, 2)
        ctx.save_for_backward(q, k, v, out_BSHD, lse, *random)
        ctx.mark_non_differentiable(lse)
        return out_BSHD, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, _: Any) -> Any:
        q, k, v, out_BSHD, lse, *random = ctx.saved_tensors
        heads = q.shape[2] if expands_heads(ctx.kernel, q.shape[2], k.shape[2]) else k.shape[2]
        q_BHSD, k_BHSD, v_BHSD = q.transpose(1, 2), _expand(k, heads).transpose(1, 2), _expand(v, heads).transpose(1, 2)
        out, dout_BHSD, S = out_BSHD.transpose(1, 2), dout.transpose(1, 2), q.shape[1]
        if ctx.kernel == "flash_for_cpu":
            dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout_BHSD, q_BHSD, k_BHSD, v_BHSD, out, lse, 0.0, True
            )
        elif ctx.kernel == "flash":
            dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
                dout_BHSD, q_BHSD, k_BHSD, v_BHSD, out, lse, None, None, S, S, 0.0, True, *random
            )
        else:
            dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
                dout_BHSD, q_BHSD, k_BHSD, v_BHSD, None, out, lse, *random, 0.0, [True, True, True, False], True
            )
        return (
            dq.transpose(1, 2),
            _collapse(dk.transpose(1, 2), k.shape[2]),
            _collapse(dv.transpose(1, 2), k.shape[2]),
            None,
        )

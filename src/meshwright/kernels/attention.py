"""Causal attention on one device: a dispatcher over kernels, and the block contract that they keep.

    naive                        products and softmax as separate operations (`kernels.naive`)
    sdpa_cpu, _flash, _efficient torch's fused kernels, behind its scaled-dot-product attention
    flash                        ours, FlashAttention-2 in Triton (`kernels.flash_attention`)
    flex                         torch's FlexAttention, compiled (`kernels.flex`)

    q_BSHD  [B, S, H, D]    queries
    k_BSKD  [B, S, K, D]    keys; H/K query heads share one key head
    v_BSKD  [B, S, K, D]    values
    ->
    out_BSHD [B, S, H, D]   in the dtype of q
    lse_BHS  [B, H, S]      log-sum-exp of the scaled scores, float32 (float64 for float64)

    forward   out = softmax(q kᵀ/√D + causal mask) v
    saved     q, k, v, out, lse: no score matrix is kept (torch's kernels for CUDA: their random state, a few bytes)
    FLOPs     4·B·H·S²·D forward, 10·B·H·S²·D backward (the scores again), the masked half included in torch's kernels;
              in ours by whole tiles (`schemes.flash`), 2 products forward and 7 backward

Of naive these are other: it says so itself.

The kernel follows the *job's* device, not a tensor's, so that a rehearsal on a laptop calls what the GPU would call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from meshwright.config.attention import Attention, AttentionCall, Kernel
from meshwright.kernels.flex import flex_backward, flex_forward
from meshwright.kernels.naive import naive_backward, naive_causal_attention, naive_forward
from meshwright.kernels.visible import Visible, visible_backward, visible_forward
from meshwright.schemes.attention import EFFICIENT_ROWS, expands_heads

aten = torch.ops.aten


def choose_kernel(attention: Attention, device_kind: str, dtype: torch.dtype, head_dim: int = 64) -> Kernel:
    """The kernel of `training.attention` for a job's device, compute dtype and shape."""
    half = dtype in (torch.bfloat16, torch.float16)
    return AttentionCall(device_kind, half, head_dim).choose(attention).kernel


def causal_attention(
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    kernel: Kernel,
    first_BS: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention by the contract above; the gradient of `lse` is not propagated.

    `first_BS`: the position of the first key that each query sees, where documents are separate.
    """
    if kernel == "naive":
        assert first_BS is None
        return naive_causal_attention(q_BSHD, k_BSKD, v_BSKD)
    return _CausalAttention.apply(q_BSHD, k_BSKD, v_BSKD, kernel, first_BS)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: Kernel, first_BS: torch.Tensor | None
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.kernel, ctx.first_BS = kernel, first_BS  # the batch holds it: nothing is kept for backward
        visible = _within_sequence(first_BS)
        out, lse, random = attention_forward(q, k, v, kernel, causal=True, visible=visible)
        ctx.save_for_backward(q, k, v, out, lse, *random)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, _: Any) -> Any:
        q, k, v, out, lse, *random = ctx.saved_tensors
        visible = _within_sequence(ctx.first_BS)
        saved = (q, k, v, out, lse, tuple(random))
        return *attention_backward(dout, *saved, ctx.kernel, causal=True, visible=visible), None, None


def _within_sequence(first_BS: torch.Tensor | None) -> Visible | None:
    """What queries of a whole sequence see of its keys, where documents are separate."""
    if first_BS is None:
        return None
    positions = torch.arange(first_BS.shape[1], device=first_BS.device)
    return Visible(first_BS, positions, positions)


# --- one block, forward and backward, for whoever composes blocks -----------------------------------------------------


def attention_forward(
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    kernel: Kernel,
    *,
    causal: bool,
    visible: Visible | None = None,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Output, log-sum-exp (the efficient kernel fills its rows up to a multiple of 32) and the kernel's random state.

    Causal blocks have as many queries as keys. `visible`, where given, is the whole mask. Not differentiable by itself.
    """
    if kernel == "naive":
        return *naive_forward(q_BSHD, k_BSKD, v_BSKD, causal=causal)[:2], ()
    if kernel == "flash":
        return *_flash().flash_forward(q_BSHD, k_BSKD, v_BSKD, causal=causal), ()
    if kernel == "flex":
        return *flex_forward(q_BSHD, k_BSKD, v_BSKD, causal), ()
    q, k, v = _for_kernel(q_BSHD, k_BSKD, v_BSKD, kernel)
    if visible is not None:
        assert kernel == "sdpa_cpu", kernel
        return *visible_forward(q, k, v, visible), ()
    if kernel == "sdpa_cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return out.transpose(1, 2), lse, ()
    if kernel == "sdpa_flash":
        out, lse, *_, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    else:
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal)
    return out.transpose(1, 2), lse, (seed, offset)


def attention_backward(
    dout_BSHD: torch.Tensor,
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    out_BSHD: torch.Tensor,
    lse_BHS: torch.Tensor,
    random: tuple[torch.Tensor, ...],
    kernel: Kernel,
    *,
    causal: bool,
    visible: Visible | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv of one block.

    `out` and `lse` may be those over more keys than the block's: then these are the block's shares of the gradients.
    """
    operands = dout_BSHD, q_BSHD, k_BSKD, v_BSKD, out_BSHD
    if kernel == "naive":
        return naive_backward(*operands, lse_BHS, causal=causal)
    if kernel == "flash":
        return _flash().flash_backward(*operands, lse_BHS.contiguous(), causal=causal)
    if kernel == "flex":
        return flex_backward(*operands, lse_BHS, causal)
    q, k, v = _for_kernel(q_BSHD, k_BSKD, v_BSKD, kernel)
    out, dout, queries, keys = out_BSHD.transpose(1, 2), dout_BSHD.transpose(1, 2), q.shape[2], k.shape[2]
    if visible is not None:
        assert kernel == "sdpa_cpu", kernel
        dq_BSHD, *dkv = visible_backward(dout, q, k, v, out, lse_BHS, visible)
        dk_BSKD, dv_BSKD = (_collapse(d, k_BSKD.shape[2]).to(k_BSKD.dtype) for d in dkv)
        return dq_BSHD, dk_BSKD, dv_BSKD
    if kernel == "sdpa_cpu":
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse_BHS, 0.0, causal)
    elif kernel == "sdpa_flash":
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse_BHS.contiguous(), None, None, queries, keys, 0.0, causal, *random
        )
    else:
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            dout, q, k, v, None, out, _filled_rows(lse_BHS), *random, 0.0, [True, True, True, False], causal
        )
    dk_BSKD, dv_BSKD = (_collapse(d.transpose(1, 2), k_BSKD.shape[2]) for d in (dk, dv))
    return dq.transpose(1, 2), dk_BSKD, dv_BSKD


def _flash() -> Any:
    """Our kernel, which imports Triton: loaded when first asked for."""
    from meshwright.kernels import flash_attention

    return flash_attention


def _for_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: Kernel
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, heads, S, D] as kernels take them, keys and values repeated where they must be."""
    heads = q.shape[2] if expands_heads(kernel, q.shape[2], k.shape[2]) else k.shape[2]
    return q.transpose(1, 2), _expand(k, heads).transpose(1, 2), _expand(v, heads).transpose(1, 2)


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


def _filled_rows(lse_BHS: torch.Tensor) -> torch.Tensor:
    """Rows filled up to the multiple of 32 that the efficient kernel wants."""
    missing = -lse_BHS.shape[-1] % EFFICIENT_ROWS
    return F.pad(lse_BHS, (0, missing)) if missing else lse_BHS.contiguous()

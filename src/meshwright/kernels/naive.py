"""Causal attention without a fused kernel: product, mask, softmax, product, one operation after the other.

    B batch   S queries   Z keys   H query heads   K key and value heads   D head_dim   N = B·H

    q_BSHD  [B, S, H, D]    k_BZKD, v_BZKD  [B, Z, K, D], repeated for the H/K query heads that share one
    forward   s = q kᵀ/√D + mask in the compute dtype; p = softmax(s) in float32, cast to the compute dtype; out = p v
    backward  dv = pᵀ dout; dp = dout vᵀ; ds = p·(dp - Σ_Z p·dp); dq = ds k/√D; dk = dsᵀ q/√D
    saved     q, k, v and p, B·H·S·Z elements, as plain autograd keeps them: not out, and not the log-sum-exp
    FLOPs     4·B·H·S·Z·D forward, 8·B·H·S·Z·D backward, the masked half included

A ring keeps q, k, v, out and the log-sum-exp of all blocks: p of a block, of which a ring would have to keep one a
step, is made again from them, for 2·B·H·S·Z·D more, and Σ_Z p·dp is Σ_D dout·out over everything that a query sees.
What fused kernels save can be seen beside this; nothing else speaks for it. `schemes.naive` is its account.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from meshwright.kernels.pointwise import accumulation_dtype

aten = torch.ops.aten


def naive_causal_attention(
    q_BSHD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, S, H, D] and log-sum-exp [B, H, S] of a whole sequence; the latter's gradient is not propagated."""
    return _NaiveAttention.apply(q_BSHD, k_BSKD, v_BSKD)


class _NaiveAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        ctx.set_materialize_grads(False)
        out, lse, p_NSZ = naive_forward(q, k, v, causal=True)
        ctx.save_for_backward(q, k, v, p_NSZ)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, _: Any) -> Any:
        q, k, v, p_NSZ = ctx.saved_tensors
        dout_NSD = _flat(dout, dout.shape[2])
        dv = _shared(torch.bmm(p_NSZ.mT, dout_NSD), v)
        ds_NSZ = torch.bmm(dout_NSD, _flat(v, dout.shape[2]).mT)
        del dout_NSD
        ds_NSZ = aten._softmax_backward_data(ds_NSZ, p_NSZ, -1, p_NSZ.dtype)
        return *_through_scores(ds_NSZ, q, k), dv


def naive_forward(
    q_BSHD: torch.Tensor, k_BZKD: torch.Tensor, v_BZKD: torch.Tensor, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [B, S, H, D], log-sum-exp [B, H, S] in float32 (float64 for float64) and probabilities [B·H, S, Z]."""
    B, S, H, _ = q_BSHD.shape
    p_NSZ = _scores(q_BSHD, k_BZKD, causal)
    lse_BHS = _softmax_in_place(p_NSZ).view(B, H, S)
    p_NSZ = p_NSZ.to(q_BSHD.dtype)
    return _unflat(torch.bmm(p_NSZ, _flat(v_BZKD, H)), B), lse_BHS, p_NSZ


def naive_backward(
    dout_BSHD: torch.Tensor,
    q_BSHD: torch.Tensor,
    k_BZKD: torch.Tensor,
    v_BZKD: torch.Tensor,
    out_BSHD: torch.Tensor,
    lse_BHS: torch.Tensor,
    *,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv of a block, from output and log-sum-exp over all that its queries see anywhere."""
    B, S, H, _ = q_BSHD.shape
    p_NSZ = _scores(q_BSHD, k_BZKD, causal)
    p_NSZ.view(B, H, S, -1).sub_(lse_BHS.unsqueeze(-1)).exp_()
    p_NSZ = p_NSZ.to(q_BSHD.dtype)
    delta_BSH = dout_BSHD.to(accumulation_dtype(q_BSHD.dtype)).mul(out_BSHD).sum(-1)
    dout_NSD = _flat(dout_BSHD, H)
    dv = _shared(torch.bmm(p_NSZ.mT, dout_NSD), v_BZKD)
    ds_NSZ = torch.bmm(dout_NSD, _flat(v_BZKD, H).mT)
    del dout_NSD
    ds_NSZ.view(B, H, S, -1).sub_(delta_BSH.transpose(1, 2).unsqueeze(-1))
    return *_through_scores(ds_NSZ.mul_(p_NSZ), q_BSHD, k_BZKD), dv


def _scores(q_BSHD: torch.Tensor, k_BZKD: torch.Tensor, causal: bool) -> torch.Tensor:
    """[N, S, Z], scaled and masked, in float32 (float64 for float64)."""
    H, S, Z = q_BSHD.shape[2], q_BSHD.shape[1], k_BZKD.shape[1]
    added = torch.full((S, Z), -math.inf, dtype=q_BSHD.dtype, device=q_BSHD.device).triu_(1) if causal else None
    scores_NSZ = _scaled(_flat(q_BSHD, H), _flat(k_BZKD, H).mT, q_BSHD.shape[-1], added)
    return scores_NSZ.to(accumulation_dtype(q_BSHD.dtype))


def _softmax_in_place(scores_NSZ: torch.Tensor) -> torch.Tensor:
    """Turns scores into probabilities; returns the log-sum-exp [N, S, 1]. Every row sees something."""
    largest = scores_NSZ.amax(-1, keepdim=True)
    total = scores_NSZ.sub_(largest).exp_().sum(-1, keepdim=True)
    scores_NSZ.div_(total)
    return largest.add_(total.log_())


def _through_scores(
    ds_NSZ: torch.Tensor, q_BSHD: torch.Tensor, k_BZKD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dq [B, S, H, D] and dk [B, Z, K, D] from the gradient of the scores."""
    B, _, H, D = q_BSHD.shape
    dq_BSHD = _unflat(_scaled(ds_NSZ, _flat(k_BZKD, H), D), B)
    return dq_BSHD, _shared(_scaled(ds_NSZ.mT, _flat(q_BSHD, H), D), k_BZKD)


def _scaled(a: torch.Tensor, b: torch.Tensor, head_dim: int, added: torch.Tensor | None = None) -> torch.Tensor:
    """added + a @ b/√D."""
    if added is not None:
        return torch.baddbmm(added, a, b, alpha=head_dim**-0.5)
    return torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=head_dim**-0.5)


def _flat(x_BSKD: torch.Tensor, heads: int) -> torch.Tensor:
    """[B·heads, S, D], a copy: batched products want it so."""
    B, S, K, D = x_BSKD.shape
    x_BKGSD = x_BSKD.transpose(1, 2).unsqueeze(2).expand(B, K, heads // K, S, D)
    return x_BKGSD.clone(memory_format=torch.contiguous_format).view(B * heads, S, D)


def _unflat(x_NSD: torch.Tensor, B: int) -> torch.Tensor:
    """[N, S, D] -> [B, S, H, D], a copy."""
    return x_NSD.unflatten(0, (B, -1)).transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _shared(dx_NZD: torch.Tensor, like_BZKD: torch.Tensor) -> torch.Tensor:
    """[N, Z, D] -> [B, Z, K, D], summed over the query heads that share a head; a copy."""
    B, _, K, _ = like_BZKD.shape
    if dx_NZD.shape[0] > B * K:
        dx_NZD = dx_NZD.unflatten(0, (B * K, -1)).sum(1)
    return _unflat(dx_NZD, B)

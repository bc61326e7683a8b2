"""Attention in plain PyTorch, for reading and for comparing: the whole score matrix, and FlashAttention-2 tile by tile.

    q_BSHD  [B, S, H, D]    queries
    k_BZKD  [B, Z, K, D]    keys; G = H/K query heads share one key head
    v_BZKD  [B, Z, K, D]    values
    ->
    out_BSHD [B, S, H, D]   softmax(q kᵀ/√D + mask) v, in the dtype of q
    lse_BHS  [B, H, S]      log-sum-exp of the scaled scores, float32 (float64 for float64)

    mask      query i sees key j if j <= i + offset where causal, else every key. S = 5, Z = 4:

        offset 0    1 0 0 0     offset -2    0 0 0 0     offset 2    1 1 1 0
                    1 1 0 0                  0 0 0 0                 1 1 1 1
                    1 1 1 0                  1 0 0 0                 1 1 1 1
                    1 1 1 1                  1 1 0 0                 1 1 1 1
                    1 1 1 1                  1 1 1 0                 1 1 1 1

    empty     a query that sees no key has output 0, log-sum-exp -inf, and adds nothing to any gradient

This is the contract of `kernels.flash_attention`, whose kernels do what `tiled_attention` and its backward do here.
Those follow Dao 2023, arXiv:2307.08691, algorithms 1 and 2: products of 16-bit operands summed in float32, of which the
softmax's weights and the gradient of the scores are rounded to 16 bits before they are multiplied again.
Inside, queries are [B, K, G, S, D] and keys [B, K, 1, Z, D], so that every head's product is one `@`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from meshwright.kernels.pointwise import accumulation_dtype

# --- the whole score matrix -------------------------------------------------------------------------------------------


def naive_attention(
    q_BSHD: torch.Tensor, k_BZKD: torch.Tensor, v_BZKD: torch.Tensor, *, causal: bool, offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp by the definition, every step in the dtype of the inputs; autograd gives the gradients.

    The gradient of the log-sum-exp is not propagated.
    """
    K = k_BZKD.shape[2]
    q, k, v = _queries(q_BSHD, K), _keys(k_BZKD), _keys(v_BZKD)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    seen_SZ = seen(range(q.shape[3]), range(k.shape[3]), causal, offset, q.device)
    empty_S1 = ~seen_SZ.any(-1, keepdim=True)
    weights = scores.masked_fill(~(seen_SZ | empty_S1), -math.inf).softmax(-1).masked_fill(empty_S1, 0)
    exact = scores.detach().to(accumulation_dtype(scores.dtype))
    lse = exact.masked_fill(~seen_SZ, -math.inf).logsumexp(-1)
    return _BSHD(weights @ v), lse.flatten(1, 2)


def seen(queries: range, keys: range, causal: bool, offset: int, device: torch.device) -> torch.Tensor:
    """[queries, keys]: which keys of a tile each of its queries sees."""
    i = torch.arange(queries.start, queries.stop, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=device)[None, :]
    return (j <= i + offset) | (not causal)


# --- FlashAttention-2 -------------------------------------------------------------------------------------------------


def tiled_attention(
    q_BSHD: torch.Tensor,
    k_BZKD: torch.Tensor,
    v_BZKD: torch.Tensor,
    *,
    causal: bool,
    offset: int = 0,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp by an online softmax: algorithm 1. Not differentiable by itself.

    For each tile of queries, over the tiles of keys that any of them sees: `maximum` is each query's largest score so
    far, `total` the sum of exp(score - maximum), `out` that of exp(score - maximum)·v. Where a larger score turns up,
    both sums are scaled down to it; the division comes once, at the end.
    """
    dtype, K = accumulation_dtype(q_BSHD.dtype), k_BZKD.shape[2]
    q_all, k_all, v_all = _queries(q_BSHD, K), _keys(k_BZKD), _keys(v_BZKD)
    scale = q_all.shape[-1] ** -0.5
    out_all = q_all.new_zeros(q_all.shape)
    lse_all = q_all.new_full(q_all.shape[:-1], -math.inf, dtype=dtype)
    for rows in tiles(q_all.shape[3], block_q):
        q = _part(q_all, rows)
        maximum = q.new_full((*q.shape[:-1], 1), -math.inf, dtype=dtype)
        total, out = torch.zeros_like(maximum), torch.zeros_like(q, dtype=dtype)
        for columns in visited(rows, k_all.shape[3], block_k, causal, offset):
            k, v = _part(k_all, columns), _part(v_all, columns)
            scores = _product(q, k.mT) * scale
            scores.masked_fill_(~seen(rows, columns, causal, offset, q.device), -math.inf)
            larger = torch.maximum(maximum, scores.amax(-1, keepdim=True))
            finite = larger.masked_fill(larger == -math.inf, 0)  # no key seen yet: exp(-inf - 0) is 0, not exp(nan)
            weights, shrink = (scores - finite).exp(), (maximum - finite).exp()
            total = total * shrink + weights.sum(-1, keepdim=True)
            out = out * shrink + _product(weights.to(v.dtype), v)
            maximum = larger
        empty = total == 0
        _part(out_all, rows).copy_(out / total.masked_fill(empty, 1))
        lse_all[..., rows.start : rows.stop] = (maximum + total.log()).squeeze(-1)
    return _BSHD(out_all), lse_all.flatten(1, 2)


def tiled_attention_backward(
    dout_BSHD: torch.Tensor,
    q_BSHD: torch.Tensor,
    k_BZKD: torch.Tensor,
    v_BZKD: torch.Tensor,
    out_BSHD: torch.Tensor,
    lse_BHS: torch.Tensor,
    *,
    causal: bool,
    offset: int = 0,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, the scores made again tile by tile: algorithm 2.

        delta = rowsum(dout ∘ out)              once for each query
        p     = exp(q kᵀ/√D - lse)              the softmax's weights, without a second look at other tiles
        dv   += pᵀ dout
        ds    = p ∘ (dout vᵀ - delta)           the softmax's gradient: sum_j p_j dp_j is rowsum(dout ∘ out)
        dq   += ds k/√D,   dk += dsᵀ q/√D

    `out` and `lse` may be those over more keys than these (a block of a ring): then p and delta are the whole's, and
    the results are this block's shares of the gradients.
    """
    dtype, K = accumulation_dtype(q_BSHD.dtype), k_BZKD.shape[2]
    q_all, k_all, v_all = _queries(q_BSHD, K), _keys(k_BZKD), _keys(v_BZKD)
    dout_all, out_all = _queries(dout_BSHD, K), _queries(out_BSHD, K)
    scale = q_all.shape[-1] ** -0.5
    delta_all = (dout_all.to(dtype) * out_all.to(dtype)).sum(-1, keepdim=True)
    lse_all = lse_BHS.unflatten(1, (K, -1)).unsqueeze(-1)
    lse_all = lse_all.masked_fill(lse_all == -math.inf, math.inf)  # a query that sees nothing: exp(score - inf) is 0
    dq_all, dk_all, dv_all = (torch.zeros_like(x, dtype=dtype) for x in (q_all, k_all, v_all))
    for rows in tiles(q_all.shape[3], block_q):
        q, dout, lse, delta = (_part(x, rows) for x in (q_all, dout_all, lse_all, delta_all))
        for columns in visited(rows, k_all.shape[3], block_k, causal, offset):
            k, v = _part(k_all, columns), _part(v_all, columns)
            p = (_product(q, k.mT) * scale - lse).exp()
            p.masked_fill_(~seen(rows, columns, causal, offset, q.device), 0)
            ds = (p * (_product(dout, v.mT) - delta)).to(q.dtype)
            _part(dv_all, columns).add_(_product(p.to(dout.dtype).mT, dout).sum(2, keepdim=True))
            _part(dk_all, columns).add_(_product(ds.mT, q).sum(2, keepdim=True), alpha=scale)
            _part(dq_all, rows).add_(_product(ds, k), alpha=scale)
    return tuple(_BSHD(d.to(x.dtype)) for d, x in ((dq_all, q_all), (dk_all, k_all), (dv_all, v_all)))  # type: ignore[return-value]


def tiles(length: int, block: int) -> Iterator[range]:
    """The rows, or columns, of each tile; the last may be ragged."""
    return (range(start, min(start + block, length)) for start in range(0, length, block))


def visited(rows: range, keys: int, block: int, causal: bool, offset: int) -> Iterator[range]:
    """The tiles of keys that the queries of a tile see: the last query sees farthest."""
    return (columns for columns in tiles(keys, block) if not causal or columns.start <= rows.stop - 1 + offset)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The matrix product, its sums in float32 (float64 for float64), as a tensor core makes it."""
    dtype = accumulation_dtype(a.dtype)
    return a.to(dtype) @ b.to(dtype)


def _queries(x_BSHD: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[B, K, G, S, D]"""
    return x_BSHD.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _keys(x_BZKD: torch.Tensor) -> torch.Tensor:
    """[B, K, 1, Z, D]"""
    return x_BZKD.transpose(1, 2).unsqueeze(2)


def _BSHD(x_BKGSD: torch.Tensor) -> torch.Tensor:
    """Back, for queries and keys alike."""
    return x_BKGSD.flatten(1, 2).transpose(1, 2)


def _part(x_BKGSD: torch.Tensor, rows: range) -> torch.Tensor:
    return x_BKGSD[..., rows.start : rows.stop, :]

"""Attention that stays within documents: a mask by positions, a tile of queries at a time, never a full score matrix.

    B batch   S queries   Z keys   t queries of a tile

A query at position p of a document that begins at position f sees the keys at positions f to p. Both are known where
the query is, so nothing about documents is communicated; keys of a block may lie anywhere in the sequence. On the CPU
only: `training.device` refuses it elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from meshwright.kernels.pointwise import accumulation_dtype
from meshwright.schemes.attention import QUERY_TILE

aten = torch.ops.aten


class Visible(NamedTuple):
    """Which keys each query of a block sees."""

    first_BS: torch.Tensor
    """Position of the first key that each query sees: where its document begins."""
    queries_S: torch.Tensor
    """Positions of the queries."""
    keys_Z: torch.Tensor
    """Positions of the keys."""

    def mask(self, rows: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, 1, t, Z] of 0 and -inf to add to the scores of some rows, and [B, 1, t]: which rows see no key."""
        allowed = self.keys_Z >= self.first_BS[:, rows, None]
        allowed &= self.keys_Z <= self.queries_S[rows, None]
        mask = torch.zeros_like(allowed, dtype=dtype).masked_fill_(allowed.logical_not(), -torch.inf)
        return mask.unsqueeze(1), allowed.any(dim=-1).logical_not_().unsqueeze(1)


def tiles(num_queries: int) -> list[slice]:
    """The rows of each tile."""
    return [slice(start, min(start + QUERY_TILE, num_queries)) for start in range(0, num_queries, QUERY_TILE)]


def visible_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Visible
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, S, H, D] and lse [B, H, S] of q, k, v [B, H, S or Z, D]; a row that sees no key has 0 and -inf."""
    B, H, S, D = q.shape
    out_BSHD = q.new_empty(B, S, H, D)
    lse_BHS = q.new_empty(B, H, S, dtype=accumulation_dtype(q.dtype))
    for rows in tiles(S):
        _tile_forward(out_BSHD, lse_BHS, q, k, v, visible, rows)
    return out_BSHD, lse_BHS


def _tile_forward(
    out_BSHD: torch.Tensor,
    lse_BHS: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: Visible,
    rows: slice,
) -> None:
    mask, empty = visible.mask(rows, q.dtype)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q[:, :, rows], k, v, 0.0, False, attn_mask=mask)
    out_BSHD[:, rows] = out.transpose(1, 2)
    lse_BHS[..., rows] = lse.masked_fill_(empty, -torch.inf)


def visible_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    visible: Visible,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq [B, S, H, D] in the dtype of q, dk and dv [B, Z, H, D] in float32 (float64), all of [B, H, S or Z, D].

    `lse` must be finite, of all that a query sees anywhere: every query sees itself in some block.
    """
    dq_BSHD = q.new_empty(_BSHD(q))
    dk_BZHD, dv_BZHD = (torch.zeros(_BSHD(x), dtype=accumulation_dtype(x.dtype), device=x.device) for x in (k, v))
    for rows in tiles(q.shape[2]):
        mask = visible.mask(rows, q.dtype)[0]
        _tile_backward(dq_BSHD[:, rows], dk_BZHD, dv_BZHD, (dout, q, k, v, out, lse), mask, rows)
        del mask
    return dq_BSHD, dk_BZHD, dv_BZHD


def _BSHD(x_BHSD: torch.Tensor) -> tuple[int, ...]:
    B, H, S, D = x_BHSD.shape
    return B, S, H, D


def _tile_backward(
    dq_BSHD: torch.Tensor,
    dk_BZHD: torch.Tensor,
    dv_BZHD: torch.Tensor,
    operands: tuple[torch.Tensor, ...],
    mask: torch.Tensor,
    rows: slice,
) -> None:
    dout, q, k, v, out, lse = operands
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout[:, :, rows], q[:, :, rows], k, v, out[:, :, rows], lse[..., rows], 0.0, False, attn_mask=mask
    )
    dq_BSHD.copy_(dq.transpose(1, 2))
    dk_BZHD.add_(dk.transpose(1, 2))
    dv_BZHD.add_(dv.transpose(1, 2))

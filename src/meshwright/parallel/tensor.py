"""Megatron tensor parallelism (Shoeybi et al. 2019, section 3), executed.

    B batch   S sequence   E d_model   F features out   T tensor degree   V vocabulary, padded to a multiple of T

What each operation splits, sends and saves is `schemes.tensor`; this file does it. How an input enters the region of
the axis and an output leaves it, whole or split along the sequence, is `parallel.sequence`'s to say. If the region is
pipelined, `parallel.matmul` cuts the products so that their communication runs under them. Weights are
[out, in] in the master dtype, cast to the dtype of the activations at each use: no cast copy outlives its product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from meshwright.comm.collectives import Axis, Pending
from meshwright.comm.scope import scope
from meshwright.kernels.pointwise import accumulation_dtype
from meshwright.parallel import matmul
from meshwright.parallel.sequence import Region


def column_linear(
    x_BSE: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    region: Region,
    site: str,
) -> tuple[torch.Tensor, ...]:
    """Column-parallel linear layers that share an input (query, key and value; gate and up).

    x_BSE   [B, S, E]       the same on every rank; [B, S/T, E] of a region that is split
    w_FE    [F/T, E] each   this rank's columns of the layer, rows of the stored weight
    forward   y_BSF = enter(x_BSE) @ w_FE.T + b_F                  sends nothing; B·S·E if split
    dgrad     dx_BSE = leave(Σ dy_BSF @ w_FE)                      sends B·S·E, while the weight gradients are computed
    wgrad     dw_FE = dy_BSF.T @ enter(x_BSE)                      sends nothing; B·S·E if split, while dx is computed
    saved     x_BSE as it came
    """
    if region.pipeline is not None:
        return matmul.column_linear(x_BSE, weights, biases, region, site)
    return Linear.apply(x_BSE, region, None, site, len(weights), *weights, *biases)


def row_linear(
    x_BSF: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, region: Region, site: str
) -> torch.Tensor:
    """Row-parallel linear layer.

    x_BSF   [B, S, F/T]     this rank's slice of the features
    w_EF    [E, F/T]        this rank's rows of the layer, columns of the stored weight
    forward   y_BSE = leave(x_BSF @ w_EF.T) + b_E               sends B·S·E; y is [B, S/T, E] if the region is split
    dgrad     dx_BSF = enter(dy_BSE) @ w_EF                     sends nothing; B·S·E if split
    wgrad     dw_EF = enter(dy_BSE).T @ x_BSF,  db_E = Σ dy_BSE  sends nothing (db is partial per rank if split)
    saved     x_BSF
    """
    if region.pipeline is not None:
        return matmul.row_linear(x_BSF, weight, bias, region, site)
    (y_BSE,) = Linear.apply(x_BSF, None, region, site, 1, weight, bias)
    return y_BSE


class Linear(torch.autograd.Function):
    """Local linear layers on one input, which enters the region first or whose outputs leave it after.

    Entering in forward is leaving in backward, so the communication is fused here with the products it belongs to.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, entered: Region | None, left: Region | None, site: str, count: int, *parameters: Any
    ) -> Any:
        weights, biases = parameters[:count], parameters[count:]
        ctx.entered, ctx.left, ctx.site, ctx.biased = entered, left, site, tuple(b is not None for b in biases)
        ctx.save_for_backward(x, *weights)
        if entered is not None:
            x = entered.enter(x, site).wait()
        outputs = []
        for weight, bias in zip(weights, biases, strict=True):
            y = torch.mm(x.flatten(0, 1), weight.to(x.dtype).T).view(*x.shape[:2], -1)
            if left is not None:
                y = left.leave(y, site).wait()
            outputs.append(y if bias is None else y.add_(bias))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        dtype = weights[0].dtype
        with scope(ctx.site, "backward"):
            dbs = [dy.sum(dim=(0, 1), dtype=dtype) if b else None for dy, b in zip(dys, ctx.biased, strict=True)]
            if ctx.left is not None:
                dys = tuple(ctx.left.enter(dy, ctx.site).wait() for dy in dys)
            entering = ctx.entered.enter(x, ctx.site) if ctx.entered is not None else Pending(x)
            dys_2d = [dy.flatten(0, 1) for dy in dys]
            dx_2d = torch.mm(dys_2d[0], weights[0].to(x.dtype))
            for dy, weight in zip(dys_2d[1:], weights[1:], strict=True):
                dx_2d.addmm_(dy, weight.to(x.dtype))
            dx = dx_2d.view(*dys[0].shape[:2], -1)
            del dx_2d
            leaving = ctx.entered.leave(dx, ctx.site) if ctx.entered is not None else Pending(dx)
            del dx
            x_2d = entering.wait().flatten(0, 1)
            dws = [torch.mm(dy.T, x_2d).to(dtype) for dy in dys_2d]
            return leaving.wait(), None, None, None, None, *dws, *dbs


def vocab_embedding(
    tokens_BS: torch.Tensor, weight_VE: torch.Tensor, dtype: torch.dtype, region: Region, site: str
) -> torch.Tensor:
    """Embedding whose rows are split over the axis.

    tokens_BS [B, S]          of all ranks, also if the region is split
    weight_VE [V/T, E]        this rank's rows of the table
    forward   y_BSE = leave(rows of this rank, zeros elsewhere)    sends B·S·E in the compute dtype
              (exact: one rank has the row); [B, S/T, E] if split
    wgrad     dw[token] += enter(dy)                               sends nothing; B·S·E if split
    saved     this rank's row indices [B, S], and which of them are its own if T > 1
    """
    return _Embedding.apply(tokens_BS, weight_VE, dtype, region, site)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, region: Region, site: str
    ) -> torch.Tensor:
        ctx.num_rows, ctx.dtype, ctx.region, ctx.site = weight.shape[0], weight.dtype, region, site
        if region.axis.size == 1:
            ctx.save_for_backward(tokens)
            return torch.embedding(weight, tokens).to(dtype)
        rows, foreign = own_rows(tokens, ctx.num_rows, region.axis)
        ctx.save_for_backward(rows, foreign)
        found = torch.embedding(weight, rows).masked_fill_(foreign.unsqueeze(-1), 0).to(dtype)
        return region.leave(found, site).wait()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        rows, *foreign = ctx.saved_tensors
        with scope(ctx.site, "backward"):
            dy = ctx.region.enter(dy, ctx.site).wait().to(accumulation_dtype(ctx.dtype))
        if foreign:
            dy = dy.masked_fill(foreign[0].unsqueeze(-1), 0)
        dw = torch.ops.aten.embedding_dense_backward(dy, rows, ctx.num_rows, -1, False)
        return None, dw.to(ctx.dtype), None, None, None


def own_rows(tokens: torch.Tensor, num_rows: int, axis: Axis) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices into this rank's rows (0 where another rank has the row), and where that is."""
    rows = tokens - axis.rank * num_rows
    foreign = (rows < 0).logical_or_(rows >= num_rows)
    return rows.masked_fill_(foreign, 0), foreign

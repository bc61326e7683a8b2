"""Collective matmul between activations that are split along their features, executed: both classical cases.

    N rows   E features of the residual stream   F of the hidden one   T ranks of the axis

    gather_columns_matmul         y = gather(x) @ w.T, where x is split along its features, [N, E/T]
    matmul_scatter_columns        y = scatter(x @ w.T), where y is split along its features, [N, E/T]

Every rank has all rows, so a part is a block of columns, and of the weight it meets one block. `parallel.matmul_rings`
moves parts. Weights are in the master dtype, cast to that of the activations at each use.
"""

from __future__ import annotations

from typing import Any

import torch

from meshwright.comm.collectives import Axis
from meshwright.comm.scope import scope
from meshwright.parallel.matmul_rings import GatherRing, ScatterRing, WeightGradient
from meshwright.schemes.tape import Pipeline


def gather_columns_matmul(
    x_NE: torch.Tensor, weight: torch.Tensor, axis: Axis, pipeline: Pipeline, site: str
) -> torch.Tensor:
    """A column-parallel layer whose input is split along its features, gathered while the output is computed.

    x_NE      [N, E/T]        this rank's columns of the activations
    w_FE      [F/T, E]        this rank's columns of the layer, rows of the stored weight
    forward   y_NF = Σ_t x_t @ w_FE[:, t].T, t by t as it comes      sends N·E
    backward  dx_NE = scatter(dy_NF @ w_FE); dw_FE[:, t] = dy_NF.T @ x_t as it comes again   sends 2·N·E
    saved     x_NE
    """
    return _GatherColumns.apply(x_NE, weight, axis, pipeline, site)


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, axis: Axis, pipeline: Pipeline, site: str
    ) -> torch.Tensor:
        ctx.axis, ctx.pipeline, ctx.site = axis, pipeline, site
        ctx.save_for_backward(x, weight)
        y, blocks = x.new_empty(len(x), len(weight)), weight.to(x.dtype).chunk(axis.size, dim=1)

        def multiply(rows: torch.Tensor, part: int, start: int) -> None:
            out = y[start : start + len(rows)]
            if part == axis.rank:  # the own part is the first
                torch.mm(rows, blocks[part].T, out=out)
            else:
                out.addmm_(rows, blocks[part].T)

        ring = GatherRing(x.contiguous(), axis, pipeline, site)
        for index in range(axis.size):
            ring.step(index, multiply)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        with scope(ctx.site, "backward"):
            blocks, dw = weight.to(x.dtype).chunk(ctx.axis.size, dim=1), torch.empty_like(weight)
            sums = [WeightGradient(block) for block in dw.chunk(ctx.axis.size, dim=1)]
            gather = GatherRing(x.contiguous(), ctx.axis, ctx.pipeline, ctx.site)
            scatter = ScatterRing(x, x.shape[0], x.shape[1], ctx.axis, ctx.pipeline, ctx.site)

            def towards_input(out: torch.Tensor, part: int, start: int) -> None:
                torch.mm(dy[start : start + len(out)], blocks[part], out=out)

            def towards_weight(rows: torch.Tensor, part: int, start: int) -> None:
                sums[part].add(dy[start : start + len(rows)], rows)

            for index in range(ctx.axis.size):
                scatter.compute(index, towards_input)
                gather.step(index, towards_weight, whole=True)
                scatter.combine(index)
            return scatter.result(), dw, None, None, None


def matmul_scatter_columns(
    x_NF: torch.Tensor, weight: torch.Tensor, axis: Axis, pipeline: Pipeline, site: str
) -> torch.Tensor:
    """A row-parallel layer whose output is split along its features: partial products, scattered as they are made.

    x_NF      [N, F/T]        this rank's columns of the activations
    w_EF      [E, F/T]        this rank's rows of the layer, columns of the stored weight
    forward   y_NE = scatter(x_NF @ w_EF.T), columns t for rank t    sends N·E; y is [N, E/T]
    backward  dx_NF = Σ_t dy_t @ w_EF[t], dw_EF[t] = dy_t.T @ x_NF, t by t as dy comes        sends N·E
    saved     x_NF
    """
    return _ScatterColumns.apply(x_NF, weight, axis, pipeline, site)


class _ScatterColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, axis: Axis, pipeline: Pipeline, site: str
    ) -> torch.Tensor:
        ctx.axis, ctx.pipeline, ctx.site = axis, pipeline, site
        ctx.save_for_backward(x, weight)
        blocks = weight.to(x.dtype).chunk(axis.size)
        ring = ScatterRing(x, len(x), len(weight) // axis.size, axis, pipeline, site)

        def multiply(out: torch.Tensor, part: int, start: int) -> None:
            torch.mm(x[start : start + len(out)], blocks[part].T, out=out)

        for index in range(axis.size):
            ring.step(index, multiply)
        return ring.result()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        with scope(ctx.site, "backward"):
            blocks, dx, dw = weight.to(x.dtype).chunk(ctx.axis.size), torch.empty_like(x), torch.empty_like(weight)
            sums = [WeightGradient(block) for block in dw.chunk(ctx.axis.size)]

            def use(rows: torch.Tensor, part: int, start: int) -> None:
                own = slice(start, start + len(rows))
                if part == ctx.axis.rank:  # the own part is the first
                    torch.mm(rows, blocks[part], out=dx[own])
                else:
                    dx[own].addmm_(rows, blocks[part])
                sums[part].add(rows, x[own])

            ring = GatherRing(dy.contiguous(), ctx.axis, ctx.pipeline, ctx.site)
            for index in range(ctx.axis.size):
                ring.step(index, use)
            return dx, dw, None, None, None

"""Collective matmul, executed: tensor-parallel layers whose communication runs under their products.

    B batch   S sequence   E d_model   F features   T ranks of the axis   M rows of a rank's part, B·S/T   N = B·S

What is cut, and which way it travels, is `schemes.matmul`; `parallel.matmul_rings` moves it. The layers are those of
`parallel.tensor` by the same names. Activations outside are whole, or split along the sequence; those that are split
along their features have `parallel.matmul_columns`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from meshwright.comm.collectives import Pending
from meshwright.comm.scope import scope
from meshwright.parallel.matmul_rings import GatherRing, Rows, ScatterRing, WeightGradient
from meshwright.parallel.sequence import Region
from meshwright.schemes.matmul import slices


def _input_gradient(
    dys: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], rows: slice, out: torch.Tensor
) -> None:
    """Σ dy @ w of some rows."""
    torch.mm(dys[0][rows], weights[0], out=out)
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        out.addmm_(dy[rows], weight)


def _sums(whole: torch.Tensor, fill: Callable[[slice], object], region: Region, site: str) -> list[Pending]:
    """Fill slices of rows one after the other, each summed in place under the next."""
    assert region.pipeline is not None
    summing = []
    for start, stop in slices(len(whole), region.pipeline.chunks):
        fill(slice(start, stop))
        summing.append(region.axis.all_reduce(whole[start:stop], site=site))
    return summing


# --- column-parallel --------------------------------------------------------------------------------------------------


def column_linear(
    x_BSE: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    region: Region,
    site: str,
) -> tuple[torch.Tensor, ...]:
    """Column-parallel linear layers that share an input; contract as of `parallel.tensor.column_linear`.

    split     forward    y_BSF, rows by rows as x_BSE comes          sends B·S·E
              backward   dx_BSE scattered and x_BSE gathered again,  sends 2·B·S·E
                         step by step side by side
    whole     forward    as uncut                                    sends nothing
              backward   dx_BSE summed slice by slice                sends B·S·E
    """
    return _Column.apply(x_BSE, region, site, len(weights), *weights, *biases)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, region: Region, site: str, count: int, *parameters: Any) -> Any:
        weights, biases = parameters[:count], parameters[count:]
        ctx.region, ctx.site, ctx.biased = region, site, tuple(bias is not None for bias in biases)
        ctx.save_for_backward(x, *weights)
        batch, length, _ = x.shape
        size = region.axis.size if region.split else 1
        casts = [weight.to(x.dtype) for weight in weights]
        ys = [x.new_empty(batch * length * size, len(weight)) for weight in casts]
        place = Rows(length, size)

        def multiply(rows: torch.Tensor, part: int, start: int) -> None:
            for own, whole in place.of(rows, part, start):
                for y, weight in zip(ys, casts, strict=True):
                    torch.mm(own, weight.T, out=y[whole])

        if region.split:
            assert region.pipeline is not None
            ring = GatherRing(x.flatten(0, 1).contiguous(), region.axis, region.pipeline, site)
            for index in range(size):
                ring.step(index, multiply)
        else:
            multiply(x.flatten(0, 1), 0, 0)
        casts.clear()
        outputs = [y.view(batch, length * size, -1) for y in ys]
        return tuple(y if bias is None else y.add_(bias) for y, bias in zip(outputs, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        region: Region = ctx.region
        with scope(ctx.site, "backward"):
            dbs = [
                dy.sum(dim=(0, 1), dtype=weights[0].dtype) if biased else None
                for dy, biased in zip(dys, ctx.biased, strict=True)
            ]
            backward = _column_backward_split if region.split else _column_backward_whole
            dx, dws = backward(x, weights, [dy.flatten(0, 1) for dy in dys], region, ctx.site)
            return dx, None, None, None, *dws, *dbs


def _column_backward_split(
    x: torch.Tensor, weights: Sequence[torch.Tensor], dys: Sequence[torch.Tensor], region: Region, site: str
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The input's gradient leaves and the input comes, a step of each at a time: a hop of one has all products of two
    steps to run under."""
    assert region.pipeline is not None
    batch, length, features = x.shape
    x_ME, place = x.flatten(0, 1).contiguous(), Rows(length, region.axis.size)
    gather = GatherRing(x_ME, region.axis, region.pipeline, site)
    scatter = ScatterRing(x_ME, batch * length, features, region.axis, region.pipeline, site)
    casts, dws = [weight.to(x.dtype) for weight in weights], [torch.empty_like(weight) for weight in weights]
    sums = [WeightGradient(dw) for dw in dws]

    def towards_input(out: torch.Tensor, part: int, start: int) -> None:
        for own, whole in place.of(out, part, start):
            _input_gradient(dys, casts, whole, own)

    def towards_weights(rows: torch.Tensor, part: int, start: int) -> None:
        for own, whole in place.of(rows, part, start):
            for total, dy in zip(sums, dys, strict=True):
                total.add(dy[whole], own)

    for index in range(region.axis.size):
        scatter.compute(index, towards_input)
        gather.step(index, towards_weights, whole=True)
        scatter.combine(index)
    return scatter.result().view(x.shape), dws


def _column_backward_whole(
    x: torch.Tensor, weights: Sequence[torch.Tensor], dys: Sequence[torch.Tensor], region: Region, site: str
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Slices of the input's gradient are summed under its other slices, and under the weights' gradients."""
    x_NE = x.flatten(0, 1)
    casts, dx = [weight.to(x.dtype) for weight in weights], torch.empty_like(x_NE)
    summing = _sums(dx, lambda rows: _input_gradient(dys, casts, rows, dx[rows]), region, site)
    casts.clear()
    dws = [torch.mm(dy.T, x_NE).to(weight.dtype) for dy, weight in zip(dys, weights, strict=True)]
    for pending in summing:
        pending.wait()
    return dx.view(x.shape), dws


# --- row-parallel -----------------------------------------------------------------------------------------------------


def row_linear(
    x_BSF: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, region: Region, site: str
) -> torch.Tensor:
    """Row-parallel linear layer; contract as of `parallel.tensor.row_linear`.

    split     forward    y_BSE scattered, part by part               sends B·S·E
              backward   dx_BSF and dw_EF, rows by rows as dy comes  sends B·S·E
    whole     forward    y_BSE summed slice by slice                 sends B·S·E
              backward   as uncut                                    sends nothing
    """
    return _Row.apply(x_BSF, weight, bias, region, site)


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, region: Region, site: str
    ) -> torch.Tensor:
        ctx.region, ctx.site, ctx.biased = region, site, bias is not None
        ctx.save_for_backward(x, weight)
        forward = _row_forward_split if region.split else _row_forward_whole
        y = forward(x.flatten(0, 1), weight, x.shape[:2], region, site)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        region: Region = ctx.region
        size = region.axis.size if region.split else 1
        x_NF, dy_ME, place = x.flatten(0, 1), dy.flatten(0, 1).contiguous(), Rows(dy.shape[1], size)
        with scope(ctx.site, "backward"):
            db = dy.sum(dim=(0, 1), dtype=weight.dtype) if ctx.biased else None
            cast, dx, dw = weight.to(x.dtype), torch.empty_like(x_NF), torch.empty_like(weight)
            total = WeightGradient(dw)

            def use(rows: torch.Tensor, part: int, start: int) -> None:
                for own, whole in place.of(rows, part, start):
                    torch.mm(own, cast, out=dx[whole])
                    total.add(own, x_NF[whole])

            if region.split:
                assert region.pipeline is not None
                ring = GatherRing(dy_ME, region.axis, region.pipeline, ctx.site)
                for index in range(size):
                    ring.step(index, use)
            else:
                use(dy_ME, 0, 0)
            return dx.view(x.shape), dw, db, None, None


def _row_forward_split(
    x_NF: torch.Tensor, weight: torch.Tensor, shape: torch.Size, region: Region, site: str
) -> torch.Tensor:
    assert region.pipeline is not None
    batch, length = shape[0], shape[1] // region.axis.size
    cast, place = weight.to(x_NF.dtype), Rows(length, region.axis.size)
    ring = ScatterRing(x_NF, batch * length, len(weight), region.axis, region.pipeline, site)

    def multiply(out: torch.Tensor, part: int, start: int) -> None:
        for own, whole in place.of(out, part, start):
            torch.mm(x_NF[whole], cast.T, out=own)

    for index in range(region.axis.size):
        ring.step(index, multiply)
    return ring.result().view(batch, length, -1)


def _row_forward_whole(
    x_NF: torch.Tensor, weight: torch.Tensor, shape: torch.Size, region: Region, site: str
) -> torch.Tensor:
    casts, y = [weight.to(x_NF.dtype)], x_NF.new_empty(len(x_NF), len(weight))
    summing = _sums(y, lambda rows: torch.mm(x_NF[rows], casts[0].T, out=y[rows]), region, site)
    casts.clear()
    for pending in summing:
        pending.wait()
    return y.view(*shape, -1)

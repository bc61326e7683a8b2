"""Collective matmul, executed: tensor-parallel products whose communication runs under them (`schemes.matmul`).

    B batch   S sequence   E d_model   F features   T ranks of the axis   M rows of a rank's part, B·S/T   N = B·S

Two rings, each the other's mirror, walk the schedules of the scheme's page with `Axis.shift`; what is computed on rows
that came, or for rows that leave, is given as a function. On top of them:

    column_linear, row_linear     parallel.tensor's layers of the same names, cut; for activations that are whole or
                                  split along the sequence outside
    gather_columns_matmul         y = gather(x) @ w.T, where x is split along its features, [N, E/T]
    matmul_scatter_columns        y = scatter(x @ w.T), where y is split along its features, [N, E/T]

It works on any backend that sends messages while it computes: gloo does on threads of its own, NCCL on a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from meshwright.comm.collectives import Axis, Pending
from meshwright.comm.scope import scope
from meshwright.parallel.sequence import Region
from meshwright.schemes.matmul import Hop, gather_steps, runs, scatter_steps, segments, slices
from meshwright.schemes.tape import Pipeline

Use = Callable[[torch.Tensor, int, int], None]
"""(rows, part, start): rows of the part of a rank, from its row `start` on, to be read or to be filled."""


class GatherRing:
    """Each rank's part [M, E] travels once around the ring; it is used while its pieces go on."""

    def __init__(self, part_ME: torch.Tensor, axis: Axis, pipeline: Pipeline, site: str) -> None:
        """Puts the own part, which is contiguous, on the wire."""
        self._axis, self._site = axis, site
        self._steps = gather_steps(axis.rank, axis.size, len(part_ME), pipeline)
        self._held: torch.Tensor | None = part_ME
        self._arriving: torch.Tensor | None = torch.empty_like(part_ME)
        self._pending = [self._shift(hop, part_ME, self._arriving) for hop in self._steps[0]]

    def step(self, index: int, use: Use, *, whole: bool = False) -> None:
        """Use what a step holds: piece by piece as it comes, or `whole` once all of it is there."""
        last = index == len(self._steps) - 1
        if index:
            self._held, self._arriving = self._arriving, None
        held = self._held
        assert held is not None
        if index:
            following = None if last else torch.empty_like(held)
            arrived, self._pending = self._pending, []
            for pending, hop in zip(arrived, self._steps[index], strict=True):
                pending.wait()
                if following is not None:
                    self._pending.append(self._shift(hop, held, following))
                if not whole:
                    use(held[hop.start : hop.stop], hop.part, hop.start)
            self._arriving = following
        if whole or not index:
            for run in runs(self._steps[index]):
                use(held[run.start : run.stop], run.part, run.start)
        if last:
            self._held = None

    def _shift(self, hop: Hop, held: torch.Tensor, into: torch.Tensor) -> Pending:
        return _shift(self._axis, hop, held, into, self._site)


class ScatterRing:
    """Partial sums of every rank's part [M, E] travel once around the ring and end at their owner."""

    def __init__(self, like: torch.Tensor, rows: int, features: int, axis: Axis, pipeline: Pipeline, site: str) -> None:
        """`rows` × `features` is a part; `like` has its dtype and device."""
        self._axis, self._site = axis, site
        self._steps = scatter_steps(axis.rank, axis.size, rows, pipeline)
        self._empty = lambda: like.new_empty(rows, features)
        self._own: torch.Tensor | None = None
        self._arriving: torch.Tensor | None = None
        self._pending: list[Pending] = []

    def compute(self, index: int, product: Use) -> None:
        """Make the partial products of a step: `product` fills the rows that it is given."""
        own = self._empty()
        if index:
            for run in runs(self._steps[index]):
                product(own[run.start : run.stop], run.part, run.start)
            self._own = own
            return
        self._arriving = self._empty()
        for hop in self._steps[0]:
            product(own[hop.start : hop.stop], hop.part, hop.start)
            self._pending.append(_shift(self._axis, hop, own, self._arriving, self._site))

    def combine(self, index: int) -> None:
        """Add them to the sums that have come, and let those go on."""
        if not index:
            return
        last = index == len(self._steps) - 1
        own, arrived, self._own = self._own, self._arriving, None
        assert own is not None and arrived is not None
        following = None if last else self._empty()
        waiting, self._pending = self._pending, []
        for pending, hop in zip(waiting, self._steps[index], strict=True):
            pending.wait()
            arrived[hop.start : hop.stop].add_(own[hop.start : hop.stop])
            if following is not None:
                self._pending.append(_shift(self._axis, hop, arrived, following, self._site))
        self._arriving = arrived if last else following

    def result(self) -> torch.Tensor:
        """The sums of the own part, after the last step."""
        assert self._arriving is not None and not self._pending
        return self._arriving


def _shift(axis: Axis, hop: Hop, held: torch.Tensor, into: torch.Tensor, site: str) -> Pending:
    rows = slice(hop.start, hop.stop)
    return axis.shift(held[rows], into=into[rows], send_to=hop.send_to, receive_from=hop.receive_from, site=site)


class _Rows:
    """Rows of a rank's part, [B, S/T] flattened, in tensors of the whole, [B, S] flattened."""

    def __init__(self, batch: int, length: int, size: int) -> None:
        self._batch, self._length, self._size = batch, length, size

    def of(self, rows: torch.Tensor, part: int, start: int) -> list[tuple[torch.Tensor, slice]]:
        """The rows of each sequence, and where they are in the whole."""
        found = segments(part, start, start + len(rows), self._batch, self._length, self._size)
        return [
            (rows[s.in_part - start : s.in_part - start + s.rows], slice(s.in_whole, s.in_whole + s.rows))
            for s in found
        ]


class _WeightGradients:
    """Σ dy.T @ x over rows that come one after the other, in the dtype of the weights."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self.sums = [torch.empty_like(weight) for weight in weights]
        self._is_first = True

    def add(self, dys: Sequence[torch.Tensor], x: torch.Tensor) -> None:
        for total, dy in zip(self.sums, dys, strict=True):
            if total.dtype != x.dtype:
                product = torch.mm(dy.T, x)
                total.copy_(product) if self._is_first else total.add_(product)
                del product
            elif self._is_first:
                torch.mm(dy.T, x, out=total)
            else:
                total.addmm_(dy.T, x)
        self._is_first = False


def _input_gradient(
    dys: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], rows: slice, out: torch.Tensor
) -> None:
    """Σ dy @ w of some rows."""
    torch.mm(dys[0][rows], weights[0], out=out)
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        out.addmm_(dy[rows], weight)


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
        place = _Rows(batch, length, size)

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
    x_ME, place = x.flatten(0, 1).contiguous(), _Rows(batch, length, region.axis.size)
    gather = GatherRing(x_ME, region.axis, region.pipeline, site)
    scatter = ScatterRing(x_ME, batch * length, features, region.axis, region.pipeline, site)
    casts, dws = [weight.to(x.dtype) for weight in weights], _WeightGradients(weights)

    def towards_input(out: torch.Tensor, part: int, start: int) -> None:
        for own, whole in place.of(out, part, start):
            _input_gradient(dys, casts, whole, own)

    def towards_weights(rows: torch.Tensor, part: int, start: int) -> None:
        for own, whole in place.of(rows, part, start):
            dws.add([dy[whole] for dy in dys], own)

    for index in range(region.axis.size):
        scatter.compute(index, towards_input)
        gather.step(index, towards_weights, whole=True)
        scatter.combine(index)
    return scatter.result().view(x.shape), dws.sums


def _column_backward_whole(
    x: torch.Tensor, weights: Sequence[torch.Tensor], dys: Sequence[torch.Tensor], region: Region, site: str
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Slices of the input's gradient are summed under its other slices, and under the weights' gradients."""
    x_NE = x.flatten(0, 1)
    casts, dx, summing = [weight.to(x.dtype) for weight in weights], torch.empty_like(x_NE), []
    assert region.pipeline is not None
    for start, stop in slices(len(dx), region.pipeline.chunks):
        _input_gradient(dys, casts, slice(start, stop), dx[start:stop])
        summing.append(region.axis.all_reduce(dx[start:stop], site=site))
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
        x_NF, dy_ME, place = x.flatten(0, 1), dy.flatten(0, 1).contiguous(), _Rows(dy.shape[0], dy.shape[1], size)
        with scope(ctx.site, "backward"):
            db = dy.sum(dim=(0, 1), dtype=weight.dtype) if ctx.biased else None
            cast, dx, dws = weight.to(x.dtype), torch.empty_like(x_NF), _WeightGradients([weight])

            def use(rows: torch.Tensor, part: int, start: int) -> None:
                for own, whole in place.of(rows, part, start):
                    torch.mm(own, cast, out=dx[whole])
                    dws.add([own], x_NF[whole])

            if region.split:
                assert region.pipeline is not None
                ring = GatherRing(dy_ME, region.axis, region.pipeline, ctx.site)
                for index in range(size):
                    ring.step(index, use)
            else:
                use(dy_ME, 0, 0)
            return dx.view(x.shape), *dws.sums, db, None, None


def _row_forward_split(
    x_NF: torch.Tensor, weight: torch.Tensor, shape: torch.Size, region: Region, site: str
) -> torch.Tensor:
    assert region.pipeline is not None
    batch, length = shape[0], shape[1] // region.axis.size
    cast, place = weight.to(x_NF.dtype), _Rows(batch, length, region.axis.size)
    ring = ScatterRing(x_NF, batch * length, len(weight), region.axis, region.pipeline, site)

    def multiply(out: torch.Tensor, part: int, start: int) -> None:
        for own, whole in place.of(out, part, start):
            torch.mm(x_NF[whole], cast.T, out=own)

    for index in range(region.axis.size):
        ring.compute(index, multiply)
        ring.combine(index)
    return ring.result().view(batch, length, -1)


def _row_forward_whole(
    x_NF: torch.Tensor, weight: torch.Tensor, shape: torch.Size, region: Region, site: str
) -> torch.Tensor:
    assert region.pipeline is not None
    cast, y, summing = weight.to(x_NF.dtype), x_NF.new_empty(len(x_NF), len(weight)), []
    for start, stop in slices(len(y), region.pipeline.chunks):
        torch.mm(x_NF[start:stop], cast.T, out=y[start:stop])
        summing.append(region.axis.all_reduce(y[start:stop], site=site))
    del cast
    for pending in summing:
        pending.wait()
    return y.view(*shape, -1)


# --- activations that are split along their features ------------------------------------------------------------------


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
        y, blocks, started = x.new_empty(len(x), len(weight)), weight.chunk(axis.size, dim=1), axis.rank

        def multiply(rows: torch.Tensor, part: int, start: int) -> None:
            out = y[start : start + len(rows)]
            if part == started:
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
            dw = torch.empty_like(weight)
            blocks, gradients = weight.chunk(ctx.axis.size, dim=1), dw.chunk(ctx.axis.size, dim=1)
            gather = GatherRing(x.contiguous(), ctx.axis, ctx.pipeline, ctx.site)
            scatter = ScatterRing(x, x.shape[0], x.shape[1], ctx.axis, ctx.pipeline, ctx.site)
            seen: set[int] = set()

            def towards_input(out: torch.Tensor, part: int, start: int) -> None:
                torch.mm(dy[start : start + len(out)], blocks[part], out=out)

            def towards_weight(rows: torch.Tensor, part: int, start: int) -> None:
                product = torch.mm(dy[start : start + len(rows)].T, rows)
                gradients[part].add_(product) if part in seen else gradients[part].copy_(product)
                seen.add(part)

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
        blocks = weight.chunk(axis.size)
        ring = ScatterRing(x, len(x), len(weight) // axis.size, axis, pipeline, site)

        def multiply(out: torch.Tensor, part: int, start: int) -> None:
            torch.mm(x[start : start + len(out)], blocks[part].T, out=out)

        for index in range(axis.size):
            ring.compute(index, multiply)
            ring.combine(index)
        return ring.result()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        with scope(ctx.site, "backward"):
            dx, dw, started = torch.empty_like(x), torch.empty_like(weight), ctx.axis.rank
            blocks, gradients = weight.chunk(ctx.axis.size), dw.chunk(ctx.axis.size)
            seen: set[int] = set()

            def use(rows: torch.Tensor, part: int, start: int) -> None:
                stop = start + len(rows)
                if part == started:
                    torch.mm(rows, blocks[part], out=dx[start:stop])
                else:
                    dx[start:stop].addmm_(rows, blocks[part])
                if part in seen:
                    gradients[part].addmm_(rows.T, x[start:stop])
                else:
                    torch.mm(rows.T, x[start:stop], out=gradients[part])
                seen.add(part)

            ring = GatherRing(dy.contiguous(), ctx.axis, ctx.pipeline, ctx.site)
            for index in range(ctx.axis.size):
                ring.step(index, use)
            return dx, dw, None, None, None

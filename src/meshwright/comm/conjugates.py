"""Megatron's conjugate pairs (Shoeybi et al. 2019, section 3): each is the other's backward.

    copy_to      forward identity          backward all-reduce     (f in the paper)
    reduce_from  forward all-reduce        backward identity       (g in the paper)
    gather_from  forward all-gather        backward keep own part
    scatter_to   forward keep own part     backward all-gather

The split dim of `gather_from` and `scatter_to` is the last one, [..., F/T] <-> [..., F]. Every one of them sends the
elements of its full tensor once, and saves nothing for backward.
"""

from __future__ import annotations

from typing import Any

import torch

from meshwright.comm.collectives import Axis
from meshwright.comm.scope import scope


def copy_to(x: torch.Tensor, axis: Axis, site: str) -> torch.Tensor:
    """Identity; the gradient is summed over the axis. The conjugate of `reduce_from`."""
    return _CopyTo.apply(x, axis, site)


def reduce_from(x: torch.Tensor, axis: Axis, site: str) -> torch.Tensor:
    """Sum over the axis, in place; the gradient passes unchanged. The conjugate of `copy_to`.

    `x` must be nobody else's: not a leaf, not a view, not saved by the operation that made it.
    """
    return _ReduceFrom.apply(x, axis, site)


def gather_from(x: torch.Tensor, axis: Axis, site: str) -> torch.Tensor:
    """[..., F/T] -> [..., F]; the gradient keeps this rank's part. The conjugate of `scatter_to`."""
    return _GatherFrom.apply(x, axis, site)


def scatter_to(x: torch.Tensor, axis: Axis, site: str) -> torch.Tensor:
    """[..., F] -> [..., F/T]; the gradient is all-gathered. The conjugate of `gather_from`."""
    return _ScatterTo.apply(x, axis, site)


def _gather_last(x: torch.Tensor, axis: Axis, site: str) -> torch.Tensor:
    if axis.size == 1:
        return x
    parts = axis.all_gather(x.movedim(-1, 0).contiguous(), site=site).wait()
    return parts.movedim(0, -1).contiguous()


def _own_part(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return x.chunk(axis.size, dim=-1)[axis.rank].contiguous()


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, site: str) -> torch.Tensor:
        ctx.axis, ctx.site = axis, site
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        with scope(ctx.site, "backward"):
            dx = dy.clone() if ctx.axis.size > 1 else dy
            return ctx.axis.all_reduce(dx, site=ctx.site).wait(), None, None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, site: str) -> torch.Tensor:
        ctx.mark_dirty(x)
        return axis.all_reduce(x, site=site).wait()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return dy, None, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, site: str) -> torch.Tensor:
        ctx.axis = axis
        return _gather_last(x, axis, site)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return _own_part(dy, ctx.axis), None, None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, site: str) -> torch.Tensor:
        ctx.axis, ctx.site = axis, site
        return _own_part(x, axis)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        with scope(ctx.site, "backward"):
            return _gather_last(dy, ctx.axis, ctx.site), None, None

"""DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509), executed: exchange the sequence for heads, and back.

    B batch   S sequence of this rank   P degree   H heads (query, or key and value)   D head_dim

    to_heads      [B, S, H, D] -> [B, P·S, H/P, D]    every token of the axis, for this rank's heads
    to_sequence   [B, P·S, H/P, D] -> [B, S, H, D]    the inverse, and its backward

The ranks' sequences are joined in rank order. Of H < P key-value heads each goes to P/H neighbouring ranks; the
gradients that come back from those are summed. What is sent is `schemes.ulysses`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from meshwright.comm.collectives import Axis
from meshwright.comm.scope import scope


def to_heads(qkv: Sequence[torch.Tensor], axis: Axis, site: str) -> tuple[torch.Tensor, ...]:
    """Each [B, S, H, D] -> [B, P·S, max(1, H/P), D]. All are on the wire before the first is waited for."""
    return _ToHeads.apply(axis, site, *qkv)


def to_sequence(out_BSHD: torch.Tensor, axis: Axis, site: str) -> torch.Tensor:
    """[B, P·S, H/P, D] -> [B, S, H, D]."""
    return _ToSequence.apply(out_BSHD, axis, site)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, site: str, *tensors: torch.Tensor) -> Any:
        ctx.axis, ctx.site, ctx.heads = axis, site, [x.shape[2] for x in tensors]
        return tuple(_scatter_heads(tensors, axis, site))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        with scope(ctx.site, "backward"):
            return None, None, *_gather_heads(gradients, ctx.heads, ctx.axis, ctx.site)


class _ToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, axis: Axis, site: str) -> torch.Tensor:
        ctx.axis, ctx.site = axis, site
        return _gather_heads([out], [out.shape[2] * axis.size], axis, site)[0]

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        with scope(ctx.site, "backward"):
            return *_scatter_heads([dout], ctx.axis, ctx.site), None, None


def _scatter_heads(tensors: Sequence[torch.Tensor], axis: Axis, site: str) -> list[torch.Tensor]:
    exchanges = [axis.all_to_all(_by_owner(x, axis.size), site=site).then(_joined_sequence) for x in tensors]
    return [exchange.wait() for exchange in exchanges]


def _by_owner(x_BSHD: torch.Tensor, size: int) -> torch.Tensor:
    """[B, S, H, D] -> [P, B, S, max(1, H/P), D]: the heads that go to each rank."""
    heads = x_BSHD.shape[2]
    if heads >= size:
        return x_BSHD.unflatten(2, (size, -1)).movedim(2, 0).contiguous()
    copies = x_BSHD.movedim(2, 0).unsqueeze(1).expand(-1, size // heads, -1, -1, -1)
    return copies.flatten(0, 1).unsqueeze(3).contiguous()


def _joined_sequence(received: torch.Tensor) -> torch.Tensor:
    """[P, B, S, h, D] -> [B, P·S, h, D]."""
    return received.movedim(0, 1).flatten(1, 2).contiguous()


def _gather_heads(tensors: Sequence[torch.Tensor], heads: Sequence[int], axis: Axis, site: str) -> list[torch.Tensor]:
    exchanges = [
        axis.all_to_all(_by_sequence(x, axis.size), site=site).then(functools.partial(_joined_heads, n))
        for x, n in zip(tensors, heads, strict=True)
    ]
    return [exchange.wait() for exchange in exchanges]


def _by_sequence(x_BSHD: torch.Tensor, size: int) -> torch.Tensor:
    """[B, P·S, h, D] -> [P, B, S, h, D]: the part of the sequence that goes to each rank."""
    return x_BSHD.unflatten(1, (size, -1)).movedim(1, 0).contiguous()


def _joined_heads(heads: int, received: torch.Tensor) -> torch.Tensor:
    """[P, B, S, h, D] -> [B, S, H, D]; ranks that had a copy of the same head are summed."""
    if received.shape[0] > heads:
        received = received.unflatten(0, (heads, -1)).sum(dim=1)
    return received.movedim(0, 2).flatten(2, 3).contiguous()

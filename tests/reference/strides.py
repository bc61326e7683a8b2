"""q, k, v and the gradient of the output, [B, S, heads, D] all, in whatever storage callers have them."""

from __future__ import annotations

import torch

Tensors = list[torch.Tensor]


def plain(tensors: Tensors) -> Tensors:
    """As they are."""
    return tensors


def heads_first(tensors: Tensors) -> Tensors:
    """Stored [B, H, S, D]."""
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]


def packed(tensors: Tensors) -> Tensors:
    """q, k and v slices of one tensor [B, S, (H+2K), D], as one projection makes them."""
    q, k, v, dout = tensors
    return [*torch.cat((q, k, v), 2).split([x.shape[2] for x in (q, k, v)], 2), dout]


def padded(tensors: Tensors) -> Tensors:
    """Rows at the start of longer ones, tokens from the middle of a longer sequence."""
    found = []
    for x in tensors:
        B, S, H, D = x.shape
        larger = x.new_full((B, S + 7, H, D + 8), torch.nan)
        larger[:, 3 : S + 3, :, :D] = x
        found.append(larger[:, 3 : S + 3, :, :D])
    return found


def odd(tensors: Tensors) -> Tensors:
    """Rows of an odd number of elements, from an odd address."""
    found = []
    for x in tensors:
        B, S, H, D = x.shape
        larger = x.new_full((B, S, H, D + 3), torch.nan)
        larger[..., 1 : D + 1] = x
        found.append(larger[..., 1 : D + 1])
    return found


def dims_apart(tensors: Tensors) -> Tensors:
    """The last dim is not contiguous."""
    return [x.mT.contiguous().mT for x in tensors]


def shared_heads(tensors: Tensors) -> Tensors:
    """All key heads are one, and so is the gradient of the output: strides of 0."""
    q, k, v, dout = tensors
    return [q, *(x[:, :, :1].expand_as(x) for x in (k, v)), dout[:1, :1, :1].expand_as(dout)]


def shared_batch(tensors: Tensors) -> Tensors:
    """Every sequence has the same keys."""
    q, k, v, dout = tensors
    return [q, *(x[:1].expand_as(x) for x in (k, v)), dout]


def one_number(tensors: Tensors) -> Tensors:
    """The gradient of a sum: one number, expanded."""
    *qkv, dout = tensors
    return [*qkv, dout[0, 0, 0, 0].expand_as(dout)]


def all_unlike(tensors: Tensors) -> Tensors:
    """Each tensor in a storage of its own kind."""
    q, k, v, dout = tensors
    return [
        padded([q])[0],
        heads_first([k])[0],
        padded(heads_first([v]))[0],
        dout.transpose(0, 1).contiguous().transpose(0, 1),
    ]

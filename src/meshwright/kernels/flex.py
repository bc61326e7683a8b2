"""Causal attention by torch's FlexAttention: a score function, identity here, and a mask by blocks, compiled for a GPU.

    q_BSHD  [B, S, H, D]    k_BZKD, v_BZKD  [B, Z, K, D]; H/K query heads share one key head
    forward   out_BSHD in the dtype of q, lse_BHS float32; blocks of 128 × 128 that the mask empties are left out
    backward  dq, dk, dv from out and lse; either of its two passes makes the scores and their gradients again
    saved     q, k, v, out, lse

Two operators of our own wrap it, so that whoever records or rehearses sees one operation and no score matrix.
`torch.compile` would not do: it steps aside, in silence, while a dispatch mode such as the recorder is entered, and the
score matrix would be written out. So FlexAttention's higher-order operators are traced and given to the compiler here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, noop_mask
from torch.utils.flop_counter import register_flop_formula

from meshwright.comm import torch_private
from meshwright.schemes.attention import FLEX_TILE
from meshwright.schemes.flash import Mask, backward_flops, forward_flops

Compiled = Callable[..., tuple[torch.Tensor, ...]]

BLOCK = FLEX_TILE.forward_queries


@torch.library.custom_op("meshwright::flex_forward", mutates_args=())
def flex_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, S, H, D] and log-sum-exp [B, H, S]."""
    operands = tuple(x.transpose(1, 2) for x in (q, k, v))
    out, lse = _compiled(torch_private.flex_forward, causal, *_key(operands))(*operands)
    return out.transpose(1, 2).contiguous(), lse * math.log(2)


@flex_forward.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.custom_op("meshwright::flex_backward", mutates_args=())
def flex_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv. `out` and `lse` may be those over more keys than there are here."""
    operands = tuple(x.transpose(1, 2) for x in (q, k, v, out, dout))
    operands = *operands, (lse / math.log(2)).contiguous()
    dq, dk, dv = _compiled(torch_private.flex_backward, causal, *_key(operands))(*operands)
    return tuple(x.transpose(1, 2).contiguous() for x in (dq, dk, dv))  # type: ignore[return-value]


@flex_backward.register_fake
def _(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@register_flop_formula(torch.ops.meshwright.flex_forward, get_raw=True)
def _forward_flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, **_: Any) -> int:
    B, S, H, D = q.shape
    return forward_flops(B, H, S, k.shape[1], D, FLEX_TILE, Mask(causal))


@register_flop_formula(torch.ops.meshwright.flex_backward, get_raw=True)
def _backward_flops(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    **_: Any,
) -> int:
    B, S, H, D = q.shape
    return backward_flops(B, H, S, k.shape[1], D, FLEX_TILE, Mask(causal))


Key = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def _key(operands: tuple[torch.Tensor, ...]) -> tuple[Key, torch.dtype, torch.device]:
    """What a compiled kernel is for."""
    shapes = tuple((tuple(x.shape), tuple(x.stride())) for x in operands)
    return shapes, operands[0].dtype, operands[0].device


@functools.cache
def _compiled(function: Compiled, causal: bool, shapes: Key, dtype: torch.dtype, device: torch.device) -> Compiled:
    """`function(mask, *operands)`, compiled for operands of such shapes and strides; of 6 the last is float32."""
    (_, _, S, _), Z = shapes[0][0], shapes[1][0][2]
    operands = [
        torch.empty_strided(shape, stride, dtype=torch.float32 if index == 5 else dtype, device=device)
        for index, (shape, stride) in enumerate(shapes)
    ]

    def compiled() -> Compiled:
        mask = block_mask(S, Z, causal, device)
        return torch_private.inductor_compiled(functools.partial(function, mask), operands)

    # Inside an operator, tracing would inherit what dispatch has switched off: hence a thread. What it waits for is the
    # autograd engine's own thread, if backward runs: nothing in there may differentiate, it would wait for itself.
    with ThreadPoolExecutor(1) as clean:
        return clean.submit(compiled).result()


# --- the mask ---------------------------------------------------------------------------------------------------------


def block_mask(queries: int, keys: int, causal: bool, device: torch.device) -> BlockMask:
    """The mask of `create_block_mask`, made from its blocks: no [queries, keys] on the way.

    Causal, a row of blocks sees those before it in full and the last in part, and there are as many queries as keys.
    Of blocks that sequences do not fill it sees a part.
    """
    assert queries == keys or not causal, (queries, keys)
    rows = torch.arange(-(-queries // BLOCK), device=device).unsqueeze(1)
    columns = torch.arange(-(-keys // BLOCK), device=device)
    seen = (columns <= rows) if causal else (columns >= 0) & (rows >= 0)
    whole = seen & (columns < keys // BLOCK) & (rows < queries // BLOCK)
    if causal:
        whole &= columns < rows
    return BlockMask.from_kv_blocks(
        *_in_order(seen & ~whole),
        *_in_order(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=_not_after if causal else noop_mask,
        seq_lengths=(queries, keys),
    )


def _in_order(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of blocks [rows, columns]: how many a row has [1, 1, rows], and columns, these first [1, 1, rows, columns]."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32)[None, None], columns.int()[None, None].contiguous()


def _not_after(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return query >= key

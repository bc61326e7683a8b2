"""What the kernels of FlashAttention-2 visit: tiles of the score matrix, and their FLOPs. `kernels.flash_attention`.

A tile is a block of queries against a block of keys. Kernels visit those with at least one pair that the mask allows,
and compute them whole: a half-masked one costs what a full one does. Three kernels walk them, each in tiles of its own:

    forward   a block of queries walks its keys      2 products: scores, out
    dkv       a block of keys walks its queries      4 products: scores and dP again, dV, dK
    dq        a block of queries walks its keys      3 products: scores and dP again, dQ

Backward is two kernels, so that no gradient is summed by atomics: its result does not depend on the order of blocks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class FlashTile(NamedTuple):
    """Queries and keys of a tile, kernel by kernel."""

    forward_queries: int
    forward_keys: int
    dkv_queries: int
    dkv_keys: int
    dq_queries: int
    dq_keys: int

    def of(self, kernel: Literal["forward", "dkv", "dq"]) -> tuple[int, int]:
        """Queries and keys of one kernel's tiles."""
        at = 2 * ("forward", "dkv", "dq").index(kernel)
        return self[at], self[at + 1]


def flash_tile(head_dim: int, itemsize: int) -> FlashTile:
    """The tiles for a head dimension and bytes of an element: the same on every device, so that an account is too."""
    if itemsize > 2:
        if head_dim > 128:
            return FlashTile(32, 16, 16, 32, 32, 16)
        return FlashTile(32, 32, 32, 32, 32, 32) if head_dim > 64 else FlashTile(64, 32, 32, 64, 64, 32)
    if head_dim > 128:
        return FlashTile(64, 64, 32, 64, 64, 32)
    if head_dim > 64:
        return FlashTile(128, 128, 64, 128, 128, 64)
    return FlashTile(128, 64, 64, 128, 64, 64)


def visited_tiles(queries: int, keys: int, block_q: int, block_k: int, causal: bool, offset: int = 0) -> int:
    """Tiles in which at least one query i sees at least one key j: j <= i + offset where causal, else all."""
    blocks_q, blocks_k = -(-queries // block_q), -(-keys // block_k)
    if not causal:
        return blocks_q * blocks_k
    ends = (min((block + 1) * block_q, queries) + offset for block in range(blocks_q))
    return sum(-(-min(keys, max(0, end)) // block_k) for end in ends)


class Mask(NamedTuple):
    """Query i sees key j where j <= i + offset if causal, else everywhere."""

    causal: bool
    offset: int = 0


def forward_flops(batch: int, heads: int, queries: int, keys: int, head_dim: int, tile: FlashTile, mask: Mask) -> int:
    """FLOPs of the forward kernel: two products of each tile."""
    block = tile.forward_queries, tile.forward_keys
    return 2 * _product_flops(batch * heads * head_dim, queries, keys, *block, mask)


def backward_flops(batch: int, heads: int, queries: int, keys: int, head_dim: int, tile: FlashTile, mask: Mask) -> int:
    """FLOPs of the two backward kernels: four and three products of each of their tiles."""
    rows, dkv, dq = batch * heads * head_dim, (tile.dkv_queries, tile.dkv_keys), (tile.dq_queries, tile.dq_keys)
    return 4 * _product_flops(rows, queries, keys, *dkv, mask) + 3 * _product_flops(rows, queries, keys, *dq, mask)


def _product_flops(rows: int, queries: int, keys: int, block_q: int, block_k: int, mask: Mask) -> int:
    return 2 * rows * visited_tiles(queries, keys, block_q, block_k, *mask) * block_q * block_k

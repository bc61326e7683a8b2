"""Blocks of the flash kernels, merged by their log-sum-exp, are the whole: halves of the keys, and rings on one device.

Outputs are merged in float32, gradients of blocks are their shares of the whole's and are added up in float32.
"""

import itertools

import pytest
import torch
from jobs import sampled
from reference.flash import Problem, Results, assert_judged

from meshwright.kernels import flash_attention
from meshwright.kernels.flash_attention import flash_backward, flash_forward
from meshwright.schemes.flash import FlashTile
from meshwright.schemes.ring import CHUNKS_PER_RANK, schedule


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(flash_attention, "flash_tile", lambda head_dim, itemsize: FlashTile(16, 16, 16, 16, 16, 16))


class Merged:
    """Attention of some queries, of whose keys blocks are given one by one."""

    def __init__(self, q):
        B, S, H, _ = q.shape
        self.q, self.out = q, torch.zeros_like(q, dtype=torch.float32)
        self.lse = q.new_full((B, H, S), -torch.inf, dtype=torch.float32)

    def see(self, rows, k, v, mask):
        """Queries `rows` see keys."""
        out, lse = flash_forward(self.q[:, rows], k, v, **mask)
        total = torch.logaddexp(self.lse[..., rows], lse)
        share = (lse - total).exp().nan_to_num(0.0)  # -inf - -inf: neither has seen a key
        self.out[:, rows] = torch.lerp(self.out[:, rows], out.float(), share.transpose(1, 2).unsqueeze(-1))
        self.lse[..., rows] = total


def by_blocks(blocks, q, k, v, dout):
    """Results of (query rows, key rows, mask) blocks of a whole sequence."""
    merged = Merged(q)
    for rows, columns, mask in blocks:
        merged.see(rows, k[:, columns], v[:, columns], mask)
    out = merged.out.to(q.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    for rows, columns, mask in blocks:
        saved = q[:, rows], k[:, columns], v[:, columns], out[:, rows], merged.lse[..., rows]
        found = flash_backward(dout[:, rows], *saved, **mask)
        for total, part, term in zip((dq, dk, dv), (rows, columns, columns), found, strict=True):
            total[:, part] += term
    return Results(out, merged.lse, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype))


@pytest.mark.parametrize(
    ("split", "dtype"), sampled(itertools.product((23, 16), (torch.float32, torch.bfloat16)), every=3)
)
def test_flash_two_halves_of_the_keys(flash_device, split, dtype):
    """The second half begins at key `split`: an offset of -split. Its first queries see nothing."""
    given = Problem(40, 40).tensors(dtype, flash_device)
    everything = slice(0, 40)
    halves = [
        (everything, slice(0, split), {"causal": True, "offset": 0}),
        (everything, slice(split, 40), {"causal": True, "offset": -split}),
    ]
    assert_judged(by_blocks(halves, *given), given, causal=True)
    assert_judged(by_blocks(halves[::-1], *given), given, causal=True)


def test_flash_halves_of_the_queries(flash_device):
    """An offset in the other direction: later queries see all earlier keys."""
    given = Problem(40, 40).tensors(torch.float32, flash_device)
    blocks = [
        (slice(start, end), slice(0, 40), {"causal": True, "offset": start}) for start, end in ((0, 19), (19, 40))
    ]
    assert_judged(by_blocks(blocks, *given), given, causal=True)


def test_flash_a_half_that_is_forgotten_is_noticed(flash_device):
    given = Problem(40, 40).tensors(torch.float32, flash_device)
    first = [(slice(0, 40), slice(0, 23), {"causal": True, "offset": 0})]
    with pytest.raises(AssertionError):
        assert_judged(by_blocks(first, *given), given, causal=True)


def ring_blocks(size, order, chunk):
    """All blocks of all ranks, as (positions of queries, positions of keys, mask) of the whole sequence."""
    for rank in range(size):
        plan = schedule(rank, size, order)
        own = [range(c * chunk, (c + 1) * chunk) for c in plan.chunks[rank]]
        for step in plan.steps:
            held = [range(c * chunk, (c + 1) * chunk) for c in plan.chunks[step.source]]
            for block in step.blocks:
                rows = list(itertools.chain(*own[block.first_query : block.end_query]))
                columns = list(itertools.chain(*held[block.first_key : block.end_key]))
                yield rows, columns, {"causal": block.masked, "offset": 0}


@pytest.mark.parametrize(
    ("size", "order", "dtype"),
    sampled(itertools.product((2, 4), CHUNKS_PER_RANK, (torch.float32, torch.bfloat16)), every=3),
)
def test_flash_ring(flash_device, size, order, dtype):
    """Chunks of a block and a half or so: a zigzag rank's two make an odd number of blocks."""
    chunk = 22 if order == "contiguous" else 11
    length = chunk * CHUNKS_PER_RANK[order] * size
    given = Problem(length, length, H=2, K=1).tensors(dtype, flash_device)
    assert_judged(by_blocks(list(ring_blocks(size, order, chunk)), *given), given, causal=True)


def test_flash_share_of_a_block_that_adds_nothing(flash_device):
    """A block whose every score is far below the rest: no nan from what exp makes 0."""
    q, k, v, dout = Problem(24, 24, causal=False).tensors(torch.float32, flash_device)
    lse = torch.full((1, 2, 24), 500.0, device=flash_device)
    found = flash_backward(dout, q, k, v, torch.zeros_like(q), lse, causal=False)
    assert not any(x.any() for x in found)


def test_flash_backward_of_rows_that_see_nothing_anywhere(flash_device):
    """Log-sum-exp of -inf, though the block has keys that the mask shows: they add nothing."""
    q, k, v, dout = Problem(24, 24, causal=False).tensors(torch.float32, flash_device)
    lse = torch.full((1, 2, 24), -torch.inf, device=flash_device)
    found = flash_backward(dout, q, k, v, torch.zeros_like(q), lse, causal=False)
    assert not any(x.any() for x in found)

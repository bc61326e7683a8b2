"""Ring attention (Liu et al. 2023), executed: one executor for every schedule of `schemes.ring`.

q_BSHD  [B, S, H, D]    this rank's queries; S is its local sequence, in the schedule's order of chunks
k_BSKD  [B, S, K, D]    this rank's keys; v likewise
->
out_BSHD [B, S, H, D]   causal attention over the sequence of the whole axis

forward   at each of P steps, attend to the keys and values that are held while they are sent on: P-1 hops of k and
          of v, 2·B·S·K·D elements each time. Outputs of blocks are merged by their log-sum-exp, in float32
backward  the same steps and hops again; behind the keys travel the sums of dk and dv, float32, with a P-th hop home
saved     q, k, v, out, lse: linear in the local sequence, whatever the size of the ring
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from meshwright.comm.collectives import Axis
from meshwright.comm.scope import scope
from meshwright.config.attention import Kernel
from meshwright.kernels.attention import attention_backward, attention_forward
from meshwright.kernels.pointwise import accumulation_dtype
from meshwright.kernels.visible import Visible
from meshwright.schemes.ring import Block, Schedule, Step

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, or their gradients."""


def ring_attention(
    q_BSHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    schedule: Schedule,
    axis: Axis,
    kernel: Kernel,
    site: str,
    first_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention by this rank's schedule on the axis. k and v must be contiguous.

    `first_BS`: the global position of the first key that each query sees, where documents are separate.
    """
    return _RingAttention.apply(q_BSHD, k_BSKD, v_BSKD, schedule, axis, kernel, site, first_BS)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        schedule: Schedule,
        axis: Axis,
        kernel: Kernel,
        site: str,
        first_BS: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.schedule, ctx.axis, ctx.kernel, ctx.site, ctx.first_BS = schedule, axis, kernel, site, first_BS
        merged, held = _Merged(q, _Blocks(schedule, q.shape[1], first_BS), kernel), (k, v)
        for step in schedule.steps[:-1]:
            hop = _Hop(held, step, axis, site)
            merged.attend(step, held)
            held = hop.arrived()
        merged.attend(schedule.steps[-1], held)
        del held
        out, lse, random = merged.result()
        ctx.save_for_backward(q, k, v, out, lse, *random)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        q, k, v, out, lse, *random = ctx.saved_tensors
        blocks = _Blocks(ctx.schedule, q.shape[1], ctx.first_BS)
        local = _Backward(_Saved(dout, q, out, lse, tuple(random)), blocks, ctx.kernel)
        held, last = (k, v), ctx.schedule.steps[-1]
        sums: _Hop | None = None
        with scope(ctx.site, "backward"):
            for step in ctx.schedule.steps:
                hop = _Hop(held, step, ctx.axis, ctx.site) if step is not last else None
                found = local.attend(step, held)
                held = hop.arrived() if hop is not None else (k, v)
                sums = _Hop(_added(found, sums.arrived() if sums is not None else None, k), step, ctx.axis, ctx.site)
            assert sums is not None
            dk, dv = (total.to(k.dtype) for total in sums.arrived())
        return local.dq.result().to(q.dtype), dk, dv, None, None, None, None, None


class _Hop:
    """A pair on its way to the next holder, and the one on its way here."""

    def __init__(self, pair: Pair, step: Step, axis: Axis, site: str) -> None:
        self._pending = [
            axis.shift(tensor, send_to=step.send_to, receive_from=step.receive_from, site=site) for tensor in pair
        ]

    def arrived(self) -> Pair:
        """Wait for both. Once only."""
        first, second = (pending.wait() for pending in self._pending)
        self._pending.clear()
        return first, second


class _Blocks:
    """Where the blocks of a schedule lie in local sequences of a length, and what their queries see."""

    def __init__(self, schedule: Schedule, length: int, first_BS: torch.Tensor | None) -> None:
        self.schedule, self.first_BS = schedule, first_BS
        self.chunk = length // len(schedule.chunks[schedule.rank])
        self.queries = self.positions(schedule.rank)

    def rows(self, block: Block) -> slice:
        """A block's queries among the local sequence."""
        return slice(block.first_query * self.chunk, block.end_query * self.chunk)

    def columns(self, block: Block) -> slice:
        """A block's keys among those that are held."""
        return slice(block.first_key * self.chunk, block.end_key * self.chunk)

    def positions(self, rank: int) -> torch.Tensor | None:
        """Global positions of a rank's local sequence, where the mask is made of them."""
        if self.first_BS is None:
            return None
        starts = (chunk * self.chunk for chunk in self.schedule.chunks[rank])
        return torch.cat([torch.arange(start, start + self.chunk, device=self.first_BS.device) for start in starts])

    def visible(self, block: Block, keys: torch.Tensor | None) -> Visible | None:
        """The mask of a block of keys at some positions; None if the block's own flag says it."""
        if self.first_BS is None or self.queries is None or keys is None:
            return None
        rows = self.rows(block)
        return Visible(self.first_BS[:, rows], self.queries[rows], keys[self.columns(block)])


# --- forward ----------------------------------------------------------------------------------------------------------


class _Merged:
    """Output and log-sum-exp over the keys that were seen so far, in float32 (float64 for float64).

    Merging is safe for queries that have seen no key yet (output 0, log-sum-exp -inf) and for blocks that show none.
    """

    def __init__(self, q: torch.Tensor, blocks: _Blocks, kernel: Kernel) -> None:
        self.q, self.blocks, self.kernel = q, blocks, kernel
        self.out: torch.Tensor | None = None
        self.lse: torch.Tensor | None = None
        self.random: tuple[torch.Tensor, ...] = ()

    def attend(self, step: Step, held: Pair) -> None:
        """Let the queries see what a step shows them."""
        positions = self.blocks.positions(step.source)
        for block in step.blocks:
            self._attend(block, *held, self.blocks.visible(block, positions))

    def _attend(self, block: Block, k: torch.Tensor, v: torch.Tensor, visible: Visible | None) -> None:
        rows, columns = self.blocks.rows(block), self.blocks.columns(block)
        out, lse, self.random = attention_forward(
            self.q[:, rows], k[:, columns], v[:, columns], self.kernel, causal=block.masked, visible=visible
        )
        out, lse = out.to(accumulation_dtype(out.dtype)), lse[..., : out.shape[1]]
        if self.out is None and out.shape[1] == self.q.shape[1]:
            self.out, self.lse = out, lse
            return
        if self.out is None:
            self.out = out.new_zeros(self.q.shape)
            self.lse = lse.new_full((*lse.shape[:2], self.q.shape[1]), -torch.inf)
        assert self.lse is not None
        own_out, own_lse = self.out[:, rows], self.lse[..., rows]
        total = torch.logaddexp(own_lse, lse)
        share = lse.sub_(total).exp_().nan_to_num_(0.0)  # -inf - -inf: neither has seen a key
        own_out.lerp_(out, share.transpose(1, 2).unsqueeze(-1))
        own_lse.copy_(total)

    def result(self) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Output in the dtype of the queries, log-sum-exp and the kernel's random state. Once only."""
        assert self.out is not None and self.lse is not None
        out, self.out = self.out, None
        return out.to(self.q.dtype), self.lse, self.random


# --- backward ---------------------------------------------------------------------------------------------------------


class _Sum:
    """A sum of terms that each cover a part of dim 1, in float32 (float64 for float64)."""

    def __init__(self, like: torch.Tensor, total: torch.Tensor | None = None) -> None:
        self._like, self._total = like, total

    def add(self, part: slice, term: torch.Tensor) -> None:
        """A first term that covers everything becomes the sum."""
        if self._total is None and term.shape == self._like.shape:
            self._total = term.to(accumulation_dtype(term.dtype)).contiguous()
        else:
            self._total = self._begun()
            self._total[:, part].add_(term)

    def _begun(self) -> torch.Tensor:
        if self._total is not None:
            return self._total
        return torch.zeros_like(self._like, dtype=accumulation_dtype(self._like.dtype))

    def result(self) -> torch.Tensor:
        """The sum, which is then its caller's alone. Once only."""
        total, self._total = self._begun(), None
        return total


class _Saved(NamedTuple):
    """What every block's backward reads."""

    dout: torch.Tensor
    q: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    random: tuple[torch.Tensor, ...]


Found = list[tuple[slice, torch.Tensor, torch.Tensor]]
"""Gradients of parts of the keys and values that were held."""


class _Backward:
    """This rank's own part of backward: every block's gradients, and the sum of those of its queries."""

    def __init__(self, saved: _Saved, blocks: _Blocks, kernel: Kernel) -> None:
        self.saved, self.blocks, self.kernel, self.dq = saved, blocks, kernel, _Sum(saved.q)

    def attend(self, step: Step, held: Pair) -> Found:
        """Gradients of what a step showed, in the order of its blocks."""
        positions = self.blocks.positions(step.source)
        return [
            (self.blocks.columns(block), *self._attend(block, *held, self.blocks.visible(block, positions)))
            for block in step.blocks
        ]

    def _attend(self, block: Block, k: torch.Tensor, v: torch.Tensor, visible: Visible | None) -> Pair:
        rows, columns = self.blocks.rows(block), self.blocks.columns(block)
        dout, q, out, lse, random = self.saved
        dq, dk, dv = attention_backward(
            dout[:, rows],
            q[:, rows],
            k[:, columns],
            v[:, columns],
            out[:, rows],
            lse[..., rows],
            random,
            self.kernel,
            causal=block.masked,
            visible=visible,
        )
        self.dq.add(rows, dq)
        return dk, dv


def _added(found: Found, arrived: Pair | None, like: torch.Tensor) -> Pair:
    """The sums that travel with the keys, once this step's gradients, given up, are in them."""
    dk, dv = (_Sum(like, total) for total in arrived or (None, None))
    while found:
        columns, *terms = found.pop()
        for total, term in zip((dk, dv), terms, strict=True):
            total.add(columns, term)
    return dk.result(), dv.result()

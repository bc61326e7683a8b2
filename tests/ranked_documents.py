"""Attention within documents over a divided sequence, as one rank runs it (importable by name).

Like `ranked_context`: every function takes the whole problem, and where the document of each token begins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jobs import tiny_job
from ranked_context import KERNEL, Problem, axes, num_ranks, planned_positions
from ranked_tensor import SITE, Outcome, recorded

from meshwright.config.tree import Layout
from meshwright.parallel.context import ContextAttention
from meshwright.parallel.ring import ring_attention
from meshwright.schemes.ring import Order, Schedule, schedule
from meshwright.training.shard import shard_batch
from meshwright.training.step import Batch


def ring(problem: Problem, first: torch.Tensor, order: Order) -> Outcome:
    """Ring attention of this rank's positions. `first` [B, S]."""
    size = num_ranks()
    plans = [schedule(rank, size, order) for rank in range(size)]
    return by_hand(problem, first, plans)


def by_hand(problem: Problem, first: torch.Tensor, plans: Sequence[Schedule]) -> Outcome:
    """The same by this rank's one of some schedules."""
    axis = axes(ring=num_ranks())["ring"]
    plan, positions = plans[axis.rank], planned_positions(plans, problem.q.shape[1])[axis.rank]
    (*qkv, dout), own = problem.cut(positions), first[:, positions]
    return recorded(lambda q, k, v: ring_attention(q, k, v, plan, axis, KERNEL, SITE, own), qkv, [dout])


def part_of(first: torch.Tensor, layout: Layout, rank: int) -> Batch:
    """A rank's part of a batch without tokens; `first` [B, seq_len] may be shorter than what ranks divide."""
    batch, seq_len = first.shape
    job = tiny_job(layout=layout, batch=batch, seq_len=seq_len, pad=True)
    return shard_batch(torch.zeros_like(first), torch.zeros_like(first), job, layout.coordinates(rank), first)


def local_positions(layout: Layout, seq_len: int) -> list[torch.Tensor]:
    """What each rank holds of a sequence without padding, by the batch that it is given."""
    return [part_of(torch.zeros(1, seq_len, dtype=torch.int64), layout, r).positions for r in range(layout.world)]


def context(problem: Problem, first: torch.Tensor, layout: Layout, recompute: bool = False) -> Outcome:
    """Attention as a layer calls it, with the beginnings of documents as a batch has them.

    The problem is as long as what ranks divide: `first`, if it is shorter, is filled up.
    """
    own = axes(layout.ring, layout.ulysses)
    attention = ContextAttention(own["ulysses"], own["ring"], layout.ring_order, KERNEL, recompute)
    rank = own["ring"].rank * layout.ulysses + own["ulysses"].rank
    beginnings = part_of(first, layout, rank).first
    assert beginnings is not None
    *qkv, dout = problem.cut(local_positions(layout, problem.q.shape[1])[rank])
    return recorded(lambda *leaves: attention(list(leaves), SITE, beginnings[0]), qkv, [dout])


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Causal attention within documents by its formula."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    keys = torch.arange(k.shape[1])
    seen = (keys >= first.unsqueeze(-1)) & (keys <= keys.unsqueeze(-1))
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1), v)

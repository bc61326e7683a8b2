"""Attention over a divided sequence, as one rank runs it: ours, and torch's private ring attention.

Every function takes the whole problem, q, k, v and the gradient of the output, keeps this rank's part, and returns its
output and gradients with what the recorder saw. The whole comes together again in `joined`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from ranked_tensor import SITE, Outcome, recorded

from meshwright.account import Compute, Event, Footprint, Issue, Wait
from meshwright.audit.recorder import Recorder
from meshwright.comm.collectives import Axis
from meshwright.comm.mesh import World
from meshwright.config.tree import Layout
from meshwright.parallel.context import ContextAttention
from meshwright.parallel.ring import ring_attention
from meshwright.parallel.ulysses import to_heads, to_sequence
from meshwright.schemes.attention import Kernel
from meshwright.schemes.ring import Order, Schedule, owned_chunks, schedule

KERNEL: Kernel = "sdpa_cpu"


class Problem(NamedTuple):
    """Attention, whole: q and dout [B, S, H, D], k and v [B, S, K, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor

    def cut(self, positions: torch.Tensor) -> Problem:
        """The part of some positions."""
        return Problem(*(x[:, positions] for x in self))

    def to(self, dtype: torch.dtype) -> Problem:
        """In another dtype."""
        return Problem(*(x.to(dtype) for x in self))


# --- how a sequence is divided, and whole again -----------------------------------------------------------------------


def positions_of(chunks: Iterable[int], num_chunks: int, seq_len: int) -> torch.Tensor:
    """[S] global positions of chunks of equal length, in their order."""
    return torch.cat([torch.arange(seq_len).chunk(num_chunks)[chunk] for chunk in chunks])


def ring_positions(size: int, order: Order, seq_len: int) -> list[torch.Tensor]:
    """The positions that each rank of a ring holds."""
    num_chunks = size if order == "contiguous" else 2 * size
    return [positions_of(owned_chunks(rank, size, order), num_chunks, seq_len) for rank in range(size)]


def planned_positions(plans: Sequence[Schedule], seq_len: int) -> list[torch.Tensor]:
    """The same for schedules that were made by hand."""
    num_chunks = sum(len(chunks) for chunks in plans[0].chunks)
    return [positions_of(plan.chunks[plan.rank], num_chunks, seq_len) for plan in plans]


def joined(parts: Sequence[torch.Tensor], positions: Sequence[torch.Tensor]) -> torch.Tensor:
    """[B, S, ...] of the whole sequence, of which ranks hold parts."""
    return torch.cat(list(parts), 1)[:, torch.cat(list(positions)).argsort()]


# --- ours -------------------------------------------------------------------------------------------------------------


@functools.cache
def axes(ring: int = 1, ulysses: int = 1) -> dict[str, Axis]:
    """The axes of a layout over all ranks of the pool; without a pool there is one rank."""
    return World.create(Layout(ring=ring, ulysses=ulysses), torch.device("cpu")).axes


def num_ranks() -> int:
    """Ranks of the pool."""
    return dist.get_world_size() if dist.is_initialized() else 1


def attend(problem: Problem, plan: Schedule, positions: torch.Tensor) -> Outcome:
    """Ring attention of this rank's positions, by its schedule."""
    axis, (*qkv, dout) = axes(ring=num_ranks())["ring"], problem.cut(positions)
    return recorded(lambda q, k, v: ring_attention(q, k, v, plan, axis, KERNEL, SITE), qkv, [dout])


def ring(problem: Problem, order: Order) -> Outcome:
    """By the schedule of an order."""
    axis = axes(ring=num_ranks())["ring"]
    plan = schedule(axis.rank, axis.size, order)
    return attend(problem, plan, ring_positions(axis.size, order, problem.q.shape[1])[axis.rank])


def by_hand(problem: Problem, plans: Sequence[Schedule]) -> Outcome:
    """By this rank's one of some schedules."""
    rank = axes(ring=num_ranks())["ring"].rank
    return attend(problem, plans[rank], planned_positions(plans, problem.q.shape[1])[rank])


class Moment(NamedTuple):
    """`post` or `wait`, with the message's number among those of its phase; `attend` or `add`, with none."""

    word: str
    message: int | None = None


def _moments(events: Iterable[Event]) -> list[Moment]:
    """Several elementwise operations in a row are one `add`."""
    found: list[Moment] = []
    numbers: dict[int, int] = {}
    for event in events:
        if isinstance(event, Issue):
            numbers[event.ticket] = len(numbers)
            found.append(Moment("post", numbers[event.ticket]))
        elif isinstance(event, Wait):
            found.append(Moment("wait", numbers[event.ticket]))
        elif isinstance(event, Compute) and event.bytes:
            found.append(Moment("attend" if event.kind == "attention" else "add"))
    return [moment for i, moment in enumerate(found) if moment != Moment("add") or found[i - 1] != moment]


def courses(problem: Problem, order: Order) -> dict[str, list[Moment]]:
    """What happens in forward and in backward, one after the other."""
    axis = axes(ring=num_ranks())["ring"]
    plan = schedule(axis.rank, axis.size, order)
    *qkv, dout = problem.cut(ring_positions(axis.size, order, problem.q.shape[1])[axis.rank])
    leaves = [x.requires_grad_() for x in qkv]
    with Recorder() as recorder:
        out = ring_attention(*leaves, plan, axis, KERNEL, SITE)
        torch.autograd.grad(out, leaves, dout)
    events = recorder.trace().events
    return {phase: _moments(e for e in events if e.phase == phase) for phase in ("forward", "backward")}


def footprints(lengths: Sequence[int], order: Order) -> list[Footprint]:
    """Memory at the peak of forward and backward together, for each local length."""
    axis, found = axes(ring=num_ranks())["ring"], []
    plan = schedule(axis.rank, axis.size, order)
    for length in lengths:
        with Recorder() as recorder:
            leaves = [torch.ones(1, length, 2, 4, requires_grad=True) for _ in range(3)]
            out = ring_attention(*leaves, plan, axis, KERNEL, SITE)
            out.backward(torch.ones_like(out))
            del out, leaves
        found.append(Footprint.of(recorder.trace()))
    return found


class Exchanged(NamedTuple):
    """What `to_heads` and `to_sequence` made of this rank's part, in rank order of the sequence."""

    inside: tuple[torch.Tensor, ...]
    back: torch.Tensor
    outcome: Outcome


def exchange(q: torch.Tensor, k: torch.Tensor, dq: torch.Tensor, dk: torch.Tensor) -> Exchanged:
    """To heads and, for q, back to the sequence. Gradients, of what is inside: dq and dk, whole in both.

    dk has max(K, P) heads: if there are fewer key heads than ranks, each copy has a gradient of its own.
    """
    axis = axes(ulysses=num_ranks())["ulysses"]

    def own_sequence(x: torch.Tensor) -> torch.Tensor:
        return x.chunk(axis.size, dim=1)[axis.rank].contiguous()

    def own_heads(x: torch.Tensor) -> torch.Tensor:
        return x.chunk(axis.size, dim=2)[axis.rank].contiguous()

    outcome = recorded(
        lambda *tensors: to_heads(tensors, axis, SITE),
        [own_sequence(q), own_sequence(k)],
        [own_heads(dq), own_heads(dk)],
    )
    inside = tuple(outcome.outputs)
    return Exchanged(inside, to_sequence(inside[0], axis, SITE), outcome)


def return_trip(x: torch.Tensor, dx: torch.Tensor) -> Outcome:
    """`to_sequence` of this rank's heads of x, and its gradient: dx is whole too."""
    axis = axes(ulysses=num_ranks())["ulysses"]
    heads, sequence = x.chunk(axis.size, dim=2)[axis.rank], dx.chunk(axis.size, dim=1)[axis.rank]
    return recorded(lambda y: to_sequence(y, axis, SITE), [heads], [sequence])


def context_positions(ring: int, ulysses: int, order: Order, seq_len: int) -> list[torch.Tensor]:
    """What each rank of ring × ulysses holds, by rank: a ring rank's chunks, divided in order among ulysses ranks."""
    return [part for chunks in ring_positions(ring, order, seq_len) for part in chunks.chunk(ulysses)]


def context(problem: Problem, ring: int, ulysses: int, order: Order, recompute: bool = False) -> Outcome:
    """Attention as a layer calls it."""
    own = axes(ring, ulysses)
    attention = ContextAttention(own["ulysses"], own["ring"], order, KERNEL, recompute)
    index = own["ring"].rank * ulysses + own["ulysses"].rank
    *qkv, dout = problem.cut(context_positions(ring, ulysses, order, problem.q.shape[1])[index])
    return recorded(lambda *leaves: attention(list(leaves), SITE), qkv, [dout])


# --- torch's ring attention -------------------------------------------------------------------------------------------


def oracle(problem: Problem, balanced: bool) -> list[torch.Tensor]:
    """Output, dq, dk, dv by torch's template over the kernel that we call; all heads are query heads.

    Balanced, its order is head and tail, our zigzag.
    """
    from torch.distributed.tensor.experimental._context_parallel import _attention as theirs

    size, rank = num_ranks(), dist.get_rank()
    order: Order = "zigzag" if balanced else "contiguous"
    own = problem.cut(ring_positions(size, order, problem.q.shape[1])[rank])
    query, key, value, dout = (x.transpose(1, 2) for x in own)
    options = theirs._cp_options
    before = options.enable_load_balance, options.convert_to_f32
    options.enable_load_balance, options.convert_to_f32 = balanced, False
    aten, group = torch.ops.aten, dist.group.WORLD
    try:
        forward = aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = theirs._templated_ring_attention(group, 2, forward, query, key, value, is_causal=True, dropout_p=0.0)
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients = theirs._templated_ring_attention_backward(
            group, 2, backward, dout, "grad_out", query, key, value, out, lse, is_causal=True, dropout_p=0.0
        )
    finally:
        options.enable_load_balance, options.convert_to_f32 = before
    return [x.transpose(1, 2).contiguous() for x in (out, *gradients[:3])]


def oracle_order(size: int, seq_len: int) -> torch.Tensor:
    """Positions in the order in which torch's balancer divides them among ranks."""
    from torch.distributed.tensor.experimental._context_parallel._load_balancer import _HeadTailLoadBalancer

    return _HeadTailLoadBalancer(seq_len, size, "cpu")._generate_indices()[0].long()


# --- on one device ----------------------------------------------------------------------------------------------------


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention by its formula."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)

"""Ring attention (Liu et al. 2023, arXiv:2310.01889): its schedule, as data, and its account by formula.

The sequence is cut into `size` times one (contiguous) or two (zigzag) chunks of equal length. A rank keeps its queries
and, step by step, holds the keys and values of every rank: while it attends to those it holds, they travel on to its
neighbour. The mask is causal, so which chunk pairs there are to compute depends on the order:

    contiguous   rank r owns chunk r. Rank 0 has 1 pair to compute, the last rank `size`: the ring waits for the last.
    zigzag       rank r owns chunks r and 2·size-1-r, one from either end. Every rank has 2·size-1 full pairs and 2
                 diagonal ones (half masked), as many as any other rank at every single step.

Backward walks the same steps: keys and values travel again, and behind them, in float32, the sum of their gradients,
with one more hop that carries it home.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from meshwright.schemes.attention import EFFICIENT_ROWS, AttentionKernel
from meshwright.schemes.tape import FLOAT32, INT64, Sizes, Tape

Order = Literal["contiguous", "zigzag"]

CHUNKS_PER_RANK: dict[Order, int] = {"contiguous": 1, "zigzag": 2}


class Block(NamedTuple):
    """Local query chunks that attend to chunks of the keys that are held: all of them, or causally.

    Chunks are counted in the order in which their rank holds them; ends are past the last chunk. A masked block has
    the same number of chunks on both sides, its mask is the lower triangle.
    """

    first_query: int
    end_query: int
    first_key: int
    end_key: int
    masked: bool


class Step(NamedTuple):
    """One step of one rank. Keys of `source` are held, `blocks` are computed under the hop that this step posts.

    The last step's hop exists in backward only: it carries the gradients of the keys back to their owner.
    """

    source: int
    blocks: tuple[Block, ...]
    send_to: int
    receive_from: int


@dataclass(frozen=True)
class Schedule:
    """What one rank does. Printed, it is the grid of its queries against all keys."""

    rank: int
    size: int
    chunks: tuple[tuple[int, ...], ...]
    """Global chunk numbers, by the rank that owns them, in the order in which it holds them."""
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return grid([self])


def owned_chunks(rank: int, size: int, order: Order) -> tuple[int, ...]:
    """Global numbers of the chunks that a rank holds, rising, as its local sequence has them."""
    return (rank,) if order == "contiguous" else (rank, 2 * size - 1 - rank)


@functools.cache
def schedule(rank: int, size: int, order: Order = "zigzag") -> Schedule:
    """The steps of one rank of a ring: receive from the rank before, send to the rank after."""
    sources = ((rank - step) % size for step in range(size))
    ahead, behind = (rank + 1) % size, (rank - 1) % size
    steps = tuple(Step(source, tuple(_blocks(rank, source, order)), ahead, behind) for source in sources)
    return Schedule(rank, size, tuple(owned_chunks(r, size, order) for r in range(size)), steps)


def _blocks(rank: int, source: int, order: Order) -> Iterable[Block]:
    """What a rank's queries see of the keys of `source`, in as few blocks as there can be."""
    count = CHUNKS_PER_RANK[order]
    if source == rank:
        yield Block(0, count, 0, count, True)  # positions rise within a rank, so one triangle masks all its chunks
    elif order == "contiguous":
        if source < rank:
            yield Block(0, 1, 0, 1, False)
    elif source < rank:
        yield Block(0, 2, 0, 1, False)  # the source's late chunk comes after both of ours
    else:
        yield Block(1, 2, 0, 2, False)  # our early chunk comes before both of the source's


def grid(schedules: Iterable[Schedule]) -> str:
    """Who attends to what at which step: a row for each query chunk of these ranks, a column for each key chunk.

    A number is the step, `\\` marks those that are masked by the triangle, `.` is a pair that the mask forbids.
    """
    plans = list(schedules)
    owner = {chunk: rank for rank, held in enumerate(plans[0].chunks) for chunk in held}
    keys = sorted(owner)
    queries = sorted(chunk for plan in plans for chunk in plan.chunks[plan.rank])
    cells = {
        (query, key): f"{index}\\" if diagonal else f"{index}"
        for plan in plans
        for index, step in enumerate(plan.steps)
        for query, key, diagonal in pairs(plan, step)
    }
    width = len(str(keys[-1])) + 2

    def line(label: str, row: Iterable[object]) -> str:
        return (label + "  " + "".join(f"{cell}".ljust(width) for cell in row)).rstrip()

    return "\n".join(
        [
            line("       keys of rank", (owner[key] for key in keys)),
            line("queries of    chunk", keys),
            *(line(f"rank {owner[q]:<5}chunk {q:<3}", (cells.get((q, key), ".") for key in keys)) for q in queries),
            "number: the step that computes the pair   \\: only its lower triangle   .: forbidden by the mask",
        ]
    )


def pairs(plan: Schedule, step: Step) -> Iterable[tuple[int, int, bool]]:
    """The chunk pairs that a step computes, by global numbers, and whether each lies on the diagonal."""
    ours, theirs = plan.chunks[plan.rank], plan.chunks[step.source]
    for block in step.blocks:
        for i in range(block.first_query, block.end_query):
            for j in range(block.first_key, block.end_key):
                diagonal = block.masked and i - block.first_query == j - block.first_key
                if not block.masked or i - block.first_query >= j - block.first_key:
                    yield ours[i], theirs[j], diagonal


# --- the account ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RingCore:
    """Attention on a ring: `parallel.ring`, step by step. Keeps what attention on one device keeps, for S tokens."""

    sizes: Sizes

    @property
    def plan(self) -> Schedule:
        """This rank's schedule."""
        return schedule(self.sizes.ring_rank, self.sizes.R, self.sizes.ring_order)

    @property
    def whole(self) -> AttentionKernel:
        """Its own queries against its own keys."""
        return AttentionKernel(self.sizes, self.sizes.S, self.sizes.S)

    @property
    def keeps_out(self) -> bool:
        """Whether its own backward reads out."""
        return True

    @property
    def statistics_bytes(self) -> int:
        """What it keeps beside q, k, v and out: the first block's log-sum-exp, merged in place, and random state."""
        return self.whole.lse_bytes + self.whole.random_bytes

    def kernel(self, block: Block) -> AttentionKernel:
        """The kernel call of a block."""
        chunk = self.sizes.S // CHUNKS_PER_RANK[self.sizes.ring_order]
        queries, keys = block.end_query - block.first_query, block.end_key - block.first_key
        return AttentionKernel(self.sizes, queries * chunk, keys * chunk, block.masked)

    def _hop(self, tape: Tape, dtype: str, nbytes: int) -> tuple[int, int]:
        """Post the sending of a pair and the receiving of its like."""
        tickets = []
        for _ in range(2):
            tape.alloc(nbytes, "communication_buffers")
            tickets.append(tape.issue("shift", self.sizes.ring, dtype, nbytes))
        return tickets[0], tickets[1]

    @property
    def dkv_category(self) -> str:
        """Category of dk and dv: what came home, or its cast."""
        return "temporaries" if self.sizes.casts else "communication_buffers"

    def forward(self, tape: Tape, out_category: str, statistics_category: str) -> None:
        """Makes out and the statistics, from q, k and v."""
        kv, last, first = self.whole.kv_bytes, self.sizes.R - 1, True
        sum_category = "temporaries" if self.sizes.casts else out_category
        self._positions(tape)
        for index, step in enumerate(self.plan.steps):
            tickets = self._hop(tape, self.sizes.dtype, kv) if index < last else ()
            self._positions(tape)
            for block in step.blocks:
                if first:
                    self._begin(tape, self.kernel(block), sum_category, statistics_category)
                else:
                    self._merge(tape, self.kernel(block), statistics_category)
                first = False
            tape.free(self._positions_bytes)
            for ticket in tickets:
                tape.wait(ticket)
            if 0 < index < last:
                tape.free(2 * kv, "communication_buffers")
        tape.free(2 * kv, "communication_buffers")
        if self.sizes.casts:
            tape.alloc(self.whole.q_bytes, out_category)
            tape.free(self._exact(self.whole.q_bytes))
        tape.free(self._positions_bytes)

    @property
    def _positions_bytes(self) -> int:
        """Positions of a rank's tokens, of which the mask of documents is made."""
        return self.sizes.S * INT64 if self.sizes.documents else 0

    def _positions(self, tape: Tape) -> None:
        """Makes them, from those of each chunk."""
        with tape.holding(self._positions_bytes):
            tape.alloc(self._positions_bytes)

    def _begin(self, tape: Tape, kernel: AttentionKernel, sum_category: str, statistics_category: str) -> None:
        """The first block covers all queries: it becomes the sum."""
        casts = self.sizes.casts
        kernel.forward(tape, "temporaries" if casts else sum_category, statistics_category)
        if casts:
            tape.alloc(self._exact(kernel.q_bytes), sum_category)
            tape.free(kernel.q_bytes)

    def _merge(self, tape: Tape, kernel: AttentionKernel, statistics_category: str) -> None:
        """Each later block is merged into it; the random state of the last one stays."""
        kernel.forward(tape, "temporaries", "temporaries")
        tape.free(kernel.random_bytes, statistics_category)
        tape.free(kernel.random_bytes)
        tape.alloc(kernel.random_bytes, statistics_category)
        exact = self._exact(kernel.q_bytes)
        if self.sizes.casts:
            tape.alloc(exact)
            tape.free(kernel.q_bytes)
        with tape.holding(kernel.row_bytes):
            tape.elementwise(3 * exact + 5 * kernel.row_bytes)
        tape.free(exact + kernel.lse_bytes)

    def _exact(self, nbytes: int) -> int:
        """The same number of elements in float32."""
        return nbytes // self.sizes.c * FLOAT32

    def backward(self, tape: Tape) -> None:
        """Makes dq, dk, dv."""
        kv, last, casts = self.whole.kv_bytes, self.sizes.R - 1, self.sizes.casts
        sums, travelling = self._exact(kv), (0, 0)
        self._positions(tape)
        for index, step in enumerate(self.plan.steps):
            tickets = self._hop(tape, self.sizes.dtype, kv) if index < last else ()
            self._positions(tape)
            for number, block in enumerate(step.blocks):
                self._attend_backward(tape, self.kernel(block), first=index + number == 0)
            tape.free(self._positions_bytes)
            for ticket in tickets:
                tape.wait(ticket)
            if index:
                tape.free(2 * kv, "communication_buffers")
            for ticket in travelling:
                tape.wait(ticket)
            if index:
                tape.free(2 * sums, "temporaries" if index == 1 else "communication_buffers")
            for block in reversed(step.blocks):
                gradient = self.kernel(block).kv_bytes
                if index == 0 and casts:
                    tape.alloc(2 * sums)
                if index or casts:
                    tape.free(2 * gradient)
                tape.elementwise(6 * self._exact(gradient))
            travelling = self._hop(tape, "float32", sums)
        for ticket in travelling:
            tape.wait(ticket)
        tape.free(2 * sums, "communication_buffers")
        if casts:
            tape.alloc(2 * kv)
            tape.free(2 * sums, "communication_buffers")
            tape.alloc(self.whole.q_bytes)
            tape.free(self._exact(self.whole.q_bytes))
        tape.free(self._positions_bytes)

    def _attend_backward(self, tape: Tape, kernel: AttentionKernel, *, first: bool) -> None:
        """Makes dk and dv of a block, and adds its dq to the sum."""
        whole = kernel.queries == self.sizes.S
        copied = 0
        if kernel.kernel == "sdpa_efficient" and (not whole or kernel.queries % EFFICIENT_ROWS):
            copied = kernel.lse_bytes
        elif kernel.kernel in ("sdpa_flash", "flash") and not whole:
            copied = kernel.row_bytes
        kernel.backward(tape, copied)
        exact = self._exact(kernel.q_bytes)
        if first and self.sizes.casts:
            tape.alloc(exact)
        if not first or self.sizes.casts:
            tape.free(kernel.q_bytes)
        tape.elementwise(3 * exact)

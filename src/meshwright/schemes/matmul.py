"""Collective matmul (Wang et al. 2023, "Overlap communication with dependent computation"): schedules, and the account.

A product next to a collective is cut so that the wire works under it. Ranks of the axis form a ring; a rank's part of
the rows, M of them, is a hop, and each hop is cut into k pieces:

    gather → matmul    every rank's rows travel once around; a rank multiplies what it holds while that goes on
    matmul → scatter   sums travel once around and end at their owner: a rank adds its partial product and sends them on
    matmul → sum       without sequence parallelism: k slices of the rows, each all-reduced under the next one's product

Without cutting, a ring of two could hide half: its own rows are multiplied under the one hop there is, or the one hop
leaves when half is multiplied. With k pieces all but the first or the last of 2k slices of the product has company:

    hidden ≤ 1 - 1/(2k) of the shorter of communication and product; of a ring of T, 1 - 1/(T·k)

A unidirectional ring sends all pieces to the next rank; a bidirectional one sends the second half of them to the rank
before, and so uses both directions of every link. On the wire go the same bytes as unsplit: (T-1)·M rows each.

In forward a column-parallel layer gathers and a row-parallel one scatters. In backward the former scatters its input's
gradient while it gathers the input again for the weight's, the two rings step by step side by side, and the latter
gathers what both of its products need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from meshwright.schemes.tape import Group, Pipeline, Tape


class Hop(NamedTuple):
    """One piece at one step: rows [start, stop) of the part of rank `part` are held, or summed, and then go on.

    In the last step nothing goes on: the neighbours are then those of the step before.
    """

    part: int
    start: int
    stop: int
    send_to: int
    receive_from: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start


Steps = tuple[tuple[Hop, ...], ...]


def slices(rows: int, count: int) -> tuple[tuple[int, int], ...]:
    """[start, stop) of `count` nearly equal parts of so many rows; fewer where there are fewer rows."""
    count = min(rows, count)
    return tuple((i * rows // count, (i + 1) * rows // count) for i in range(count))


@functools.cache
def gather_steps(rank: int, size: int, rows: int, pipeline: Pipeline) -> Steps:
    """What a rank holds, step by step: first its own rows, at last those of the rank that they reach it from last."""
    return _steps(rank, size, rows, pipeline, behind=0)


@functools.cache
def scatter_steps(rank: int, size: int, rows: int, pipeline: Pipeline) -> Steps:
    """For whom a rank adds, step by step: first for the rank that its sums reach last, at last for itself."""
    return _steps(rank, size, rows, pipeline, behind=1)


def _steps(rank: int, size: int, rows: int, pipeline: Pipeline, *, behind: int) -> Steps:
    pieces = [(*piece, direction) for piece, direction in _directed(rows, pipeline)]
    return tuple(
        tuple(
            Hop((rank - way * (step + behind)) % size, start, stop, (rank + way) % size, (rank - way) % size)
            for start, stop, way in pieces
        )
        for step in range(size)
    )


def _directed(rows: int, pipeline: Pipeline) -> Iterator[tuple[tuple[int, int], int]]:
    """The pieces of a hop, and which way each goes."""
    pieces = slices(rows, pipeline.chunks)
    ahead = len(pieces) if pipeline.ring == "unidirectional" else -(-len(pieces) // 2)
    for index, piece in enumerate(pieces):
        yield piece, 1 if index < ahead else -1


def runs(hops: Iterable[Hop]) -> Iterator[Hop]:
    """The hops of a step with neighbouring pieces of the same part as one."""
    joined: Hop | None = None
    for hop in hops:
        if joined is not None and (hop.part, hop.start) == (joined.part, joined.stop):
            joined = joined._replace(stop=hop.stop)
            continue
        if joined is not None:
            yield joined
        joined = hop
    if joined is not None:
        yield joined


class Segment(NamedTuple):
    """Consecutive rows: the first of them in a rank's part, [B, S/T], and in the whole, [B, S], and how many."""

    in_part: int
    in_whole: int
    rows: int


def segments(part: int, start: int, stop: int, length: int, size: int) -> Iterator[Segment]:
    """Where rows [start, stop) of a rank's part, `length` of each sequence, are in the whole: a run a sequence."""
    if size == 1:
        yield Segment(start, start, stop - start)
        return
    for sequence in range(start // length, -(-stop // length)):
        first, end = max(start, sequence * length), min(stop, (sequence + 1) * length)
        yield Segment(first, sequence * length * size + part * length + first - sequence * length, end - first)


# --- the account ------------------------------------------------------------------------------------------------------

Use = Callable[[Hop], None]


@dataclass(frozen=True)
class Wire:
    """What a ring moves: M rows a rank, of so many bytes, over a group."""

    group: Group
    rows: int
    row_bytes: int
    dtype: str
    pipeline: Pipeline

    @property
    def hop_bytes(self) -> int:
        """Bytes of a rank's part."""
        return self.rows * self.row_bytes

    def shift(self, tape: Tape, hop: Hop) -> int:
        """A piece goes on. Returns the ticket of its successor."""
        return tape.issue("shift", self.group, self.dtype, hop.rows * self.row_bytes)


class GatherRing:
    """`parallel.matmul_rings.GatherRing` on a tape: of what travels at most three parts exist at a time."""

    def __init__(self, tape: Tape, wire: Wire) -> None:
        """Puts the own rows on the wire."""
        self._wire, self._steps = wire, gather_steps(0, wire.group.size, wire.rows, wire.pipeline)
        tape.alloc(wire.hop_bytes, "communication_buffers")
        self._tickets = [wire.shift(tape, hop) for hop in self._steps[0]]

    def step(self, tape: Tape, index: int, use: Use, *, whole: bool = False) -> None:
        """The rows of a step have come, go on, and are used: piece by piece, or `whole` once all are there."""
        wire, last = self._wire, index == len(self._steps) - 1
        if index and not last:
            tape.alloc(wire.hop_bytes, "communication_buffers")
        arriving, self._tickets = self._tickets, [] if index else self._tickets
        for number, hop in enumerate(self._steps[index] if index else ()):
            tape.wait(arriving[number])
            if index > 1 and number == len(arriving) - 1:
                tape.free(wire.hop_bytes, "communication_buffers")
            if not last:
                self._tickets.append(wire.shift(tape, hop))
            if not whole:
                use(hop)
        if whole or not index:
            for run in runs(self._steps[index]):
                use(run)
        if last:
            tape.free(wire.hop_bytes, "communication_buffers")


class ScatterRing:
    """`parallel.matmul_rings.ScatterRing` on a tape. Its result is a communication buffer."""

    def __init__(self, wire: Wire) -> None:
        self._wire, self._steps = wire, scatter_steps(0, wire.group.size, wire.rows, wire.pipeline)
        self._tickets: list[int] = []

    def step(self, tape: Tape, index: int, product: Use) -> None:
        """The partial products of a step, added; where the sums go on, piece by piece."""
        if 0 < index < len(self._steps) - 1:
            tape.alloc(self._wire.hop_bytes)
            self.combine(tape, index, product)
        else:
            self.compute(tape, index, product)
            self.combine(tape, index)

    def compute(self, tape: Tape, index: int, product: Use) -> None:
        """The partial products of a step; those of the first leave as soon as they are made."""
        wire = self._wire
        tape.alloc(wire.hop_bytes)
        if index:
            for run in runs(self._steps[index]):
                product(run)
            return
        tape.alloc(wire.hop_bytes, "communication_buffers")
        for hop in self._steps[0]:
            product(hop)
            self._tickets.append(wire.shift(tape, hop))

    def combine(self, tape: Tape, index: int, product: Use | None = None) -> None:
        """Add them, made at last by `product` if it is given, to the sums that have come, which go on."""
        if not index:
            return
        wire, last = self._wire, index == len(self._steps) - 1
        if not last:
            tape.alloc(wire.hop_bytes, "communication_buffers")
        arriving, self._tickets = self._tickets, []
        for number, hop in enumerate(self._steps[index]):
            if product is not None:
                product(hop)
            tape.wait(arriving[number])
            if number == len(arriving) - 1:
                tape.free(wire.hop_bytes, "temporaries" if index == 1 else "communication_buffers")
            tape.elementwise(3 * hop.rows * wire.row_bytes)
            if not last:
                self._tickets.append(wire.shift(tape, hop))
        tape.free(wire.hop_bytes)

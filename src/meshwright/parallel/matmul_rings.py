"""Collective matmul, executed: two rings under which something is computed (`schemes.matmul`).

    T ranks of the axis   M rows of a rank's part   E features   B batch   S sequence, of which a part has S/T

`GatherRing` brings every rank's rows past all ranks, `ScatterRing` collects sums of all ranks for every rank's rows.
Both walk the schedules of the scheme's page with `Axis.shift`; what is computed on rows that came, or for rows that
leave, is given as a function. They work on any backend that sends messages while it computes: gloo does on threads of
its own, NCCL on a stream.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from meshwright.comm.collectives import Axis, Pending
from meshwright.schemes.matmul import Hop, gather_steps, runs, scatter_steps, segments
from meshwright.schemes.tape import Pipeline

Use = Callable[[torch.Tensor, int, int], None]
"""(rows, part, start): rows of the part of a rank, from its row `start` on, to be read or to be filled."""


class GatherRing:
    """Each rank's part [M, E] travels once around the ring; it is used while its pieces go on."""

    def __init__(self, part_ME: torch.Tensor, axis: Axis, pipeline: Pipeline, site: str) -> None:
        """Puts the own part, which is contiguous, on the wire."""
        self._axis, self._site = axis, site
        self._steps = gather_steps(axis.rank, axis.size, len(part_ME), pipeline)
        self._held: torch.Tensor | None = part_ME
        self._arriving: torch.Tensor | None = torch.empty_like(part_ME)
        self._pending = [self._shift(hop, part_ME, self._arriving) for hop in self._steps[0]]

    def step(self, index: int, use: Use, *, whole: bool = False) -> None:
        """Use what a step holds: piece by piece as it comes, or `whole` once all of it is there."""
        last = index == len(self._steps) - 1
        if index:
            self._held, self._arriving = self._arriving, None
        held = self._held
        assert held is not None
        if index:
            following = None if last else torch.empty_like(held)
            arrived, self._pending = self._pending, []
            for pending, hop in zip(arrived, self._steps[index], strict=True):
                pending.wait()
                if following is not None:
                    self._pending.append(self._shift(hop, held, following))
                if not whole:
                    use(held[hop.start : hop.stop], hop.part, hop.start)
            self._arriving = following
        if whole or not index:
            for run in runs(self._steps[index]):
                use(held[run.start : run.stop], run.part, run.start)
        if last:
            self._held = None

    def _shift(self, hop: Hop, held: torch.Tensor, into: torch.Tensor) -> Pending:
        return _shift(self._axis, hop, held, into, self._site)


class ScatterRing:
    """Partial sums of every rank's part [M, E] travel once around the ring and end at their owner."""

    def __init__(self, like: torch.Tensor, rows: int, features: int, axis: Axis, pipeline: Pipeline, site: str) -> None:
        """`rows` × `features` is a part; `like` has its dtype and device."""
        self._axis, self._site = axis, site
        self._steps = scatter_steps(axis.rank, axis.size, rows, pipeline)
        self._empty = lambda: like.new_empty(rows, features)
        self._own: torch.Tensor | None = None
        self._arriving: torch.Tensor | None = None
        self._pending: list[Pending] = []

    def step(self, index: int, product: Use) -> None:
        """Make the partial products of a step and add them; where the sums go on, piece by piece."""
        if 0 < index < len(self._steps) - 1:
            self._own = self._empty()
            self.combine(index, product)
        else:
            self.compute(index, product)
            self.combine(index)

    def compute(self, index: int, product: Use) -> None:
        """Make the partial products of a step: `product` fills the rows that it is given."""
        own = self._empty()
        if index:
            for run in runs(self._steps[index]):
                product(own[run.start : run.stop], run.part, run.start)
            self._own = own
            return
        if len(self._steps) == 1:  # nobody else has a share
            product(own, self._axis.rank, 0)
            self._arriving = own
            return
        self._arriving = self._empty()
        for hop in self._steps[0]:
            product(own[hop.start : hop.stop], hop.part, hop.start)
            self._pending.append(_shift(self._axis, hop, own, self._arriving, self._site))

    def combine(self, index: int, product: Use | None = None) -> None:
        """Add them, made at last by `product` if it is given, to the sums that have come, and let those go on."""
        if not index:
            return
        last = index == len(self._steps) - 1
        own, arrived, self._own = self._own, self._arriving, None
        assert own is not None and arrived is not None
        following = None if last else self._empty()
        waiting, self._pending = self._pending, []
        for pending, hop in zip(waiting, self._steps[index], strict=True):
            if product is not None:
                product(own[hop.start : hop.stop], hop.part, hop.start)
            pending.wait()
            arrived[hop.start : hop.stop].add_(own[hop.start : hop.stop])
            if following is not None:
                self._pending.append(_shift(self._axis, hop, arrived, following, self._site))
        self._arriving = arrived if last else following

    def result(self) -> torch.Tensor:
        """The sums of the own part, after the last step."""
        assert self._arriving is not None and not self._pending
        return self._arriving


def _shift(axis: Axis, hop: Hop, held: torch.Tensor, into: torch.Tensor, site: str) -> Pending:
    rows = slice(hop.start, hop.stop)
    return axis.shift(held[rows], into=into[rows], send_to=hop.send_to, receive_from=hop.receive_from, site=site)


class Rows:
    """Rows of a rank's part, [B, S/T] flattened, in tensors of the whole, [B, S] flattened."""

    def __init__(self, length: int, size: int) -> None:
        """`length` of each sequence are in a part."""
        self._length, self._size = length, size

    def of(self, rows: torch.Tensor, part: int, start: int) -> list[tuple[torch.Tensor, slice]]:
        """The rows of each sequence, and where they are in the whole."""
        found = segments(part, start, start + len(rows), self._length, self._size)
        return [
            (rows[s.in_part - start : s.in_part - start + s.rows], slice(s.in_whole, s.in_whole + s.rows))
            for s in found
        ]


class WeightGradient:
    """Σ dy.T @ x over rows that come one after the other, put into a tensor in its dtype, that of the weight."""

    def __init__(self, total: torch.Tensor) -> None:
        self._total, self._is_first = total, True

    def add(self, dy: torch.Tensor, x: torch.Tensor) -> None:
        """The product of some rows."""
        if self._total.dtype != x.dtype:
            product = torch.mm(dy.T, x)
            self._total.copy_(product) if self._is_first else self._total.add_(product)
        elif self._is_first:
            torch.mm(dy.T, x, out=self._total)
        else:
            self._total.addmm_(dy.T, x)
        self._is_first = False

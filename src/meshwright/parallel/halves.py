"""Half-batches, executed: the waits of a tensor-parallel region apart from its products (`schemes.halves`).

    x_BSE   [B/2, S, E] of a half, [B/2, S/T, E] if the region is split
    y_BSE   likewise

    begin     forward x, put on the wire           backward the sum of dx is waited for
    column    forward waits for x, multiplies      backward multiplies, puts dx on the wire
    row       forward multiplies, puts y on it     backward waits for dy, multiplies
    finish    forward waits for y, adds the bias   backward dy, put on the wire

Each is an autograd function. autograd runs functions in the reverse of the order in which forward has run them, so the
stages of both halves are interleaved in backward as they are in forward. Between the two functions of a wait autograd
carries a tensor whose elements may not be there yet: nobody but the other function may look at it.

A weight is used once by each half. Its gradient is handed to autograd once, by the half whose backward comes last: that
of the other is kept until then, and added to in place.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from meshwright.comm.collectives import Pending
from meshwright.comm.scope import scope
from meshwright.parallel.sequence import Region
from meshwright.parallel.tensor import Linear
from meshwright.schemes.halves import SCHEDULE

Stages = Generator[None, None, torch.Tensor]
"""What a module does in its stages enter, compute, leave and add, of which the last returns its output."""


class Half:
    """A half-batch on its way through a module, called `site` in the account: it has entered."""

    def __init__(self, stages: Stages, site: str) -> None:
        self._stages, self._site = stages, site
        self.go_on()

    def go_on(self) -> None:
        """The next stage."""
        with scope(self._site):
            next(self._stages)

    def finish(self) -> torch.Tensor:
        """The last one: the module's output."""
        try:
            self.go_on()
        except StopIteration as stop:
            return stop.value
        raise AssertionError("a stage was left out")


class Shares:
    """Gradients of parameters that several calls have a share of: the last is given their sums."""

    def __init__(self, count: int) -> None:
        self._missing = count
        self._sums: Sequence[torch.Tensor | None] | None = None

    def add(self, gradients: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """The sums, or nothing yet."""
        self._missing -= 1
        if self._sums is not None:
            for total, gradient in zip(self._sums, gradients, strict=True):
                if total is not None and gradient is not None:
                    total.add_(gradient)
        sums = gradients if self._sums is None else self._sums
        self._sums = sums if self._missing else None
        return [None] * len(gradients) if self._missing else sums


@dataclass
class ModuleShares:
    """The shares of so many halves in the gradients of a module's column-parallel layers, of its row, and its bias."""

    count: int
    column: Shares = field(init=False)
    row: Shares = field(init=False)
    bias: Shares = field(init=False)

    def __post_init__(self) -> None:
        self.column, self.row, self.bias = (Shares(self.count) for _ in range(3))


@dataclass(frozen=True)
class Crossing(Region):
    """One half's way through a region: what its two ends have put on the wire for another function to wait for.

    What is put there is an alias: autograd's references to the tensor itself are not the wire's.
    """

    shares: ModuleShares = field(default_factory=lambda: ModuleShares(1))
    _entering: list[Pending] = field(default_factory=list)
    _leaving: list[Pending] = field(default_factory=list)

    @classmethod
    def of(cls, region: Region, shares: ModuleShares) -> Crossing:
        """A new one, through a region that is not pipelined."""
        assert region.pipeline is None
        return cls(region.axis, region.split, shares=shares)

    def begin(self, x: torch.Tensor, site: str) -> None:
        """Let x enter: the next `enter` is given what comes of it."""
        self._entering.append(super().enter(x.detach(), site))

    def enter(self, x: torch.Tensor, site: str) -> Pending:
        """What was begun, else the region's."""
        return self._entering.pop() if self._entering else super().enter(x, site)

    def leave(self, y: torch.Tensor, site: str) -> Pending:
        """Let y leave: its tensor at once, its elements after `finish`."""
        self._leaving.append(super().leave(y.detach(), site))
        return Pending(self._leaving[-1].tensor.detach())

    def finish(self) -> torch.Tensor:
        """Wait for what has left."""
        return self._leaving.pop().wait()


def begin(x_BSE: torch.Tensor, crossing: Crossing, site: str) -> torch.Tensor:
    """x itself, on its way into the region."""
    return _Begin.apply(x_BSE, crossing, site)


def column_linear(
    x_BSE: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    crossing: Crossing,
    site: str,
) -> tuple[torch.Tensor, ...]:
    """`parallel.tensor.column_linear` of an x that `begin` has sent."""
    return _HalfLinear.apply(x_BSE, crossing, None, site, len(weights), *weights, *biases)


def row_linear(x_BSF: torch.Tensor, weight: torch.Tensor, crossing: Crossing, site: str) -> torch.Tensor:
    """`parallel.tensor.row_linear` whose output is there after `finish`, which adds the bias."""
    (y_BSE,) = _HalfLinear.apply(x_BSF, None, crossing, site, 1, weight, None)
    return y_BSE


def finish(y_BSE: torch.Tensor, bias: torch.Tensor | None, crossing: Crossing, site: str) -> torch.Tensor:
    """y itself, once it has left the region."""
    return _Finish.apply(y_BSE, bias, crossing, site)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, crossing: Crossing, site: str) -> torch.Tensor:
        ctx.crossing, ctx.site = crossing, site
        crossing.begin(x, site)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> Any:
        with scope(ctx.site, "backward"):
            return ctx.crossing.finish(), None, None


class _HalfLinear(Linear):
    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> Any:
        dx, *others = Linear.backward(ctx, *dys)
        shares = ctx.left.shares.row if ctx.entered is None else ctx.entered.shares.column
        options, gradients = others[:4], others[4:]
        with scope(ctx.site, "backward"):
            return dx, *options, *shares.add(gradients)


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, bias: torch.Tensor | None, crossing: Crossing, site: str) -> torch.Tensor:
        ctx.crossing, ctx.site, ctx.dtype = crossing, site, None if bias is None else bias.dtype
        ctx.mark_dirty(y)
        crossing.finish()
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        with scope(ctx.site, "backward"):
            db = None
            if ctx.dtype is not None:
                (db,) = ctx.crossing.shares.bias.add([dy.sum(dim=(0, 1), dtype=ctx.dtype)])
            ctx.crossing.begin(dy, ctx.site)
            return dy, db, None, None


Enter = Callable[[torch.Tensor, int, int], tuple[Half, torch.Tensor]]
"""(stream, half, branch): the half in the branch of a block, and the stream for the residual path."""


def interleaved(
    x_BSE: torch.Tensor, num_halves: int, enter: Enter, leave: Callable[[Half, int], torch.Tensor]
) -> torch.Tensor:
    """A block's next residual stream: both halves through both branches, by the schedule. `leave` is the last stage.

    A batch of one sequence is one half.
    """
    streams, halves = list(x_BSE.chunk(num_halves)), dict[int, Half]()
    del x_BSE
    for half, branch, name in SCHEDULE:
        if half >= num_halves:
            continue
        if name == "enter":
            halves[half], streams[half] = enter(streams[half], half, branch)
        elif name == "add":
            streams[half] = streams[half] + leave(halves.pop(half), branch)
        else:
            halves[half].go_on()
    return torch.cat(streams)

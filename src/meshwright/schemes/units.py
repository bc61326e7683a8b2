"""What a model calls at the borders of its units, so that a scheme can gather, wait or send there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from meshwright.schemes.tape import Tape


class Run(NamedTuple):
    """Consecutive layers that do the same, in the order in which they run."""

    first: int
    times: int
    is_first: bool = False
    """Whether it is the first layer of this direction."""
    puts_ahead: bool = False
    """Whether it puts the layer `prefetch` further on the wire."""


class Units:
    """Nothing is gathered: all parameters are there."""

    def forward_runs(self, layers: int) -> Iterator[Run]:
        """The layers in order."""
        yield Run(0, layers, is_first=True)

    def backward_runs(self, layers: int) -> Iterator[Run]:
        """The layers from the last to the first, which is a run of its own."""
        if layers > 1:
            yield Run(layers - 1, layers - 1, is_first=True)
        yield Run(0, 1, is_first=layers == 1)

    def forward_layers(self, tape: Tape, layers: int, write: Callable[[Run], None]) -> None:
        """All layers; `write` writes one of a run, in whose sites `*` is the layer."""
        for run in self.forward_runs(layers):
            with tape.repeat(run.times, first=run.first):
                write(run)

    def backward_layers(self, tape: Tape, layers: int, write: Callable[[Run], None]) -> None:
        """All layers, the last one first."""
        for run in self.backward_runs(layers):
            with tape.repeat(run.times, first=run.first, step=-1):
                write(run)

    def enter_model(self, tape: Tape) -> None:
        """Before the root's forward."""

    def enter_module(self, tape: Tape, name: str) -> None:
        """Before the forward of a module outside of the layers."""

    def leave_model(self, tape: Tape) -> None:
        """After the root's forward."""

    def enter_layer(self, tape: Tape, run: Run) -> None:
        """Before a layer's forward; the site's `*` is the layer."""

    def leave_layer(self, tape: Tape) -> None:
        """After it."""

    def reenter_model(self, tape: Tape) -> None:
        """Before the root's backward."""

    def reenter_layer(self, tape: Tape, run: Run) -> None:
        """Before a layer's backward."""

    def reduce_layer(self, tape: Tape, run: Run) -> None:
        """After it."""

    def reduce_model(self, tape: Tape) -> None:
        """After the last backward."""

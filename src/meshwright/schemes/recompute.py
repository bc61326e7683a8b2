"""Recomputation (Chen et al. 2016; Korthikanti et al. 2022, section 5), by formula: what backward computes again.

    none        every function keeps what its backward needs.
    selective   attention keeps q, k and v only, and its core runs again in backward: without a fused kernel, softmax
                and dropout of the scores are most of what a layer keeps, and few of its FLOPs. A fused kernel keeps no
                scores: then this saves the log-sum-exp, 4 bytes a head and token (and, where ulysses exchanges, the
                output inside), for as many FLOPs. `schemes.context` writes it.
    full        a block keeps its input only, M·E elements: forward runs again, collectives included, before the block's
                backward. One block's activations exist at a time, at the price of a second forward.

Whatever runs again is in phase `recompute`: work that the model itself does not need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from meshwright.schemes.tape import KEPT_OUTSIDE, Tape


class BlockLike(Protocol):
    """What recomputation wraps: `schemes.decoder.Block`."""

    @property
    def stream_bytes(self) -> int:
        """Bytes of its input, and of its output."""

    def forward(self, tape: Tape, site: str, *, out_category: str) -> None:
        """Makes the output."""

    def backward(self, tape: Tape, site: str, *, holds_gradient: bool) -> None:
        """Turns the gradient of the output into that of the input; `holds_gradient`: somebody else frees the former."""


@dataclass(frozen=True)
class RerunBlock:
    """A block of which only the input is kept."""

    block: BlockLike

    def forward(self, tape: Tape, site: str) -> None:
        """Makes the next residual stream; keeps the present one."""
        with tape.keeping_nothing():
            self.block.forward(tape, site, out_category=KEPT_OUTSIDE)

    def backward(self, tape: Tape, site: str, *, rotary_bytes: int = 0) -> None:
        """The engine holds the incoming gradient, and the tables, until all is done."""
        nbytes = self.block.stream_bytes
        with tape.at(phase="recompute"):
            self.block.forward(tape, site, out_category="temporaries")
        tape.free(nbytes)  # its output: the graph needs no values of it
        self.block.backward(tape, site, holds_gradient=True)
        tape.free(nbytes)
        tape.release(rotary_bytes)

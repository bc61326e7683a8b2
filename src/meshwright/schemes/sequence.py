"""Megatron sequence parallelism (Korthikanti et al. 2022, section 4.2), by formula: the ends of a region.

Tensor parallelism leaves norms, residuals and their activations whole on every rank. Sequence parallelism divides them
along the sequence over the same axis: where a tensor-parallel region was entered for nothing and left by an all-reduce,
it is entered by an all-gather and left by a reduce-scatter; in backward the other way round.

    a block, b·s·h elements a call     forward               backward              on the wire, of t ranks
    tensor parallelism                 2 all-reduces         2 all-reduces          8 (t-1)/t · b·s·h
    sequence parallelism, ours         2 gathers, 2 scatters 4 gathers, 2 scatters 10 (t-1)/t · b·s·h
    the same, keeping the gathered     2 gathers, 2 scatters 2 gathers, 2 scatters  8 (t-1)/t · b·s·h

The last keeps 2 (t-1)/t · b·s·h elements more. We keep only the shard of a column-parallel layer's input, so backward
gathers it again for the weight gradient, under the product that makes the input's gradient; the gradient that reaches a
row-parallel layer is gathered once for its two products. Gradients of norms, row biases and learned positions are
partial per rank: they are summed once a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.schemes.tape import Sizes, Tape


@dataclass(frozen=True)
class Region:
    """What is sent where a tensor [N, E] enters a region from [M, E] outside, and where it leaves."""

    sizes: Sizes

    @property
    def whole_bytes(self) -> int:
        """Bytes of the tensor inside."""
        return self.sizes.N * self.sizes.E * self.sizes.c

    @property
    def outside_bytes(self) -> int:
        """Bytes of it outside."""
        return self.sizes.M * self.sizes.E * self.sizes.c

    @property
    def copies(self) -> bool:
        """Whether the wire's order, ranks outermost, differs from the tensor's."""
        return self.sizes.split and self.sizes.B > 1

    # --- entering: nothing, or an all-gather ---

    def enter(self, tape: Tape) -> int:
        """Put the gather on the wire. Returns its ticket."""
        if not self.sizes.split:
            return 0
        tape.alloc(self.whole_bytes, "communication_buffers")
        return tape.issue("all_gather", self.sizes.tensor, self.sizes.dtype, self.whole_bytes)

    def entered(self, tape: Tape, ticket: int) -> None:
        """Wait for it: what was gathered lives until `close`."""
        tape.wait(ticket)
        if self.copies:
            tape.alloc(self.whole_bytes)
            tape.free(self.whole_bytes, "communication_buffers")
            tape.elementwise(2 * self.whole_bytes)

    def close(self, tape: Tape) -> None:
        """Free what was gathered."""
        if self.sizes.split:
            tape.free(self.whole_bytes, "temporaries" if self.copies else "communication_buffers")

    # --- leaving: an all-reduce in place, or a reduce-scatter ---

    def make(self, tape: Tape, category: str | None = None) -> None:
        """The tensor that will leave appears; `category` is that of what holds the result later."""
        tape.alloc(self.whole_bytes, "temporaries" if self.sizes.split else category or self.sizes.wire_category)

    def leave(self, tape: Tape, category: str | None = None) -> int:
        """Put the sum on the wire. Returns its ticket."""
        s = self.sizes
        if not s.split:
            return tape.all_reduce(s.tensor, s.dtype, self.whole_bytes)
        if self.copies:
            tape.alloc(self.whole_bytes)
            tape.elementwise(2 * self.whole_bytes)
        tape.alloc(self.outside_bytes, category or s.wire_category)
        return tape.issue("reduce_scatter", s.tensor, s.dtype, self.whole_bytes)

    def left(self, tape: Tape, ticket: int) -> None:
        """Wait for it; of a scatter, what was sent is freed."""
        tape.wait(ticket)
        if self.sizes.split:
            tape.free(self.whole_bytes)

    def let_go(self, tape: Tape) -> None:
        """The program lets go of what leaves: freed, if a copy of it is on the wire."""
        if self.copies:
            tape.free(self.whole_bytes)

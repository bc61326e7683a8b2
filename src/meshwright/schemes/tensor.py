"""Megatron tensor parallelism (Shoeybi et al. 2019, section 3), by formula.

A block splits query, key, value, gate and up by columns and output and down by rows, so that attention heads and hidden
features stay on their rank. Per block and micro-batch of N tokens, over a tensor axis of T ranks:

    forward    2 all-reduces of N·E   (after output, after down)
    backward   2 all-reduces of N·E   (gradient of the input of query/key/value, of gate/up)

The embedding adds one N·E forward, the head one N·E backward, and the loss 3·N in float32. The wire carries
2(T-1)/T of each. Weights, their gradients and optimiser states are divided by T, as are the saved activations between a
column- and a row-parallel layer; the residual stream and the norms' inputs are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from meshwright.schemes.tape import BOOL, FLOAT32, FLOAT64, INT64, Sizes, Tape


@dataclass(frozen=True)
class ColumnLinear:
    """Column-parallel layers on one input [N, E]: y_i = x @ w_i.T, w_i [F_i, E] on this rank. Keeps x."""

    sizes: Sizes
    features: tuple[int, ...]
    biased: bool

    def forward(self, tape: Tape, categories: Sequence[str]) -> None:
        """Makes each y_i, in the category of what holds it later."""
        s = self.sizes
        for F, category in zip(self.features, categories, strict=True):
            with cast_weight(tape, s, F * s.E):
                tape.alloc(s.N * F * s.c, category)
                tape.matmul(s.N, s.E, F, s.c)

    def backward(self, tape: Tape, *, dy_category: str = "temporaries") -> None:
        """Frees the dy_i, releases x, makes dx (category `Sizes.wire_category`)."""
        s = self.sizes
        for i, F in enumerate(self.features):
            with cast_weight(tape, s, F * s.E):
                if i == 0:
                    tape.alloc(s.N * s.E * s.c, s.wire_category)
                tape.matmul(s.N, F, s.E, s.c)
        ticket = tape.all_reduce(s.tensor, s.dtype, s.N * s.E * s.c)
        for F in self.features:
            weight_gradient(tape, s, F, s.E)
        if self.biased:
            tape.alloc(sum(self.features) * FLOAT32)
        tape.wait(ticket)
        tape.free(s.N * sum(self.features) * s.c, dy_category)
        tape.release(s.N * s.E * s.c)
        tape.free(sum(self.features) * (s.E + self.biased) * FLOAT32)


@dataclass(frozen=True)
class RowLinear:
    """Row-parallel layer: y = all_reduce(x @ w.T) + b, x [N, F] and w [E, F] on this rank. Keeps x."""

    sizes: Sizes
    F: int
    biased: bool

    def forward(self, tape: Tape) -> None:
        """Makes y (category `Sizes.wire_category`)."""
        s = self.sizes
        with cast_weight(tape, s, s.E * self.F):
            tape.alloc(s.N * s.E * s.c, s.wire_category)
            tape.matmul(s.N, self.F, s.E, s.c)
        tape.wait(tape.all_reduce(s.tensor, s.dtype, s.N * s.E * s.c))

    def backward(self, tape: Tape, *, release_input: bool) -> None:
        """Makes dx. dy is the gradient of the residual stream and lives on; x may be held by others too."""
        s = self.sizes
        with cast_weight(tape, s, s.E * self.F):
            tape.alloc(s.N * self.F * s.c)
            tape.matmul(s.N, s.E, self.F, s.c)
        weight_gradient(tape, s, s.E, self.F)
        if self.biased:
            tape.alloc(s.E * FLOAT32)
        if release_input:
            tape.release(s.N * self.F * s.c)
        tape.free(s.E * (self.F + self.biased) * FLOAT32)


def cast_weight(tape: Tape, sizes: Sizes, numel: int) -> AbstractContextManager[None]:
    """A weight in the compute dtype, for the length of one product."""
    nbytes = numel * sizes.c if sizes.casts else 0
    tape.elementwise(nbytes + numel * FLOAT32 * sizes.casts)
    return tape.holding(nbytes, "cast_weights")


def weight_gradient(tape: Tape, sizes: Sizes, out: int, into: int) -> None:
    """dy.T @ x, cast to float32; freed by the caller once it is accumulated."""
    if sizes.casts:
        with tape.holding(out * into * sizes.c):
            tape.matmul(out, sizes.N, into, sizes.c)
            tape.alloc(out * into * FLOAT32)
    else:
        tape.matmul(out, sizes.N, into, sizes.c)
        tape.alloc(out * into * FLOAT32)
    tape.elementwise(3 * out * into * FLOAT32)


@dataclass(frozen=True)
class Embedding:
    """Rows of the table split over the axis. Keeps row numbers: the tokens themselves at T = 1."""

    sizes: Sizes

    @property
    def saved_bytes(self) -> int:
        """Row numbers and, of each, whether another rank has the row."""
        return self.sizes.N * (INT64 + BOOL) if self.sizes.T > 1 else 0

    def forward(self, tape: Tape, category: str) -> None:
        """Makes x [N, E]."""
        s = self.sizes
        if s.T > 1:
            tape.save(self.saved_bytes)
            with tape.holding(s.N * BOOL):
                pass
        if s.casts:
            with tape.holding(s.N * s.E * FLOAT32):
                tape.alloc(s.N * s.E * s.c, category)
        else:
            tape.alloc(s.N * s.E * s.c, category)
        tape.elementwise(s.N * s.E * (s.c + 2 * FLOAT32))
        tape.wait(tape.all_reduce(s.tensor, s.dtype, s.N * s.E * s.c))

    def backward(self, tape: Tape) -> None:
        """Frees dx; makes the gradient of the table, freed once accumulated."""
        s = self.sizes
        full, table = s.N * s.E * FLOAT32, s.V * s.E * FLOAT32
        if s.casts:
            tape.alloc(full)
        if s.T > 1:
            tape.alloc(full)
            if s.casts:
                tape.free(full)
        with tape.holding(table):
            tape.elementwise(2 * full + 3 * table)
            if s.T > 1 or s.casts:
                tape.free(full)
            tape.free(s.N * s.E * s.c)
            tape.release(self.saved_bytes)


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of logits [N, V] split by vocabulary. Keeps logits and log-sum-exp; sends 3·N float32 forward."""

    sizes: Sizes

    def forward(self, tape: Tape) -> None:
        """Makes the loss, a float64 scalar."""
        s = self.sizes
        row = s.N * FLOAT32
        if s.casts:
            with tape.holding(s.N * s.c, "logits"):
                tape.alloc(row, "logits")
        else:
            tape.alloc(row, "logits")
        tape.elementwise(s.N * s.V * s.c)
        tape.wait(tape.all_reduce(s.tensor, "float32", row))
        with tape.holding(2 * row, "logits"):
            with tape.holding(s.N * s.V * FLOAT32, "logits"):
                tape.elementwise(s.N * s.V * (s.c + 4 * FLOAT32))
            with tape.holding(s.N * (INT64 + 2 * BOOL), "logits"):
                tape.wait(tape.all_reduce(s.tensor, "float32", 2 * row))
                with tape.holding(row + s.N * BOOL, "logits"):
                    tape.alloc(FLOAT64, "logits")

    def backward(self, tape: Tape) -> None:
        """Releases the logits; makes their gradient."""
        s = self.sizes
        full, row = s.N * s.V * FLOAT32, s.N * FLOAT32
        tape.alloc(full, "logits")
        tape.alloc(s.N * (INT64 + BOOL), "logits")
        with tape.holding(max(row, s.N * BOOL), "logits"):
            pass
        with tape.holding(s.N * BOOL + FLOAT32, "logits"):
            tape.alloc(row, "logits")
        tape.elementwise(s.N * s.V * (s.c + 5 * FLOAT32))
        if s.casts:
            tape.alloc(s.N * s.V * s.c, "logits")
            tape.free(full, "logits")
        tape.free(row + s.N * (INT64 + BOOL), "logits")
        tape.free(s.N * s.V * s.c, "logits")
        tape.free(row, "logits")

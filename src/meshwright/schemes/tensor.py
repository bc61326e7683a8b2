"""Megatron tensor parallelism (Shoeybi et al. 2019, section 3), by formula.

A block splits query, key, value, gate and up by columns and output and down by rows, so that attention heads and hidden
features stay on their rank. Per block and micro-batch of N tokens, over a tensor axis of T ranks:

    forward    2 all-reduces of N·E   (after output, after down)
    backward   2 all-reduces of N·E   (gradient of the input of query/key/value, of gate/up)

The embedding adds one N·E forward, the head one N·E backward, and the loss 3·N in float32. The wire carries
2(T-1)/T of each. Weights, their gradients and optimiser states are divided by T, as are the saved activations between a
column- and a row-parallel layer; the residual stream and the norms' inputs are whole on every rank, unless sequence
parallelism splits them: then `schemes.sequence` says what is sent instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from meshwright.schemes.matmul import GatherRing, Hop, ScatterRing, Use, Wire, slices
from meshwright.schemes.sequence import Region
from meshwright.schemes.tape import BOOL, FLOAT32, INT64, Sizes, Tape


@dataclass(frozen=True)
class ColumnLinear:
    """Column-parallel layers on one input [N, E]: y_i = x @ w_i.T, w_i [F_i, E] on this rank. Keeps x as it came."""

    sizes: Sizes
    features: tuple[int, ...]
    biased: bool

    def forward(self, tape: Tape, categories: Sequence[str]) -> None:
        """Makes each y_i, in the category of what holds it later."""
        if self.sizes.pipeline is not None:
            self._forward_pipelined(tape, categories)
            return
        region = Region(self.sizes)
        region.entered(tape, region.enter(tape))
        self.multiply(tape, categories)

    def multiply(self, tape: Tape, categories: Sequence[str]) -> None:
        """The products alone, of an x that has entered the region."""
        s = self.sizes
        for F, category in zip(self.features, categories, strict=True):
            with cast_weight(tape, s, F * s.E):
                tape.alloc(s.N * F * s.c, category)
                tape.matmul(s.N, s.E, F, s.c)
        Region(s).close(tape)

    def backward(self, tape: Tape, *, dy_categories: Sequence[str] = ()) -> None:
        """Frees the dy_i (temporaries unless said otherwise), releases x, makes dx (category `Sizes.wire_category`)."""
        s = self.sizes
        if s.pipeline is None:
            Region(s).left(tape, self.send_gradient(tape, dy_categories))
        else:
            if self.biased:
                tape.alloc(sum(self.features) * s.p)
            self._backward_split(tape) if s.split else self._backward_whole(tape)
            self._let_go(tape, dy_categories)
        tape.accumulate(self.gradient_bytes)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of its parameters."""
        return sum(self.features) * (self.sizes.E + self.biased) * self.sizes.p

    def send_gradient(self, tape: Tape, dy_categories: Sequence[str] = ()) -> int:
        """Backward, but for the wait for dx, whose ticket is returned, and for who takes the parameters' gradients."""
        s, region = self.sizes, Region(self.sizes)
        if self.biased:
            tape.alloc(sum(self.features) * s.p)
        entering = region.enter(tape)
        for i, F in enumerate(self.features):
            with cast_weight(tape, s, F * s.E):
                if i == 0:
                    region.make(tape)
                tape.matmul(s.N, F, s.E, s.c)
        leaving = region.leave(tape)
        region.let_go(tape)
        region.entered(tape, entering)
        for F in self.features:
            weight_gradient(tape, s, F, s.E)
        region.close(tape)
        self._let_go(tape, dy_categories)
        return leaving

    def _let_go(self, tape: Tape, dy_categories: Sequence[str]) -> None:
        s = self.sizes
        for i, F in enumerate(self.features):
            tape.free(s.N * F * s.c, dy_categories[i] if dy_categories else "temporaries")
        tape.release(s.M * s.E * s.c)

    def _forward_pipelined(self, tape: Tape, categories: Sequence[str]) -> None:
        s = self.sizes
        with cast_weight(tape, s, sum(self.features) * s.E):
            for F, category in zip(self.features, categories, strict=True):
                tape.alloc(s.N * F * s.c, category)
            if s.split:
                ring = GatherRing(tape, wire_of(s))
                for index in range(s.T):
                    ring.step(tape, index, lambda hop: self._products(tape, hop.rows))
            else:
                self._products(tape, s.N)

    def _products(self, tape: Tape, rows: int) -> None:
        """Of so many rows with all weights, or of their gradients."""
        for F in self.features:
            tape.matmul(rows, self.sizes.E, F, self.sizes.c)

    def _backward_split(self, tape: Tape) -> None:
        s = self.sizes
        gather, scatter = GatherRing(tape, wire_of(s)), ScatterRing(wire_of(s))
        with cast_weight(tape, s, sum(self.features) * s.E):
            tape.alloc(sum(self.features) * s.E * s.p)
            for index in range(s.T):
                scatter.compute(tape, index, lambda hop: self._products(tape, hop.rows))
                gather.step(tape, index, self._add_to_weights(tape), whole=True)
                scatter.combine(tape, index)

    def _add_to_weights(self, tape: Tape) -> Use:
        def add(hop: Hop) -> None:
            for F in self.features:
                add_weight_gradient(tape, self.sizes, F, self.sizes.E, hop.rows)

        return add

    def _backward_whole(self, tape: Tape) -> None:
        s = self.sizes
        with cast_weight(tape, s, sum(self.features) * s.E):
            Region(s).make(tape)
            summing = _sums(tape, s, lambda rows: self._products(tape, rows))
        for F in self.features:
            weight_gradient(tape, s, F, s.E)
        for ticket in summing:
            tape.wait(ticket)


@dataclass(frozen=True)
class RowLinear:
    """Row-parallel layer: y = leave(x @ w.T) + b, x [N, F] and w [E, F] on this rank. Keeps x."""

    sizes: Sizes
    F: int
    biased: bool

    def forward(self, tape: Tape) -> None:
        """Makes y (category `Sizes.wire_category`)."""
        s, region = self.sizes, Region(self.sizes)
        if s.pipeline is not None:
            self._forward_pipelined(tape)
            return
        region.left(tape, self.send(tape))
        region.let_go(tape)

    def send(self, tape: Tape) -> int:
        """The product, put on the wire. Returns its ticket."""
        s, region = self.sizes, Region(self.sizes)
        with cast_weight(tape, s, s.E * self.F):
            region.make(tape)
            tape.matmul(s.N, self.F, s.E, s.c)
        return region.leave(tape)

    def backward(self, tape: Tape, *, release_input: bool) -> None:
        """Makes dx. dy is the gradient of the residual stream and lives on; x may be held by others too."""
        s, region = self.sizes, Region(self.sizes)
        if self.biased:
            tape.alloc(s.E * s.p)
        if s.pipeline is not None:
            self._backward_pipelined(tape)
        else:
            region.entered(tape, region.enter(tape))
            self.multiply_gradient(tape)
        if release_input:
            tape.release(s.N * self.F * s.c)
        tape.accumulate(s.E * (self.F + self.biased) * s.p)

    def multiply_gradient(self, tape: Tape) -> None:
        """The two products of a dy that has entered the region."""
        s = self.sizes
        with cast_weight(tape, s, s.E * self.F):
            tape.alloc(s.N * self.F * s.c)
            tape.matmul(s.N, s.E, self.F, s.c)
        weight_gradient(tape, s, s.E, self.F)
        Region(s).close(tape)

    def _forward_pipelined(self, tape: Tape) -> None:
        s = self.sizes
        with cast_weight(tape, s, s.E * self.F):
            if s.split:
                ring = ScatterRing(wire_of(s))
                for index in range(s.T):
                    ring.step(tape, index, lambda hop: tape.matmul(hop.rows, self.F, s.E, s.c))
                return
            Region(s).make(tape)
            summing = _sums(tape, s, lambda rows: tape.matmul(rows, self.F, s.E, s.c))
        for ticket in summing:
            tape.wait(ticket)

    def _backward_pipelined(self, tape: Tape) -> None:
        s = self.sizes
        with cast_weight(tape, s, s.E * self.F):
            tape.alloc(s.N * self.F * s.c)
            tape.alloc(s.E * self.F * s.p)
            if s.split:
                ring = GatherRing(tape, wire_of(s))
                for index in range(s.T):
                    ring.step(tape, index, lambda hop: self._both_gradients(tape, hop.rows))
            else:
                self._both_gradients(tape, s.N)

    def _both_gradients(self, tape: Tape, rows: int) -> None:
        tape.matmul(rows, self.sizes.E, self.F, self.sizes.c)
        add_weight_gradient(tape, self.sizes, self.sizes.E, self.F, rows)


def cast_weight(tape: Tape, sizes: Sizes, numel: int) -> AbstractContextManager[None]:
    """A weight in the compute dtype, for the length of one product."""
    nbytes = numel * sizes.c if sizes.casts_weights else 0
    tape.elementwise(nbytes + numel * FLOAT32 * sizes.casts_weights)
    return tape.holding(nbytes, "cast_weights")


def weight_gradient(tape: Tape, sizes: Sizes, out: int, into: int) -> None:
    """dy.T @ x, in the dtype of the parameter's gradient; accumulated by the caller."""
    if sizes.casts_weights:
        with tape.holding(out * into * sizes.c):
            tape.matmul(out, sizes.N, into, sizes.c)
            tape.alloc(out * into * FLOAT32)
    else:
        tape.matmul(out, sizes.N, into, sizes.c)
        tape.alloc(out * into * sizes.p)
    tape.elementwise(3 * out * into * sizes.p)


def add_weight_gradient(tape: Tape, sizes: Sizes, out: int, into: int, rows: int) -> None:
    """dy.T @ x of some rows, added to what there is in the dtype of the parameter's gradient."""
    with tape.holding(out * into * sizes.c if sizes.casts_weights else 0):
        tape.matmul(out, rows, into, sizes.c)
    if sizes.casts_weights:
        tape.elementwise(2 * out * into * (sizes.c + FLOAT32))


def wire_of(sizes: Sizes) -> Wire:
    """What the rings of a pipelined region move."""
    assert sizes.pipeline is not None
    return Wire(sizes.tensor, sizes.M, sizes.E * sizes.c, sizes.dtype, sizes.pipeline)


def _sums(tape: Tape, sizes: Sizes, product: Callable[[int], None]) -> list[int]:
    """The products of slices of N rows, each summed under the next. Returns the tickets."""
    assert sizes.pipeline is not None
    tickets = []
    for start, stop in slices(sizes.N, sizes.pipeline.chunks):
        product(stop - start)
        tickets.append(tape.all_reduce(sizes.tensor, sizes.dtype, (stop - start) * sizes.E * sizes.c))
    return tickets


@dataclass(frozen=True)
class Embedding:
    """Rows of the table split over the axis. Keeps row numbers: the tokens themselves at T = 1."""

    sizes: Sizes

    @property
    def saved_bytes(self) -> int:
        """Row numbers and, of each, whether another rank has the row."""
        return self.sizes.N * (INT64 + BOOL) if self.sizes.T > 1 else 0

    def forward(self, tape: Tape, category: str) -> None:
        """Makes x [M, E], in the category of what holds it later."""
        s, region = self.sizes, Region(self.sizes)
        if s.T > 1:
            tape.save(self.saved_bytes)
            with tape.holding(s.N * BOOL):
                pass
        if s.casts_weights:
            with tape.holding(s.N * s.E * FLOAT32):
                region.make(tape, category)
        else:
            region.make(tape, category)
        tape.elementwise(s.N * s.E * (s.c + 2 * FLOAT32))
        region.left(tape, region.leave(tape, category))
        region.let_go(tape)

    def backward(self, tape: Tape, *, tied: bool) -> None:
        """Frees dx; makes the gradient of the table, to be added to the head's if they are tied."""
        s, region = self.sizes, Region(self.sizes)
        full, table = s.N * s.E * FLOAT32, s.V * s.E * FLOAT32
        region.entered(tape, region.enter(tape))
        if s.casts:
            tape.alloc(full)
            region.close(tape)
        if s.T > 1:
            tape.alloc(full)
            if s.casts:
                tape.free(full)
            else:
                region.close(tape)
        tape.alloc(table)
        tape.elementwise(2 * full + 3 * table)
        if s.casts_gradients:
            tape.alloc(s.V * s.E * s.p)
            tape.free(table)
        if s.T > 1 or s.casts:
            tape.free(full)
        tape.free(s.M * s.E * s.c)
        tape.release(self.saved_bytes)
        if tied:
            tape.free(s.V * s.E * s.p)
        else:
            tape.accumulate(s.V * s.E * s.p)

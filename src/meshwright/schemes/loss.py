"""Cross-entropy over a vocabulary that the tensor axis divides, by formula: whole, or chunk by chunk.

Whole, the loss keeps logits [N, V] of this rank until its backward, where their float32 gradient stands beside them:
at 128k words the largest tensors of a step. In chunks of C tokens (`training.loss_chunk`) logits and their gradient are
[C, V]. A chunk's gradient is computed as soon as its loss is, for a gradient of the loss of 1, and multiplied through
the head at once: dh [N, E] and dw [V, E] are kept instead, scaled in backward. No product is computed twice.

    sends     whole: 3·N float32 forward in 2 calls           in chunks: as many elements in 2 calls a chunk
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.schemes.sequence import Region
from meshwright.schemes.tape import BOOL, FLOAT32, FLOAT64, INT64, Sizes, Tape
from meshwright.schemes.tensor import cast_weight

LOGITS = "logits"


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of logits of some tokens. Keeps logits and log-sum-exp."""

    sizes: Sizes
    tokens: int

    @property
    def logits_bytes(self) -> int:
        """Bytes of the logits."""
        return self.tokens * self.sizes.V * self.sizes.c

    @property
    def lse_bytes(self) -> int:
        """Bytes of the log-sum-exp."""
        return self.tokens * FLOAT32

    def forward(self, tape: Tape) -> None:
        """Makes the log-sum-exp and the loss, a float64 scalar."""
        s, n, row = self.sizes, self.tokens, self.lse_bytes
        if s.casts:
            with tape.holding(n * s.c, LOGITS):
                tape.alloc(row, LOGITS)
        else:
            tape.alloc(row, LOGITS)
        tape.elementwise(n * s.V * s.c)
        tape.wait(tape.all_reduce(s.tensor, "float32", row))
        with tape.holding(2 * row, LOGITS):
            with tape.holding(n * s.V * FLOAT32, LOGITS):
                tape.elementwise(n * s.V * (s.c + 4 * FLOAT32))
            with tape.holding(n * (INT64 + 2 * BOOL), LOGITS):
                tape.wait(tape.all_reduce(s.tensor, "float32", 2 * row))
                with tape.holding(row + n * BOOL, LOGITS):
                    tape.alloc(FLOAT64, LOGITS)

    def gradient(self, tape: Tape) -> None:
        """Makes the gradient of the logits beside them."""
        s, n, row = self.sizes, self.tokens, self.lse_bytes
        full = n * s.V * FLOAT32
        tape.alloc(full, LOGITS)
        tape.alloc(n * (INT64 + BOOL), LOGITS)
        with tape.holding(max(row, n * BOOL), LOGITS):
            pass
        with tape.holding(n * BOOL + FLOAT32, LOGITS):
            tape.alloc(row, LOGITS)
        tape.elementwise(n * s.V * (s.c + 5 * FLOAT32))
        if s.casts:
            tape.alloc(self.logits_bytes, LOGITS)
            tape.free(full, LOGITS)
        tape.free(row + n * (INT64 + BOOL), LOGITS)

    def backward(self, tape: Tape) -> None:
        """Makes the gradient of the logits, frees logits and log-sum-exp."""
        self.gradient(tape)
        tape.free(self.logits_bytes + self.lse_bytes, LOGITS)


@dataclass(frozen=True)
class ChunkedCrossEntropy:
    """Head and loss together. Keeps dh [N, E] and dw [V, E] float32."""

    sizes: Sizes

    @property
    def _weight_bytes(self) -> int:
        return self.sizes.V * self.sizes.E * FLOAT32

    def forward(self, tape: Tape) -> None:
        """Makes the loss, a float64 scalar, and the gradients."""
        s, region = self.sizes, Region(self.sizes)
        with tape.at("head"):
            region.entered(tape, region.enter(tape))
        with cast_weight(tape, s, s.V * s.E):
            tape.alloc(FLOAT64, LOGITS)
            tape.alloc(region.whole_bytes + self._weight_bytes, LOGITS)
            with tape.holding(FLOAT64, LOGITS):  # the gradient of 1
                chunks, rest = divmod(s.N, s.loss_chunk)
                with tape.repeat(chunks):
                    self._one_chunk(tape, s.loss_chunk)
                if rest:
                    self._one_chunk(tape, rest)
        region.close(tape)

    def _one_chunk(self, tape: Tape, tokens: int) -> None:
        s, chunk = self.sizes, CrossEntropy(self.sizes, tokens)
        tape.alloc(chunk.logits_bytes, LOGITS)
        tape.matmul(tokens, s.E, s.V, s.c)
        chunk.forward(tape)
        with tape.at(phase="backward"):
            chunk.backward(tape)
            tape.matmul(tokens, s.V, s.E, s.c)
            with tape.holding(s.V * s.E * s.c if s.casts else 0, LOGITS):
                tape.matmul(s.V, tokens, s.E, s.c)
            tape.elementwise(3 * self._weight_bytes)
            tape.free(chunk.logits_bytes, LOGITS)
        tape.free(FLOAT64, LOGITS)

    @property
    def dh_category(self) -> str:
        """Category of the gradient of the head's input, once it is summed."""
        return self.sizes.wire_category if self.sizes.split else LOGITS

    def backward(self, tape: Tape) -> None:
        """Scales the gradients: makes that of the head's input, accumulates the weight's."""
        s, region = self.sizes, Region(self.sizes)
        tape.alloc(FLOAT32, LOGITS)
        if s.casts:
            with tape.holding(s.N * s.E * FLOAT32, LOGITS):
                tape.alloc(region.whole_bytes, LOGITS)
        with tape.at("head"):
            if region.copies:
                tape.alloc(region.whole_bytes)
            if s.split:
                tape.alloc(region.outside_bytes, s.wire_category)
                ticket = tape.issue("reduce_scatter", s.tensor, s.dtype, region.whole_bytes)
            else:
                ticket = tape.all_reduce(s.tensor, s.dtype, region.whole_bytes)
            if s.casts and region.copies:
                tape.free(region.whole_bytes, LOGITS)
            tape.wait(ticket)
            if region.copies:
                tape.free(region.whole_bytes)
            elif s.casts and s.split:
                tape.free(region.whole_bytes, LOGITS)
        if s.casts or s.split:
            tape.free(region.whole_bytes, LOGITS)
        if s.casts_gradients:
            tape.alloc(s.V * s.E * s.p, LOGITS)
            tape.free(self._weight_bytes, LOGITS)
        tape.accumulate(s.V * s.E * s.p, LOGITS)
        tape.free(FLOAT32, LOGITS)

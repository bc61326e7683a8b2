"""Attention without a fused kernel, by formula: `kernels.naive`. Keeps the probabilities, one number a score.

Every operation copies its operands into [batch · heads, rows, head_dim] first, keys and values repeated for each query
head: temporaries. Products count as products, so that attention costs nothing here but what is written beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.schemes.tape import FLOAT32, Sizes, Tape


@dataclass(frozen=True)
class NaiveAttention:
    """`queries` rows of q [B, S, H, D] against `keys` rows of k and v [B, S, K, D]."""

    sizes: Sizes
    queries: int
    keys: int
    causal: bool

    @property
    def probability_bytes(self) -> int:
        """Bytes of a number a score in the compute dtype."""
        return self._num_scores * self.sizes.c

    @property
    def _num_scores(self) -> int:
        return self.sizes.B * self.sizes.H * self.queries * self.keys

    @property
    def _q_bytes(self) -> int:
        return self.sizes.B * self.queries * self.sizes.H * self.sizes.D * self.sizes.c

    @property
    def _kv_bytes(self) -> int:
        return self.sizes.B * self.keys * self.sizes.K * self.sizes.D * self.sizes.c

    @property
    def _repeated_bytes(self) -> int:
        return self._kv_bytes // self.sizes.K * self.sizes.H

    @property
    def _row_bytes(self) -> int:
        return self.sizes.B * self.sizes.H * self.queries * FLOAT32

    def forward(self, tape: Tape, out_category: str, lse_category: str, probability_category: str) -> None:
        """Makes out, log-sum-exp and probabilities."""
        s = self.sizes
        self._scores(tape, "temporaries" if s.casts else probability_category)
        tape.alloc(self._row_bytes, lse_category)
        with tape.holding(self._row_bytes):
            tape.elementwise(6 * self._num_scores * FLOAT32)
        self._cast(tape, probability_category)
        with tape.holding(self._q_bytes):
            with tape.holding(self._repeated_bytes):
                self._product(tape)
            tape.alloc(self._q_bytes, out_category)

    def backward(self, tape: Tape) -> None:
        """Makes dq, dk, dv from saved probabilities."""
        self._through_values(tape)
        with tape.holding(self.probability_bytes):
            tape.elementwise(3 * self.probability_bytes)
            tape.free(self.probability_bytes)
            self._through_scores(tape)

    def backward_of_block(self, tape: Tape) -> None:
        """Makes dq, dk, dv of a block from output and log-sum-exp: the probabilities are made again."""
        s, exact = self.sizes, self._q_bytes // self.sizes.c * FLOAT32
        self._scores(tape, "temporaries")
        tape.elementwise(4 * self._num_scores * FLOAT32)
        self._cast(tape, "temporaries")
        tape.alloc(2 * exact if s.casts else exact)
        tape.free(exact if s.casts else 0)
        with tape.holding(self._row_bytes):
            tape.free(exact)
            self._through_values(tape)
            tape.elementwise(6 * self.probability_bytes)
            self._through_scores(tape)
        tape.free(2 * self.probability_bytes)

    def _scores(self, tape: Tape, category: str) -> None:
        """Makes the scores; in the end there is one float32 each."""
        mask = self.queries * self.keys * self.sizes.c if self.causal else 0
        scalar = 0 if self.causal else self.sizes.c
        with tape.holding(mask):
            with tape.holding(self._q_bytes + self._repeated_bytes + scalar):
                tape.alloc(self.probability_bytes, category)
                self._product(tape)
            if self.sizes.casts:
                tape.alloc(self._num_scores * FLOAT32)
                tape.free(self.probability_bytes, category)

    def _cast(self, tape: Tape, category: str) -> None:
        """From float32 to the compute dtype, where that is another."""
        if self.sizes.casts:
            tape.alloc(self.probability_bytes, category)
            tape.free(self._num_scores * FLOAT32)

    def _through_values(self, tape: Tape) -> None:
        """Makes dv, and the gradient of the probabilities."""
        with tape.holding(self._q_bytes):
            tape.alloc(self._repeated_bytes)
            self._product(tape)
            self._shared(tape)
            with tape.holding(self._repeated_bytes):
                tape.alloc(self.probability_bytes)
                self._product(tape)

    def _through_scores(self, tape: Tape) -> None:
        """Makes dq and dk."""
        with tape.holding(self._q_bytes):
            with tape.holding(self._repeated_bytes + self.sizes.c):
                self._product(tape)
            tape.alloc(self._q_bytes)
        with tape.holding(self._q_bytes + self.sizes.c):
            tape.alloc(self._repeated_bytes)
            self._product(tape)
        self._shared(tape)

    def _shared(self, tape: Tape) -> None:
        """Sums the gradients of a head that was repeated, and lays them out."""
        if self._repeated_bytes != self._kv_bytes:
            tape.alloc(self._kv_bytes)
            tape.free(self._repeated_bytes)
        tape.alloc(self._kv_bytes)
        tape.free(self._kv_bytes)
        tape.elementwise(2 * self._repeated_bytes)

    def _product(self, tape: Tape) -> None:
        """Any of them: one has the size of the scores in each of the three dims."""
        s = self.sizes
        tape.matmul(s.B * s.H * self.queries, s.D, self.keys, s.c)

"""What one device does between collectives, but for attention: norms, rotary embedding, activation, by formula.

Each class is one autograd function: `forward` writes what it computes and keeps, `backward` what it computes and lets
go. Two conventions hold for all pages. An output is allocated by the function that makes it, in the category of what
holds it later; a saved input is released by the function that saved it. A function's backward frees the gradient it was
given.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.schemes.tape import FLOAT32, Sizes, Tape


@dataclass(frozen=True)
class Norm:
    """RMSNorm or LayerNorm. Keeps its input, and one float32 a row for rstd (and one for the mean)."""

    sizes: Sizes
    kind: str
    biased: bool

    @property
    def saved_bytes(self) -> int:
        """Statistics kept a micro-batch, beside the input."""
        return self.sizes.M * FLOAT32 * (2 if self.kind == "layernorm" else 1)

    def forward(self, tape: Tape, h_category: str = "saved_activations") -> None:
        """Saves the statistics; makes h [M, E], saved by the linear layer that reads it."""
        s = self.sizes
        tape.save(self.saved_bytes)
        if s.casts:
            with tape.holding(s.M * s.E * FLOAT32):
                tape.alloc(s.M * s.E * s.c, h_category)
        else:
            tape.alloc(s.M * s.E * s.c, h_category)
        tape.drop(self.saved_bytes)
        tape.elementwise(s.M * s.E * (2 * s.c + 3 * FLOAT32))

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of its parameters."""
        return (2 if self.kind == "layernorm" and self.biased else 1) * self.sizes.E * self.sizes.p

    def backward(self, tape: Tape, *, dh_category: str, residual: bool) -> None:
        """Frees dh and, if there is one to free, the gradient of the residual path; releases x, makes dx [M, E]."""
        self.differentiate(tape, dh_category=dh_category, residual=residual)
        tape.release(self.sizes.M * self.sizes.E * self.sizes.c)
        tape.accumulate(self.gradient_bytes)

    def differentiate(self, tape: Tape, *, dh_category: str, residual: bool) -> None:
        """Backward, but for who lets go of x and who takes the parameters' gradients."""
        s = self.sizes
        row, full, weight = s.M * FLOAT32, s.M * s.E * FLOAT32, s.E * FLOAT32
        if self.kind == "layernorm" and self.biased:
            tape.alloc(weight)
        tape.alloc(2 * full)  # normalised input and running gradient
        tape.alloc(weight)
        if self.kind == "layernorm":
            with tape.holding(row):
                pass
        with tape.holding(full):
            tape.alloc(row)
        if s.casts:
            tape.alloc(s.M * s.E * s.c)
            tape.free(full)
        tape.free(full)
        tape.free(row)
        tape.elementwise(s.M * s.E * (3 * s.c + 12 * FLOAT32))
        tape.free(s.M * s.E * s.c, dh_category)
        if residual:
            tape.free(s.M * s.E * s.c)
        tape.release(self.saved_bytes)
        if s.casts_gradients:
            tape.alloc(self.gradient_bytes)
            tape.free(self.gradient_bytes // s.p * FLOAT32)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of `heads` heads. Keeps nothing of its own: the tables are shared by all layers."""

    sizes: Sizes
    heads: int

    @property
    def nbytes(self) -> int:
        """Bytes of its input, and of its output."""
        return self.sizes.N * self.heads * self.sizes.D * self.sizes.c

    def forward(self, tape: Tape, category: str) -> None:
        """Makes the rotated heads, in the category of what holds them later, and frees the input."""
        tape.alloc(self.nbytes, category)
        self._rotate(tape)
        tape.free(self.nbytes)

    def backward(self, tape: Tape, dy_category: str = "temporaries") -> None:
        """Makes the gradient of the input and frees that of the output."""
        tape.alloc(self.nbytes)
        self._rotate(tape)
        tape.free(self.nbytes, dy_category)

    def _rotate(self, tape: Tape) -> None:
        half = self.sizes.N * self.heads * (self.sizes.D // 2) * FLOAT32
        for _ in range(2):
            with tape.holding(half):
                tape.elementwise(self.nbytes + 3 * half)


@dataclass(frozen=True)
class Activation:
    """silu(gate)·up, or gelu(up). Keeps its inputs."""

    sizes: Sizes
    kind: str

    @property
    def nbytes(self) -> int:
        """Bytes of one tensor of the hidden layer."""
        return self.sizes.N * self.sizes.F * self.sizes.c

    @property
    def num_inputs(self) -> int:
        """gate and up, or up alone."""
        return 2 if self.kind == "gated_silu" else 1

    def forward(self, tape: Tape) -> None:
        """Makes the hidden layer, saved by the row-parallel layer."""
        tape.save(self.nbytes)
        tape.elementwise((self.num_inputs + 1) * self.nbytes)

    def backward(self, tape: Tape) -> None:
        """Frees da, releases the inputs, makes their gradients."""
        if self.kind == "gated_silu":
            with tape.holding(self.nbytes):  # da·up
                tape.alloc(self.nbytes)
        tape.alloc(self.nbytes)
        tape.elementwise((3 * self.num_inputs + 2) * self.nbytes)
        tape.free(self.nbytes)
        tape.release(self.num_inputs * self.nbytes)

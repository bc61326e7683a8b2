"""What one device does between collectives: norms, rotary embedding, attention, activation. Closed forms of `kernels/`.

Each class is one autograd function: `forward` writes what it computes and keeps, `backward` what it computes and lets
go. Two conventions hold for all pages. An output is allocated by the function that makes it, in the category of what
holds it later; a saved input is released by the function that saved it. A function's backward frees the gradient it was
given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
        return self.sizes.N * FLOAT32 * (2 if self.kind == "layernorm" else 1)

    def forward(self, tape: Tape) -> None:
        """Saves the statistics; makes h [N, E], saved by the linear layer that reads it."""
        s = self.sizes
        tape.save(self.saved_bytes)
        if s.casts:
            with tape.holding(s.N * s.E * FLOAT32):
                tape.save(s.N * s.E * s.c)
        else:
            tape.save(s.N * s.E * s.c)
        tape.elementwise(s.N * s.E * (2 * s.c + 3 * FLOAT32))

    def backward(self, tape: Tape, *, dh_category: str, residual: bool) -> None:
        """Frees dh and the gradient of the residual path, releases x, and makes dx [N, E]."""
        s = self.sizes
        row, full, weight = s.N * FLOAT32, s.N * s.E * FLOAT32, s.E * FLOAT32
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
            tape.alloc(s.N * s.E * s.c)
            tape.free(full)
        tape.free(full)
        tape.free(row)
        tape.elementwise(s.N * s.E * (3 * s.c + 12 * FLOAT32))
        tape.free(s.N * s.E * s.c, dh_category)
        if residual:
            tape.free(s.N * s.E * s.c)
        tape.release(s.N * s.E * s.c)
        tape.release(self.saved_bytes)
        tape.free(weight)
        if self.kind == "layernorm" and self.biased:
            tape.free(weight)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of `heads` heads. Keeps nothing of its own: the tables are shared by all layers."""

    sizes: Sizes
    heads: int

    @property
    def nbytes(self) -> int:
        """Bytes of its input, and of its output."""
        return self.sizes.N * self.heads * self.sizes.D * self.sizes.c

    def forward(self, tape: Tape) -> None:
        """Makes the rotated heads, saved by attention, and frees the input."""
        tape.save(self.nbytes)
        self._rotate(tape)
        tape.free(self.nbytes)

    def backward(self, tape: Tape) -> None:
        """Makes the gradient of the input and frees that of the output."""
        tape.alloc(self.nbytes)
        self._rotate(tape)
        tape.free(self.nbytes)

    def _rotate(self, tape: Tape) -> None:
        half = self.sizes.N * self.heads * (self.sizes.D // 2) * FLOAT32
        for _ in range(2):
            with tape.holding(half):
                tape.elementwise(self.nbytes + 3 * half)


Kernel = Literal["flash_for_cpu", "flash", "efficient"]
"""The fused kernels behind torch's scaled-dot-product attention."""


def attention_kernel(device_kind: str, *, half: bool) -> Kernel:
    """The kernel for a device and a compute dtype of two bytes or more: CUDA's flash has no float32."""
    if device_kind == "cpu":
        return "flash_for_cpu"
    return "flash" if half else "efficient"


def expands_heads(kernel: Kernel, heads: int, kv_heads: int) -> bool:
    """Whether a kernel needs keys and values repeated for each query head: only CUDA's flash shares them."""
    return kernel != "flash" and heads != kv_heads


@dataclass(frozen=True)
class AttentionCore:
    """softmax(q kᵀ/√D) v by a fused kernel. Keeps q, k, v, out and one float32 a head and row: no score matrix."""

    sizes: Sizes

    @property
    def kernel(self) -> Kernel:
        """Which kernel runs."""
        return attention_kernel(self.sizes.device_kind, half=self.sizes.casts)

    @property
    def expands(self) -> bool:
        """Whether keys and values are repeated for each query head."""
        return expands_heads(self.kernel, self.sizes.H, self.sizes.K)

    @property
    def expanded_bytes(self) -> int:
        """Bytes of an expanded k, and of v; one head is repeated by its stride alone, without a copy."""
        return self.q_bytes if self.expands and self.sizes.K > 1 else 0

    @property
    def q_bytes(self) -> int:
        """Bytes of q, of out, and of an expanded k or v."""
        return self.sizes.N * self.sizes.H * self.sizes.D * self.sizes.c

    @property
    def kv_bytes(self) -> int:
        """Bytes of k, and of v."""
        return self.sizes.N * self.sizes.K * self.sizes.D * self.sizes.c

    @property
    def lse_bytes(self) -> int:
        """Bytes of the log-sum-exp and of the kernel's random state; the efficient kernel pads rows to 32."""
        s = self.sizes
        rows = -(-s.S // 32) * 32 if self.kernel == "efficient" else s.S
        random_state = {"flash_for_cpu": 0, "flash": 24, "efficient": 16}[self.kernel]
        return s.B * rows * s.H * FLOAT32 + random_state

    def flops(self, products: int) -> int:
        """FLOPs of so many products of the size of the score matrix, the masked half included."""
        s = self.sizes
        return 2 * products * s.B * s.H * s.S * s.S * s.D

    def forward(self, tape: Tape) -> None:
        """Makes out (saved) from q, k and v (saved by whoever made them)."""
        with tape.holding(2 * self.expanded_bytes):
            tape.save(self.q_bytes + self.lse_bytes)
            tape.attention(self.flops(2), 2 * self.q_bytes + 2 * self._read_kv + self.lse_bytes)

    def backward(self, tape: Tape) -> None:
        """Frees dout, releases q, k, v, out; makes dq, dk, dv."""
        with tape.holding(2 * self.expanded_bytes):
            tape.alloc(self.q_bytes + 2 * self._read_kv)
            tape.attention(self.flops(5), 4 * self.q_bytes + 4 * self._read_kv + self.lse_bytes)
            if self.expands:
                tape.alloc(2 * self.kv_bytes)
                tape.free(2 * self.q_bytes)
        tape.free(self.q_bytes)
        tape.release(2 * self.q_bytes + 2 * self.kv_bytes + self.lse_bytes)

    @property
    def _read_kv(self) -> int:
        return self.q_bytes if self.expands else self.kv_bytes


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

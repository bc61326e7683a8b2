"""What one call of attention must compute, move and keep, by formula, for `bench attention`. Pure Python.

    B batch   H query heads   K key and value heads   S sequence   D width of a head   c bytes of an element
    pairs     visible query-key pairs of a head: S² in full, S·(S + 1)/2 causal

    FLOPs     only useful ones: 4·B·H·D·pairs forward, 10·B·H·D·pairs backward (the scores again), 14 for both
    bytes     each once. forward: q, k, v, out, lse; backward, and both: these and their gradients (of lse none)
    limit     the least seconds of a device: max(FLOPs / peak, bytes / bandwidth)

Memory is above q, k, v and the gradient of out, which are there before (and the mask of naive attention, made once).
`held` is what exists only for backward once forward is done: neither an input nor the output. `peak` is of forward and
then backward, with the output and all gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from meshwright.config.tree import Device
from meshwright.schemes.attention import RANDOM_BYTES, Kernel, expands_heads, lse_rows
from meshwright.schemes.tape import BOOL, FLOAT32

Measure = Literal["forward", "backward", "both"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
Certainty = Literal["exact", "estimate", "at least", "at most"]

PRODUCTS: dict[Measure, int] = {"forward": 2, "backward": 5, "both": 7}
"""Matrix products of the size of the score matrix."""
ITEM_BYTES = {"float32": 4, "bf16": 2}
WORKSPACE_ROWS = 128
"""CUDA's fused backwards fill the rows of their workspaces up to a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One attention problem of the grid."""

    dtype: str
    head_dim: int
    seq: int
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    causal: bool = True

    @property
    def pairs(self) -> int:
        """Visible query-key pairs of a head."""
        return self.seq * (self.seq + 1) // 2 if self.causal else self.seq**2

    @property
    def q_bytes(self) -> int:
        """Bytes of q, and of out."""
        return self.batch * self.seq * self.heads * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def kv_bytes(self) -> int:
        """Bytes of k, and of v."""
        return self.q_bytes // self.heads * self.kv_heads

    @property
    def row_bytes(self) -> int:
        """Bytes of one float32 a query and head."""
        return self.batch * self.seq * self.heads * FLOAT32

    @property
    def score_bytes(self) -> int:
        """Bytes of a whole score matrix."""
        return self.batch * self.heads * self.seq**2 * ITEM_BYTES[self.dtype]

    @property
    def input_bytes(self) -> int:
        """Bytes of q, k, v and the gradient of out."""
        return 2 * self.q_bytes + 2 * self.kv_bytes

    @property
    def mask_bytes(self) -> int:
        """Bytes of naive attention's mask."""
        return self.seq**2 * BOOL if self.causal else 0

    def flops(self, measure: Measure) -> int:
        """Useful FLOPs: those of visible pairs."""
        return 2 * PRODUCTS[measure] * self.batch * self.heads * self.head_dim * self.pairs

    def moved_bytes(self, measure: Measure) -> int:
        """Bytes that must be read or written, each once."""
        tensors = 2 if measure == "forward" else 4
        return tensors * (self.q_bytes + self.kv_bytes) + self.row_bytes

    def limit(self, measure: Measure, device: Device) -> tuple[float, str] | None:
        """The least seconds on a device, and what sets them; None where its figures are not known."""
        peak, bandwidth = device.peak_flops.get(self.dtype), device.memory_bandwidth
        if not peak or not bandwidth:
            return None
        computing, moving = self.flops(measure) / peak, self.moved_bytes(measure) / bandwidth
        return max(computing, moving), "compute" if computing >= moving else "memory"


@dataclass(frozen=True)
class Memory:
    """Predicted bytes of an implementation. `held` is by tensor; None where nothing is predicted."""

    held: Mapping[str, int] | None
    peak: int
    peak_certainty: Certainty
    held_certainty: Certainty = "exact"
    extra_input_bytes: int = 0
    """What it needs beside the inputs of all, and is not counted."""
    saved: tuple[str, ...] = field(default=())
    """What it keeps for backward and was there anyway: inputs, or the output."""

    @property
    def held_bytes(self) -> int | None:
        """Bytes of all that is held."""
        return None if self.held is None else sum(self.held.values())


def memory(implementation: str, cell: Cell) -> Memory:
    """What an implementation holds, and its peak."""
    if implementation == "naive":
        return _naive(cell)
    if implementation.startswith("naive-"):
        return _compiled_naive(cell)
    return _math(cell) if implementation == "sdpa-math" else _fused(implementation, cell)


# --- naive ------------------------------------------------------------------------------------------------------------


def _naive(cell: Cell) -> Memory:
    """The sequence of `attention_subjects.naive` and of its backward, moment by moment.

    A score matrix X: scores, scaled, masked and probabilities follow each other, two of them alive at a time; backward
    has the probabilities, their gradient and that of the scores. q, k and v are copied where heads and batch do not
    fold into one dimension, or where several heads share one of k and v.
    """
    X, out = cell.score_bytes, cell.q_bytes
    grouped = cell.heads != cell.kv_heads
    q_copy = out if cell.batch > 1 and cell.heads > 1 else 0
    kv_folds = [cell.batch, cell.kv_heads, cell.heads // cell.kv_heads]
    kv_copy = out if sum(size > 1 for size in kv_folds) > 1 else 0
    copies = q_copy + 2 * kv_copy
    gradient = out  # of q, and of k and v as they were folded: a head each
    moments = [
        copies + 2 * X,
        copies + X + out,
        copies + 2 * X + out + gradient,
        q_copy + kv_copy + 3 * X + out + gradient,
        q_copy + kv_copy + X + out + 3 * gradient,
        out + 3 * gradient + (cell.kv_bytes if grouped else 0),
    ]
    held = {"q copy": q_copy, "k copy": kv_copy, "v copy": kv_copy, "probabilities": X}
    originals = (("q", q_copy), ("k", kv_copy), ("v", kv_copy), ("mask", 0 if cell.causal else 1))
    return Memory(
        {name: size for name, size in held.items() if size},
        max(moments),
        "exact",
        extra_input_bytes=cell.mask_bytes,
        saved=tuple(name for name, copied in originals if not copied),
    )


def _compiled_naive(cell: Cell) -> Memory:
    """Probabilities and their gradient must exist at once; what else is fused away is the compiler's choice."""
    eager = _naive(cell)
    return Memory(
        eager.held, 2 * cell.score_bytes + cell.q_bytes, "at least", "at most", extra_input_bytes=cell.mask_bytes
    )


def _math(cell: Cell) -> Memory:
    """torch's own composition: in float32 whatever the dtype, with a mask of numbers."""
    X = cell.batch * cell.heads * cell.seq**2 * FLOAT32
    mask = cell.seq**2 * FLOAT32 if cell.causal else 0
    return Memory(None, 4 * X + mask + 4 * cell.q_bytes, "estimate")


# --- fused ------------------------------------------------------------------------------------------------------------

_KERNELS: dict[str, Kernel] = {
    "sdpa-cpu": "sdpa_cpu",
    "sdpa-flash": "sdpa_flash",
    "sdpa-efficient": "sdpa_efficient",
    "flash": "flash",
    "flex": "flex",
}
"""As `schemes.attention` knows them; it does not know cuDNN's."""
_CUDNN_RANDOM_BYTES = 16
_ACCUMULATES = ("sdpa-flash", "sdpa-cudnn")
"""These sum dq in float32 before they round it, and make dk and dv for every query head before they sum them."""


def _fused(implementation: str, cell: Cell) -> Memory:
    """Keeps one float32 a row beside q, k, v and out; backward adds another, and the gradients."""
    kernel, grouped = _KERNELS.get(implementation), cell.heads != cell.kv_heads
    rows = lse_rows(kernel, cell.seq) if kernel else cell.seq
    random = RANDOM_BYTES.get(kernel, 0) if kernel else _CUDNN_RANDOM_BYTES
    held = {"lse": cell.row_bytes // cell.seq * rows} | ({"random state": random} if random else {})
    gradients = cell.q_bytes + 2 * cell.kv_bytes
    delta = 0 if implementation == "sdpa-cpu" else cell.row_bytes
    sums = cell.batch * cell.heads * _up(cell.seq, WORKSPACE_ROWS) * cell.head_dim * FLOAT32
    accumulates = implementation in _ACCUMULATES
    workspace = delta + (sums if accumulates else 0)
    expands = kernel is not None and expands_heads(kernel, cell.heads, cell.kv_heads)
    expanded = 2 * cell.q_bytes if expands or (grouped and accumulates) else 0
    exact = implementation == "flash" or (implementation == "sdpa-cpu" and not grouped)
    return Memory(
        held,
        cell.q_bytes + sum(held.values()) + gradients + workspace + expanded,
        "exact" if exact else "estimate",
        "estimate" if implementation in ("sdpa-cudnn", "flex") or expands else "exact",
        saved=("q", "k", "v", "out"),
    )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

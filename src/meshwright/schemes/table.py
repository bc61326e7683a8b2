"""What each scheme splits, sends, keeps and overlaps, side by side, for one block of a transformer.

Every figure is a fold over what the scheme's own page writes on a tape; there is no second formula here. The block is
GPT's (LayerNorm, multi-head attention with heads of 128 where the sizes allow, GELU MLP of 4 · hidden, no biases) in
bf16 with float32 gradients. A row is what one rank does in a step of one micro-batch of `batch` sequences of `seq`:

    calls     collectives a block issues, by phase
    elements  elements of the full tensors of all those calls, forward and backward; bytes: the same in bytes
    wire      bytes that this rank sends for them under the ring algorithm
    saved     bytes that autograd keeps of the block between forward and backward
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meshwright.account import Ledger, Memory, Trace
from meshwright.config.tree import Layout, Model, Training
from meshwright.errors import UserError
from meshwright.schemes.decoder import Block
from meshwright.schemes.params import param_specs
from meshwright.schemes.replicate import sum_naive
from meshwright.schemes.tape import DTYPE_NAMES, ITEMSIZES, Group, Sizes, Tape

ITEMSIZES_BY_DTYPE = {DTYPE_NAMES[precision]: itemsize for precision, itemsize in ITEMSIZES.items()}


@dataclass(frozen=True)
class Row:
    """One scheme."""

    scheme: str
    splits: str
    operation: str
    calls_forward: int
    calls_backward: int
    elements: int
    bytes: int
    wire_bytes: int
    saved_bytes: int
    overlaps: str


@dataclass(frozen=True)
class _Scheme:
    """What a row needs to know beside the tape."""

    name: str
    axis: str
    splits: str
    overlaps: str
    gradients: Callable[..., None] | None = None


SCHEMES = (
    _Scheme("Megatron tensor parallelism", "tensor", "weights: heads and hidden features", "nothing"),
    _Scheme("data parallelism, naive", "replicate", "batch", "nothing", sum_naive),
)


def table(seq: int, hidden: int, degree: int, batch: int = 1) -> tuple[Row, ...]:
    """A row for each scheme. Raises UserError for sizes that the schemes cannot split, all at once."""
    sizes = {"seq": seq, "hidden": hidden, "degree": degree, "batch": batch}
    mistakes = [f"--{name} {value} must be at least 1: use 1 or more" for name, value in sizes.items() if value < 1]
    if not mistakes and hidden % degree:
        below, above = hidden // degree * degree, (hidden // degree + 1) * degree
        mistakes = [
            f"--degree {degree} does not divide --hidden {hidden} (each rank holds as many heads): "
            f"use a hidden of {f'{below} or ' if below else ''}{above}"
        ]
    if mistakes:
        raise UserError("\n".join(mistakes))
    return tuple(_row(scheme, seq, hidden, degree, batch) for scheme in SCHEMES)


def _row(scheme: _Scheme, seq: int, hidden: int, degree: int, batch: int) -> Row:
    trace = _block(scheme, seq, hidden, degree, batch)
    rows = Ledger.of(trace).rows
    calls = {phase: sum(n for key, n in rows.items() if key.phase == phase) for phase in ("forward", "backward")}
    return Row(
        scheme=scheme.name,
        splits=scheme.splits,
        operation=", ".join(sorted({key.operation for key in rows})) or "none",
        calls_forward=calls["forward"],
        calls_backward=calls["backward"],
        elements=sum(n * key.payload_bytes // ITEMSIZES_BY_DTYPE[key.dtype] for key, n in rows.items()),
        bytes=sum(n * key.payload_bytes for key, n in rows.items()),
        wire_bytes=sum(n * key.wire_bytes for key, n in rows.items()),
        saved_bytes=_saved_bytes(trace),
        overlaps=scheme.overlaps,
    )


def _block(scheme: _Scheme, seq: int, hidden: int, degree: int, batch: int) -> Trace:
    """Forward and backward of one block under one scheme."""
    head_dim = math.gcd(hidden // degree, 128)  # so that each rank has whole heads
    model = Model(
        block="decoder",
        layers=1,
        d_model=hidden,
        d_ff=4 * hidden,
        heads=hidden // head_dim,
        kv_heads=hidden // head_dim,
        head_dim=head_dim,
        norm="layernorm",
        positions="learned",
        mlp="gelu",
    )
    degrees: dict[str, Any] = {scheme.axis: degree}
    layout = Layout(**degrees)
    training = Training(batch=batch * layout.batch_ranks, seq_len=seq, precision="bf16", device="cuda")
    sizes, tape = Sizes.of(model, layout, training), Tape()
    with tape.at(phase="forward"):
        Block(model, sizes).forward(tape, "layers.0")
    with tape.at(phase="backward"):
        Block(model, sizes).backward(tape, "layers.0")
    if scheme.gradients is not None:
        specs = [spec for spec in param_specs(model, layout, seq) if spec.name.startswith("layers.0.")]
        scheme.gradients(tape, specs, Group(scheme.axis, degree))
    return tape.trace()


def _saved_bytes(trace: Trace) -> int:
    """Saved activations that forward adds: the input of the next block stands for that of this one."""
    return sum(
        event.delta_bytes
        for event in trace.events
        if isinstance(event, Memory) and event.category == "saved_activations" and event.phase == "forward"
    )

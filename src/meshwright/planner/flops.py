"""FLOPs of a pass, and how long they take."""

from __future__ import annotations

from meshwright.account import EXACT_KINDS, Work
from meshwright.config.tree import Job
from meshwright.schemes.decoder import Decoder
from meshwright.schemes.tape import Sizes, Tape
from meshwright.schemes.tensor import ColumnLinear, RowLinear


def forward_flops(job: Job) -> int:
    """FLOPs of matrix products and attention in the forward pass of one micro-batch."""
    sizes, tape = Sizes.of(job.model, job.layout, job.training), Tape()
    if job.model.block == "ffn":
        up, down = ColumnLinear(sizes, (sizes.F,), job.model.bias), RowLinear(sizes, sizes.F, job.model.bias)
        with tape.repeat(job.model.layers), tape.at(phase="forward"):
            up.forward(tape, ("saved_activations",))
            down.forward(tape)
    else:
        Decoder(job.model, sizes).forward(tape)
    return sum(Work.of(tape.trace()).flops(phase="forward", kind=kind) for kind in EXACT_KINDS)


def backward_seconds(job: Job) -> float | None:
    """Of one micro-batch: twice the forward's products, and those again under full recomputation.

    None where the device has no known peak.
    """
    device = job.cluster.device
    peak = device.peak_flops.get(job.training.precision)
    passes = 3 if job.layout.recompute == "full" else 2
    return passes * forward_flops(job) / (device.efficiency * peak) if peak else None

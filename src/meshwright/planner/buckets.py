"""The size of a gradient bucket: the one that was set, or the best by `schemes.bucketing` on the job's cluster."""

from __future__ import annotations

import math

from meshwright.account import wire_bytes
from meshwright.config.backends import backend_factor
from meshwright.config.tree import Job
from meshwright.planner.flops import backward_seconds
from meshwright.planner.wire import link
from meshwright.schemes import bucketing
from meshwright.schemes.params import param_specs
from meshwright.schemes.tape import FLOAT32
from meshwright.units import MIB


def bucket_bytes(job: Job) -> int:
    """Bytes at which a bucket of a legal job is closed; of `auto`, by latency and bandwidth of the gradient group.

    A device without a known peak is taken to compute for as long as there is to send.
    """
    layout = job.layout
    if layout.bucket_mib != "auto":
        return int(layout.bucket_mib * MIB)
    axis, ranks = layout.gradient_axis, layout.gradient_group_size
    operation = "all_reduce"
    if layout.state_axes:
        axis, ranks, operation = layout.state_axis, layout.state_group_size, "reduce_scatter"
    nbytes = sum(spec.local_numel for spec in param_specs(job.model, layout, job.training.seq_len)) * FLOAT32
    if ranks == 1:
        return nbytes
    over = link(axis, ranks, layout, job.cluster)
    factor = backend_factor("gloo" if job.training.device == "cpu" else "nccl", operation)
    through = over.bandwidth * nbytes / (wire_bytes(operation, ranks, nbytes) * factor)
    computing = backward_seconds(job)
    return bucketing.bucket_bytes(nbytes, over.latency_seconds, through, math.inf if computing is None else computing)

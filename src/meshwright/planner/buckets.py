"""The buckets of a job's gradients. Their size: the one that was set, or the best by `schemes.bucketing` on the job's
cluster."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from meshwright.account import wire_bytes
from meshwright.config.backends import backend_factor, backend_of
from meshwright.config.tree import Job
from meshwright.planner.flops import backward_seconds
from meshwright.planner.wire import link
from meshwright.schemes import bucketing
from meshwright.schemes.hierarchical import tier_groups
from meshwright.schemes.params import ParamSpec, param_specs
from meshwright.schemes.replicate import Bucket, buckets
from meshwright.schemes.tape import FLOAT32, Group
from meshwright.units import MIB


def buckets_of(job: Job, specs: Sequence[ParamSpec]) -> tuple[Bucket, ...]:
    """The buckets of a legal job with zero 0 or 1, cut for those who shard them, or sum them by parts."""
    layout = job.layout
    tiers = tier_groups(layout, job.cluster.devices_per_host)
    cut = layout.state_group_size if tiers is None else tiers.intra.size
    return buckets(specs, layout.gradients, bucket_bytes(job), cut)


def bucket_bytes(job: Job) -> int:
    """Bytes at which a bucket of a legal job is closed; of `auto`, by latency and bandwidth of the gradient group.

    A device without a known peak is taken to compute for as long as there is to send. Of a sum in stages all latencies
    count, and the bytes of the tier that takes longest: stages of different buckets run beside each other.
    """
    layout = job.layout
    if layout.bucket_mib != "auto":
        return int(layout.bucket_mib * MIB)
    nbytes = sum(spec.local_numel for spec in param_specs(job.model, layout, job.training.seq_len)) * FLOAT32
    stages = [stage for stage in _stages(job, nbytes) if stage[1].size > 1]
    if not stages:
        return nbytes
    backend = backend_of(job.training.device)
    links = {group.axis: link(group.axis, group.size, layout, job.cluster) for _, group, _ in stages}
    sent = dict.fromkeys(links, 0.0)
    for operation, group, payload in stages:
        sent[group.axis] += wire_bytes(operation, group.size, payload) * backend_factor(backend, operation)
    through = min(links[axis].bandwidth * nbytes / sent[axis] for axis in links)
    latency = sum(links[group.axis].latency_seconds for _, group, _ in stages)
    computing = backward_seconds(job)
    return bucketing.bucket_bytes(nbytes, latency, through, math.inf if computing is None else computing)


def _stages(job: Job, nbytes: int) -> Iterator[tuple[str, Group, int]]:
    """Operation, group and payload of what sums so many bytes of gradients while backward runs."""
    layout = job.layout
    if layout.state_axes:
        yield "reduce_scatter", Group(layout.state_axis, layout.state_group_size), nbytes
    elif (tiers := tier_groups(layout, job.cluster.devices_per_host)) is not None:
        yield "reduce_scatter", tiers.intra, nbytes
        yield "all_reduce", tiers.inter, nbytes // tiers.intra.size
        yield "all_gather", tiers.intra, nbytes
    else:
        yield "all_reduce", Group(layout.gradient_axis, layout.gradient_group_size), nbytes

"""The range of each number in the tree, in one place.

What depends on two fields is `legality`'s, but for the order of two bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any, get_args, get_type_hints

from meshwright.config.tree import AXES, Cluster, Device, Job, Layout, RopeScaling, Training

PRECISIONS = get_args(get_type_hints(Training)["precision"])

_Range = tuple[str, Callable[[Any], bool]]
SIZE: _Range = ("must be between 1 and 2**40", lambda value: 1 <= value <= 2**40)
LAYERS: _Range = ("must be between 1 and 2**16", lambda value: 1 <= value <= 2**16)
COUNT: _Range = ("must be between 0 and 2**40", lambda value: 0 <= value <= 2**40)
DEGREE: _Range = ("must be between 1 and 2**31 - 1", lambda value: 1 <= value < 2**31)
SEED: _Range = ("must be between 0 and 2**63 - 1", lambda value: 0 <= value < 2**63)
SECONDS: _Range = ("must be above 0 and at most 1e9", lambda value: 0 < value <= 1e9)
MIB: _Range = ("must be above 0 and at most 2**20", lambda value: value == "auto" or 0 < value <= 2**20)
STAGE: _Range = ("must be 0, 1, 2, 3 or auto", lambda value: value in ("auto", 0, 1, 2, 3))
UNITS: _Range = ("must be between 1 and 2**16", lambda value: 1 <= value <= 2**16)
AT_LEAST_ONE: _Range = ("must be at least 1", lambda value: value >= 1)
AT_LEAST_ZERO: _Range = ("must be at least 0", lambda value: value >= 0)
ABOVE_ZERO: _Range = ("must be above 0", lambda value: value > 0)
FRACTION: _Range = ("must be between 0 and 1", lambda value: 0 <= value <= 1)
SHARE: _Range = ("must be above 0 and at most 1", lambda value: 0 < value <= 1)
BELOW_ONE: _Range = ("must be at least 0 and below 1", lambda value: 0 <= value < 1)

_MODEL = {"layers": LAYERS, **dict.fromkeys(("d_model", "d_ff"), SIZE)}
_DECODER = {
    **dict.fromkeys(("heads", "kv_heads", "head_dim", "vocab_size"), SIZE),
    **dict.fromkeys(("norm_eps", "rope_theta"), ABOVE_ZERO),
    "rope_scaling.factor": AT_LEAST_ONE,
    "rope_scaling.low_freq_factor": ABOVE_ZERO,
    "rope_scaling.original_positions": SIZE,
}
_TRAINING = {
    **dict.fromkeys(("batch", "seq_len", "accumulation", "steps", "heldout_sequences"), SIZE),
    **dict.fromkeys(("warmup_steps", "heldout_every", "loss_chunk", "trial_steps"), COUNT),
    **dict.fromkeys(("weight_decay", "clip_norm"), AT_LEAST_ZERO),
    "seed": SEED,
    "learning_rate": ABOVE_ZERO,
    "timeout_seconds": SECONDS,
    **dict.fromkeys(("beta1", "beta2"), BELOW_ONE),
    "final_learning_rate": FRACTION,
}
_OPTIONS = {"bucket_mib": MIB, "zero": STAGE, "prefetch": UNITS, "overlap_chunks": UNITS}
_DEVICE = {**dict.fromkeys(("memory_bytes", "memory_bandwidth"), AT_LEAST_ZERO), "efficiency": SHARE}
_LINK = {"latency_seconds": AT_LEAST_ZERO, "bandwidth": ABOVE_ZERO, "links": DEGREE}
_CLUSTER = {
    **dict.fromkeys(("hosts", "devices_per_host"), DEGREE),
    **{f"{tier}.{field}": limit for tier in ("intra", "inter") for field, limit in _LINK.items()},
}


def job_mistakes(job: Job) -> list[str]:
    """Every number of a job that is out of its range, a line each."""
    decoder = _DECODER if job.model.block == "decoder" else {}
    return [
        *_name_mistakes(job.name),
        *_mistakes(job.model, "model.", _MODEL | decoder),
        *(_rope_scaling_mistakes(job.model.rope_scaling) if decoder else []),
        *(_mistakes(job.layout, "layout.", dict.fromkeys(AXES, DEGREE)) or world_mistakes(job.layout)),
        *_mistakes(job.layout, "layout.", _OPTIONS),
        *cluster_mistakes(job.cluster, "cluster."),
        *_mistakes(job.training, "training.", _TRAINING),
    ]


def world_mistakes(layout: Layout) -> list[str]:
    """The same for the product of the degrees, where each of them is in its range."""
    rule, holds = DEGREE
    return [] if holds(layout.world) else [f"the number of ranks, the product of the degrees = {layout.world}, {rule}"]


def cluster_mistakes(cluster: Cluster, prefix: str = "") -> list[str]:
    """The same for a cluster and its device."""
    return _mistakes(cluster, prefix, _CLUSTER) + device_mistakes(cluster.device, f"{prefix}device.")


def device_mistakes(device: Device, prefix: str = "") -> list[str]:
    """The same for a device. An unknown peak is left out of a file, never written as 0."""
    lines = _mistakes(device, prefix, _DEVICE)
    for precision, flops in device.peak_flops.items():
        path = f"{prefix}peak_flops.{precision}"
        if precision not in PRECISIONS:
            lines.append(f"{path} is not a precision: use {' or '.join(PRECISIONS)}")
        elif not (flops > 0 and math.isfinite(flops)):
            lines.append(f"{path} = {flops} must be above 0 (leave it out if it is unknown)")
    return lines


def _mistakes(owner: object, prefix: str, ranges: dict[str, _Range]) -> list[str]:
    values: dict[str, Any] = {path: reduce(getattr, path.split("."), owner) for path in ranges}
    return [
        f"{prefix}{path} = {values[path]} {rule}" for path, (rule, holds) in ranges.items() if not holds(values[path])
    ]


def _rope_scaling_mistakes(scaling: RopeScaling) -> list[str]:
    """The wavelengths that keep their frequency end below those that are scaled in full."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if high > low:
        return []
    return [f"model.rope_scaling.high_freq_factor = {high} must be above model.rope_scaling.low_freq_factor = {low}"]


def _name_mistakes(name: str) -> list[str]:
    """The name of a job is the name of its run folder."""
    if name and name not in (".", "..") and not set(name) & set("/\\\0"):
        return []
    return [f'name = "{name}" cannot name a run folder: use letters, digits, dots and dashes']

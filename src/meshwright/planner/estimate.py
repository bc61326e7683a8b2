"""Seconds of a step from its account: its trace on the timeline of `planner.timeline`, with the job's figures.

    matmul, attention   FLOPs / (efficiency · peak FLOP/s of the device at the precision)
    anything else       bytes touched / memory bandwidth; nothing where that is not known
    a collective        `planner.wire`, times what the backend is known to send beside the convention

A step whose device has no published peak, or whose links have no bandwidth, has no time: no number is better than a
wrong one.

MFU (model FLOP utilisation, Chowdhery et al. 2022, appendix B) is defined here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from meshwright.account import EXACT_KINDS, Compute, Issue, LedgerKey, StepAccount, Timeline
from meshwright.config.backends import backend_of
from meshwright.config.tree import Device, Job, Layout
from meshwright.planner.flops import forward_flops
from meshwright.planner.timeline import Transfer, simulate
from meshwright.planner.wire import Algorithm, collective_seconds, link, named_tier, tier


def estimate(account: StepAccount, job: Job, *, algorithm: Algorithm = "ring", with_spans: bool = True) -> StepAccount:
    """The account with its timeline filled in; empty where a peak or a bandwidth that it needs is not known."""
    timeline = Timeline()
    if is_timed(account, job):
        timeline = simulate(account.trace, JobCosts.of(job, algorithm), with_spans=with_spans)
    return replace(account, time_model="timeline", timeline=timeline)


def is_timed(account: StepAccount, job: Job) -> bool:
    """Whether every figure that the time of the step needs is known."""
    if job.training.precision not in job.cluster.device.peak_flops:
        return False
    groups = {(key.axis, key.group_size) for key in account.ledger.rows}
    return all(link(axis, size, job.layout, job.cluster).bandwidth for axis, size in groups)


@dataclass(frozen=True)
class JobCosts:
    """How long things take on a job's cluster (`timeline.Costs`)."""

    job: Job
    flops_per_second: float
    algorithm: Algorithm

    @classmethod
    def of(cls, job: Job, algorithm: Algorithm = "ring") -> JobCosts:
        """Of a job whose device has a known peak."""
        device = job.cluster.device
        return cls(job, device.efficiency * device.peak_flops[job.training.precision], algorithm)

    def compute_seconds(self, event: Compute) -> float:
        """One operation alone."""
        if event.kind in EXACT_KINDS:
            return event.flops / self.flops_per_second
        bandwidth = self.job.cluster.device.memory_bandwidth
        return event.bytes / bandwidth if bandwidth else 0.0

    def transfer(self, event: Issue) -> Transfer:
        """One collective alone. All axes of a tier share the rank's link of that tier."""
        layout, cluster = self.job.layout, self.job.cluster
        key = LedgerKey(*event[:3], event.phase, event.site, event.dtype, event.payload_bytes)
        over = tier(event.axis, event.group_size, layout, cluster)
        lane = event.axis if named_tier(event.axis) else f"{event.axis}:{over}"
        backend = backend_of(self.job.training.device)
        return Transfer(lane, over, collective_seconds(key, layout, cluster, backend=backend, algorithm=self.algorithm))


# --- utilisation ------------------------------------------------------------------------------------------------------


def model_flops(job: Job) -> int:
    """A rank's share of the FLOPs that the model itself needs in a step: three times the forward's matrix products.

    Backward is twice forward: a gradient for each of the two inputs of a product. They are those of one device over
    the number of ranks, attention's whole score matrix included, so that no layout changes them: not copies of
    key-value heads, blocks that a ring leaves out, padding, nor what is computed a second time to save memory. Nor does
    an attention kernel: one that skips what the mask hides has a higher utilisation, for it is faster.
    """
    single = replace(job, layout=Layout(), training=replace(job.training, accumulation=1, attention="sdpa"))
    return 3 * forward_flops(single) // job.layout.world


def mfu(model_flops: int, step_seconds: float | None, device: Device | None, precision: str) -> float | None:
    """Model FLOPs over what the peak allows in the same time; None where time, device or peak is not known."""
    peak = device.peak_flops.get(precision) if device is not None else None
    return model_flops / (step_seconds * peak) if peak and step_seconds else None

"""What the timeline says of a subject beforehand: its trace, priced with constants that know nothing of overlap.

    links     α and β of single calls of a few sizes at the setting's rate (`bench.fit`), one after the other
    memory    bytes a second of a copy
    compute   the FLOPs of `compute` over its seconds, less what memory takes: one rate for each problem

Nothing is fitted to a subject that overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from meshwright.account import EXACT_KINDS, Compute, Trace
from meshwright.bench.fit import Fit, fit
from meshwright.config.tree import Cluster, Device, Job, Layout, Link
from meshwright.planner.estimate import JobCosts
from meshwright.planner.overlap import resolve
from meshwright.planner.timeline import simulate


class Predicted(NamedTuple):
    """Of one step of a subject."""

    seconds: float
    exposed: float


@dataclass(frozen=True)
class Constants:
    """What a setting's clocks gave: of its links, and of its ranks' arithmetic and memory."""

    link: Fit
    flops_per_second: float
    memory_bandwidth: float

    def price(self, trace: Trace, job: Job) -> Predicted:
        """Seconds of a trace of the job."""
        found = simulate(trace, JobCosts.of(self._on_cluster(job)), with_spans=False)
        assert found.step_seconds is not None
        return Predicted(found.step_seconds, sum(found.exposed.values()))

    def auto(self, job: Job) -> Layout:
        """What `overlap = "auto"` makes of the job: chosen by formula, before anything has run."""
        return resolve(self._on_cluster(replace(job, layout=replace(job.layout, overlap="auto")))).layout

    def _on_cluster(self, job: Job) -> Job:
        """With these figures, a rank a host."""
        device = Device(
            kind="cpu",
            peak_flops={job.training.precision: self.flops_per_second},
            memory_bandwidth=self.memory_bandwidth,
            efficiency=1.0,
        )
        inter = Link(latency_seconds=self.link.latency_seconds, bandwidth=self.link.bandwidth)
        cluster = Cluster(device=device, hosts=job.layout.world, devices_per_host=1, inter=inter)
        return replace(job, cluster=cluster)


def rates(trace: Trace, seconds: float, memory_bandwidth: float) -> tuple[float, float]:
    """FLOPs a second, and bytes a second, at which the computations of a trace take so long.

    A copy of something large is slower than what is in a cache: memory is given at most half of the time.
    """
    computed = [event for event in trace.expanded() if isinstance(event, Compute)]
    flops = sum(event.flops for event in computed if event.kind in EXACT_KINDS)
    touched = sum(event.bytes for event in computed if event.kind not in EXACT_KINDS)
    memory = min(touched / memory_bandwidth, seconds / 2)
    return flops / (seconds - memory), touched / memory if memory else memory_bandwidth


def fitted(points: Sequence[tuple[float, float]], link_bytes_per_second: float) -> Fit:
    """The constants of calls by wire bytes and seconds; of points that tell none, those of the link."""
    return fit(points, link_bytes_per_second) or Fit(0.0, link_bytes_per_second, ())

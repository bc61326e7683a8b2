"""Seconds of a step from its account, by the plainest model there is: the sum of its parts, nothing overlapped.

    compute        FLOPs / (0.5 · peak FLOP/s of the device at the precision)
    communication  Σ count · (latency + wire bytes / bandwidth), over the links of the row's tier

Half of the peak is what large matrix products reach in practice; memory-bound operations are not counted apart. A step
whose device has no published peak, or whose links have no bandwidth, has no time: no number is better than a wrong one.

MFU (model FLOP utilisation, Chowdhery et al. 2022, appendix B) is defined here and nowhere else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from meshwright.account import Span, StepAccount, Timeline
from meshwright.config.tree import Device, Job, Layout, Link
from meshwright.planner.flops import EFFICIENCY, forward_flops
from meshwright.planner.wire import call_seconds, tier

PHASES = ("forward", "recompute", "backward", "optimiser")
COMPUTE_LANE = "compute"


def estimate(account: StepAccount, job: Job) -> StepAccount:
    """The account with its timeline filled in; empty where a peak or a bandwidth that it needs is not known."""
    costs = _costs(account, job)
    return replace(account, time_model="sum", timeline=_timeline(costs) if costs is not None else Timeline())


@dataclass(frozen=True)
class _Cost:
    lane: str
    axis: str
    name: str
    phase: str
    seconds: float


def _costs(account: StepAccount, job: Job) -> list[_Cost] | None:
    """What takes time, in the order of the phases; None where a figure is missing."""
    flops = {phase: account.work.flops(phase=phase) for phase in PHASES}
    peak = job.cluster.device.peak_flops.get(job.training.precision)
    if peak is None:
        return None
    sent: dict[tuple[str, str, str, str], float] = defaultdict(float)
    for key, count in account.ledger.rows.items():
        where = tier(key.axis, key.group_size, job.layout, job.cluster)
        over: Link = getattr(job.cluster, where)
        if not over.bandwidth:
            return None
        sent[f"{key.axis}:{where}", key.axis, key.operation, key.phase] += count * call_seconds(key, over)
    computed = [_Cost(COMPUTE_LANE, "", "compute", phase, n / (EFFICIENCY * peak)) for phase, n in flops.items() if n]
    costs = computed + [_Cost(*place, seconds) for place, seconds in sorted(sent.items())]
    return sorted(costs, key=lambda cost: PHASES.index(cost.phase))


def _timeline(costs: list[_Cost]) -> Timeline:
    exposed: dict[tuple[str, str], float] = defaultdict(float)
    for cost in costs:
        if cost.axis:
            exposed[cost.axis, cost.phase] += cost.seconds
    spans = tuple(_tiles(costs))
    computing = sum(cost.seconds for cost in costs if not cost.axis)
    return Timeline(spans[-1].end_seconds if spans else 0.0, dict(exposed), computing, spans)


def _tiles(costs: list[_Cost]) -> Iterator[Span]:
    """One after another: together they fill the step."""
    now = 0.0
    for cost in costs:
        yield Span(cost.lane, cost.name, cost.phase, "", now, now + cost.seconds)
        now += cost.seconds


# --- utilisation ------------------------------------------------------------------------------------------------------


def model_flops(job: Job) -> int:
    """A rank's share of the FLOPs that the model itself needs in a step: three times the forward's matrix products.

    Backward is twice forward: a gradient for each of the two inputs of a product. They are those of one device over
    the number of ranks, attention's whole score matrix included, so that no layout changes them: not copies of
    key-value heads, blocks that a ring leaves out, padding, nor what is computed a second time to save memory.
    """
    single = replace(job, layout=Layout(), training=replace(job.training, accumulation=1))
    return 3 * forward_flops(single) // job.layout.world


def mfu(model_flops: int, step_seconds: float | None, device: Device | None, precision: str) -> float | None:
    """Model FLOPs over what the peak allows in the same time; None where time, device or peak is not known."""
    peak = device.peak_flops.get(precision) if device is not None else None
    return model_flops / (step_seconds * peak) if peak and step_seconds else None

"""Why a layout is as it is, in one sentence that its figures back."""

from __future__ import annotations

from dataclasses import replace

from meshwright.account import StepAccount
from meshwright.config.tree import Job
from meshwright.planner.estimate import COMPUTE_LANE
from meshwright.planner.step import heaviest
from meshwright.units import format_bytes

_TIERS = {"intra": "inside a host", "inter": "between hosts"}
_NEGLIGIBLE = 0.005


def why(account: StepAccount, job: Job, missing_bytes: int | None) -> str:
    """What is missing and what takes the room, if it does not fit; then what the step spends its time on."""
    return "; ".join(part for part in (_room(account, job, missing_bytes), _time(account, job)) if part)


def notes(job: Job, devices: int) -> tuple[str, ...]:
    """What was assumed of the cluster, and what an option of the legal job, the best of those priced, is worth."""
    cluster, found = job.cluster, []
    if devices > cluster.devices:
        hosts = -(-devices // cluster.devices_per_host)
        found.append(
            f"{devices} devices need {hosts} hosts and cluster {cluster.name} has {cluster.hosts}: hosts are added"
        )
    if job.model.block == "ffn":
        found.append("the model is two linear layers a block: no attention, vocabulary or loss is priced")
    elif job.layout.recompute == "selective":
        found.append(_selective(job))
    return tuple(found)


def _selective(job: Job) -> str:
    """What selective recomputation saves and costs: little saved, as fused kernels keep no scores anyhow."""
    selective = heaviest(job)
    none = heaviest(replace(job, layout=replace(job.layout, recompute="none")))
    activations = none.footprint.bytes["saved_activations"]
    saved = activations - selective.footprint.bytes["saved_activations"]
    again = selective.work.flops(phase="recompute")
    return (
        f"selective recomputation saves {format_bytes(saved)} of {format_bytes(activations)} of activations, because "
        f"the fused attention kernel keeps no scores anyhow, for {again / none.work.flops():.0%} more FLOPs"
    )


def _room(account: StepAccount, job: Job, missing_bytes: int | None) -> str:
    if not missing_bytes:
        return ""
    footprint, device = account.footprint, job.cluster.device
    largest = max(footprint.bytes, key=lambda category: footprint.bytes[category])
    return (
        f"needs {format_bytes(missing_bytes)} more than the {format_bytes(device.memory_bytes)} of {device.name}, and "
        f"{largest.replace('_', ' ')} take {format_bytes(footprint.bytes[largest])} of it"
    )


def _time(account: StepAccount, job: Job) -> str:
    """Shares of the step by lane, the largest first."""
    total = account.timeline.step_seconds
    if total is None:
        peak = job.cluster.device.peak_flops.get(job.training.precision)
        missing = "link bandwidth" if peak else f"{job.training.precision} peak of {job.cluster.device.name}"
        return f"no time, as the {missing} is not known"
    lanes: dict[str, float] = {}
    for span in account.timeline.spans:
        lanes[span.lane] = lanes.get(span.lane, 0.0) + span.end_seconds - span.start_seconds
    shares = sorted(((seconds / total, lane) for lane, seconds in lanes.items()), reverse=True)
    shown = [f"{share:.0%} {_lane(lane)}" for share, lane in shares if share >= _NEGLIGIBLE]
    return f"the step is {', '.join(shown)}" if shown else ""


def _lane(lane: str) -> str:
    if lane == COMPUTE_LANE:
        return "compute"
    axis, _, tier = lane.rpartition(":")
    return f"{axis} traffic {_TIERS[tier]}"

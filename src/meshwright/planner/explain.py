"""Why a layout is as it is, in one sentence that its figures back."""

from __future__ import annotations

from dataclasses import replace

from meshwright.account import COMPUTE_LANE, StepAccount
from meshwright.config.attention import chosen_attention
from meshwright.config.tree import Job
from meshwright.planner.step import heaviest
from meshwright.planner.wire import tier
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
    attention = chosen_attention(job.model, job.training)
    if job.training.attention == "auto" and job.model.block == "decoder":
        found.append(f"training.attention = auto takes {attention}")
    if job.model.block == "ffn":
        found.append("the model is two linear layers a block: no attention, vocabulary or loss is priced")
    elif job.layout.recompute == "selective":
        found.append(_selective(job, keeps_scores=attention.kernel == "naive" and job.layout.ring == 1))
    return tuple(found)


def _selective(job: Job, *, keeps_scores: bool) -> str:
    """What selective recomputation saves and costs: little saved, where kernels keep no scores anyhow."""
    selective = heaviest(job)
    none = heaviest(replace(job, layout=replace(job.layout, recompute="none")))
    activations = none.footprint.bytes["saved_activations"]
    saved = activations - selective.footprint.bytes["saved_activations"]
    again = selective.work.flops(phase="recompute")
    because = "" if keeps_scores else ", because the fused attention kernel keeps no scores anyhow"
    return (
        f"selective recomputation saves {format_bytes(saved)} of {format_bytes(activations)} of activations{because}, "
        f"for {again / none.work.flops():.0%} more FLOPs"
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
    """Shares of the step: compute, what waits for each axis and tier, and the rest, the largest first."""
    timeline, total = account.timeline, account.timeline.step_seconds
    if total is None:
        peak = job.cluster.device.peak_flops.get(job.training.precision)
        missing = "link bandwidth" if peak else f"{job.training.precision} peak of {job.cluster.device.name}"
        return f"no time, as the {missing} is not known"
    parts = {COMPUTE_LANE: timeline.compute_seconds or 0.0, "idle": timeline.idle_seconds or 0.0}
    parts |= {f"exposed {_traffic(axis, account, job)}": s for axis, s in timeline.exposed_seconds.items()}
    shares = sorted(((seconds / total, what) for what, seconds in parts.items()), reverse=True) if total else []
    shown = [f"{share:.0%} {what}" for share, what in shares if share >= _NEGLIGIBLE]
    return f"the step is {', '.join(shown)}" if shown else ""


def _traffic(axis: str, account: StepAccount, job: Job) -> str:
    """Of an axis, and where most of its bytes go."""
    sent = {"intra": 0, "inter": 0}
    for key, count in account.ledger.rows.items():
        if key.axis == axis:
            sent[tier(axis, key.group_size, job.layout, job.cluster)] += count * key.wire_bytes
    where = _TIERS[max(sent, key=lambda name: sent[name])]
    return f"{axis.removesuffix(':intra').removesuffix(':inter')} traffic {where}"

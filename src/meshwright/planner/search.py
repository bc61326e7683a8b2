"""Which layout for this job: every candidate priced by formula, ranked, and the others with the rule that they break.

Without a number of devices the one candidate is the job's own layout. With one, the candidates are all tensor ×
replicate layouts of that many ranks; a degree that was typed stays as it is. Those that fit come first, the fastest
first (a step without a known time after those with one), then the others, the fewest missing bytes first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meshwright.account import StepAccount
from meshwright.config.attention import chosen_attention
from meshwright.config.legality import Violation, divisors, listed, near_multiples, require_legal
from meshwright.config.tree import AXES, Job, Layout
from meshwright.errors import UserError
from meshwright.planner.estimate import mfu, model_flops
from meshwright.planner.explain import notes, why
from meshwright.planner.overlap import decide, summary

VARIED = ("tensor", "replicate")
"""The axes that a search varies."""


@dataclass(frozen=True)
class Candidate:
    """One legal layout and its account."""

    job: Job
    account: StepAccount
    overlap: str
    """What is cut, and what it is worth, in one line."""

    @property
    def missing_bytes(self) -> int | None:
        """What the device's memory is short of at the peak; None where its memory is not known."""
        memory = self.job.cluster.device.memory_bytes
        return max(0, self.account.footprint.peak - memory) if memory else None

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits into the device; None where its memory is not known."""
        return None if self.missing_bytes is None else self.missing_bytes == 0

    @property
    def step_seconds(self) -> float | None:
        """Predicted time of a step."""
        return self.account.timeline.step_seconds

    @property
    def mfu(self) -> float | None:
        """Predicted model FLOP utilisation."""
        return mfu(model_flops(self.job), self.step_seconds, self.job.cluster.device, self.job.training.precision)

    @property
    def why(self) -> str:
        """One sentence."""
        return why(self.account, self.job, self.missing_bytes)

    def to_json(self) -> dict[str, Any]:
        """The row of `plan --json`; the ledger in full, as in the account."""
        account = self.account.to_json()
        return {
            "layout": {axis: self.job.layout.degree(axis) for axis in AXES},
            "zero": self.job.layout.zero_stage,
            "world": self.job.layout.world,
            "fits": self.fits,
            "missing_bytes": self.missing_bytes,
            "memory_bytes": self.account.footprint.peak,
            "step_seconds": self.step_seconds,
            "mfu": self.mfu,
            "exposed_seconds": account["timeline"]["exposed_seconds"],
            "why": self.why,
            **{key: account[key] for key in ("status", "time_model", "footprint", "work", "ledger", "overlap")},
        }


@dataclass(frozen=True)
class Rejected:
    """One broken rule: how many layouts break it, and the first of them."""

    rule: str
    count: int
    example: str
    fix: str


@dataclass(frozen=True)
class Plan:
    """What `meshwright plan` found."""

    job: Job
    layouts: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As DESIGN.md's command interface fixes it."""
        return {
            "job": self.job.name,
            "cluster": self.job.cluster.name,
            "attention": chosen_attention(self.job.model, self.job.training).to_json(),
            "layouts": [candidate.to_json() for candidate in self.layouts],
            "rejected": [vars(group) for group in self.rejected],
            "notes": list(self.notes),
        }


def plan(job: Job, devices: int | None = None, typed: Collection[str] = (), top: int | None = None) -> Plan:
    """Price a job whose `training.device` is resolved; `typed` holds the axes that must stay, `top` the rows to keep.

    Raises UserError where no candidate is legal, with all the rules that stand in the way.
    """
    if devices is None:
        require_legal(job)
        only = price(job)
        return Plan(job, (only,), (), notes(only.job, job.layout.world))
    legal, broken = [], []
    for layout in candidates(job.layout, devices, typed):
        violations = layout.violations(job.model, job.cluster, job.training)
        broken += violations
        if not violations:
            legal.append(price(replace(job, layout=layout)))
    rejected = _grouped(broken)
    if not legal:
        reasons = (f"no legal layout of {devices} devices: {group.example}: {group.fix}" for group in rejected)
        raise UserError("\n".join(reasons))
    ranked = tuple(sorted(legal, key=_rank)[:top])
    return Plan(job, ranked, rejected, notes(ranked[0].job, devices))


def price(job: Job) -> Candidate:
    """Formula and timeline of a legal job, its overlap chosen if that is left to us."""
    decision = decide(job)
    return Candidate(decision.chosen.job, decision.account(), summary(decision))


def candidates(layout: Layout, devices: int, typed: Collection[str]) -> Iterator[Layout]:
    """Layouts of `devices` ranks that differ from `layout` in the varied axes that were not typed.

    Where a stage of ZeRO was set, ranks that divide the batch shard its states: `shard` is varied, not `replicate`.
    """
    varied = ("tensor", "shard") if layout.zero not in ("auto", 0) else VARIED
    free = [axis for axis in varied if axis not in typed]
    given = {axis: layout.degree(axis) for axis in AXES if axis not in free}
    fixed = math.prod(given.values())
    if devices % fixed or (devices != fixed and not free):
        product = " × ".join(f"{axis} {degree}" for axis, degree in given.items() if degree > 1) or "1"
        rule, legal = (
            ("divisible by", listed(near_multiples(fixed, devices))) if free else ("the product of", str(fixed))
        )
        raise UserError(
            f"--devices {devices} is not {rule} the given degrees, {product} = {fixed}: use --devices {legal}, "
            f"or leave out a degree"
        )
    rest = devices // fixed
    for degree in divisors(rest) if len(free) == 2 else [rest]:
        degrees: dict[str, Any] = dict(zip(free, (degree, rest // degree), strict=False))
        yield replace(layout, **degrees)


def _rank(candidate: Candidate) -> tuple[bool, float, float]:
    seconds = candidate.step_seconds
    return candidate.fits is False, candidate.missing_bytes or 0, math.inf if seconds is None else seconds


def _grouped(violations: Sequence[Violation]) -> tuple[Rejected, ...]:
    """By rule, in the order of first appearance; a message is `example: fix`."""
    by_rule: dict[str, list[Violation]] = {}
    for violation in violations:
        by_rule.setdefault(violation.rule, []).append(violation)
    groups = []
    for rule, found in by_rule.items():
        example, _, fix = found[0].message.rpartition(": ")
        groups.append(Rejected(rule, len(found), example, fix))
    return tuple(groups)

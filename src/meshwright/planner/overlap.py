"""`layout.overlap = auto`: every composition of the rewrite rules priced by the timeline, and the fastest chosen.

The unsplit layout is one of the candidates. Of those that are as fast as the fastest, near enough, the simplest is
chosen, so that nothing is cut for nothing. A candidate that does not fit into memory loses to one that does. Where the
cluster's figures do not tell a time, nothing is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from meshwright.account import StepAccount
from meshwright.config.tree import Job, Layout
from meshwright.planner.blocks import formula_of_blocks
from meshwright.planner.estimate import estimate
from meshwright.planner.step import heaviest
from meshwright.schemes.partition import Candidate, candidates
from meshwright.units import format_seconds

LEAST_GAIN = 0.005
"""Of a step: less than the timeline can tell apart."""

Price = Callable[[Job], StepAccount]


def priced(job: Job) -> StepAccount:
    """Formula and timeline of a legal job."""
    account = formula_of_blocks(job) if job.model.block == "ffn" else heaviest(job)
    return estimate(account, job, with_spans=False)


@dataclass(frozen=True)
class Option:
    """A candidate and its price."""

    job: Job
    rules: tuple[str, ...]
    account: StepAccount

    @property
    def seconds(self) -> float:
        """Of a step; infinite where they are not known."""
        seconds = self.account.timeline.step_seconds
        return math.inf if seconds is None else seconds

    @property
    def exposed_seconds(self) -> float:
        """Of all axes."""
        return sum(self.account.timeline.exposed.values())

    @property
    def fits(self) -> bool:
        """Whether it is not known to exceed the device's memory."""
        memory = self.job.cluster.device.memory_bytes
        return not memory or self.account.footprint.peak <= memory

    def to_json(self) -> dict[str, Any]:
        """A row of the account's `overlap`."""
        return {
            "rules": list(self.rules),
            **options_of(self.job.layout),
            "step_seconds": self.account.timeline.step_seconds,
            "exposed_seconds": self.exposed_seconds,
            "memory_bytes": self.account.footprint.peak,
        }


@dataclass(frozen=True)
class Decision:
    """What was chosen, and from what: the unsplit layout first."""

    chosen: Option
    options: tuple[Option, ...]

    @property
    def unsplit(self) -> Option:
        """Nothing cut."""
        return self.options[0]

    def account(self) -> StepAccount:
        """The chosen one's, with the decision in it."""
        return replace(self.chosen.account, overlap=self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Choice and price, and those of every candidate."""
        return {"chosen": self.chosen.to_json(), "candidates": [option.to_json() for option in self.options]}


def options_of(layout: Layout) -> dict[str, Any]:
    """The options that the rules choose."""
    names = ("overlap", "overlap_chunks", "overlap_ring", "half_batches", "hierarchical", "bucket_mib", "prefetch")
    return {name: getattr(layout, name) for name in names}


def decide(job: Job, price: Price = priced) -> Decision:
    """Price the candidates of a legal job and choose. Of a job whose overlap is given there is one."""
    legal = _legal(job)
    unsplit = _option(job, next(legal), price)
    hidden = unsplit.fits and unsplit.exposed_seconds <= LEAST_GAIN * unsplit.seconds
    if math.isinf(unsplit.seconds) or hidden:
        return Decision(unsplit, (unsplit,))  # nothing is known, or there is nothing to hide
    found = [unsplit, *(_option(job, candidate, price) for candidate in legal)]
    allowed = [option for option in found if option.fits] or found
    enough = min(option.seconds for option in allowed) * (1 + LEAST_GAIN)
    good = [option for option in allowed if option.seconds <= enough]
    return Decision(min(good, key=_complexity), tuple(found))


def _option(job: Job, candidate: Candidate, price: Price) -> Option:
    job = replace(job, layout=candidate.layout)
    return Option(job, candidate.rules, price(job))


def _complexity(option: Option) -> tuple[int, int, float]:
    """Rules, then pieces, then seconds."""
    layout = option.job.layout
    return len(option.rules), layout.overlap_chunks if layout.overlap == "pipelined" else 0, option.seconds


def resolve(job: Job) -> Job:
    """The legal job with its overlap chosen: what runs, is rehearsed and priced."""
    return job if job.layout.overlap != "auto" else decide(job).chosen.job


def _legal(job: Job) -> Iterator[Candidate]:
    if job.layout.overlap != "auto":
        yield Candidate(job.layout, ())
        return
    for candidate in candidates(job.layout):
        if not candidate.layout.violations(job.model, job.cluster, job.training):
            yield candidate


def described(layout: Layout) -> str:
    """The options that the rules choose, where they are not those of an unsplit layout."""
    parts = []
    if layout.overlap == "pipelined":
        around = ", both ways around" if layout.overlap_ring == "bidirectional" else ""
        parts.append(f"products in {layout.overlap_chunks} chunk{'s' * (layout.overlap_chunks > 1)}{around}")
    if layout.half_batches:
        parts.append("half batches")
    if layout.hierarchical:
        parts.append("hierarchical sums")
    if layout.bucket_mib not in ("auto", Layout().bucket_mib):
        parts.append(f"buckets of {layout.bucket_mib:g} MiB")
    if layout.prefetch > 1:
        parts.append(f"{layout.prefetch} units ahead")
    return " + ".join(parts) or "nothing cut"


def summary(decision: Decision) -> str:
    """What was chosen, from how many, and what it is worth, in one line."""
    chosen, unsplit, count = decision.chosen, decision.unsplit, len(decision.options)
    if math.isinf(unsplit.seconds):
        return f"overlap: {described(chosen.job.layout)}; no time is known on this cluster"
    exposed = format_seconds(chosen.exposed_seconds)
    what = f"overlap: {described(chosen.job.layout)}, {format_seconds(chosen.seconds)} a step, {exposed} of it exposed"
    if chosen is unsplit:
        return what + (f" (no better among {count} candidates)" if count > 1 else "")
    return f"{what}; with nothing cut {format_seconds(unsplit.seconds)} ({count} candidates)"

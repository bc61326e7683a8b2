"""Verify a layout: formula, rehearsal and run of every rank against each other, and the run against one device.

A tensor of the run passes if |g - g64| <= 4·|g1 - g64| + 2⁻²²·scale, with |·| the Euclidean norm, g64 one device in
float64, g1 one device in the run's precision. The scale of a gradient is |g64| over all parameters (the gradient of a
key bias is zero in theory, so a plain relative error would judge noise); that of a probe is its own |g64|.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from meshwright.account import Difference, StepAccount, diff_ledgers
from meshwright.config.attention import Attention, AttentionCall, chosen_attention
from meshwright.config.tree import Job, Layout
from meshwright.model.build import assemble, specs_of
from meshwright.schemes.params import ParamSpec
from meshwright.training.shard import local_positions, local_sequences
from meshwright.verify.observe import Observation
from meshwright.verify.probes import Direction
from meshwright.verify.report import FirstDifference, GradientReport, VerifyReport

FACTOR = 4.0
FLOOR = 2.0**-22

_UNIT_ROUNDOFF = {"float32": 2.0**-24, "bf16": 2.0**-9}
_OF_LOGITS = {("activation", "head"), ("gradient", "loss")}
"""Probes that are split over the vocabulary, and never along the sequence over the tensor axis."""


@dataclass(frozen=True)
class References:
    """One device in float64, and in the run's precision."""

    exact: Observation
    same: Observation


def reference_job(job: Job) -> Job:
    """The same job on one device, with torch's attention, or the naive one where torch's does not take the shape.

    Both take float64 on a CPU.
    """
    attention: Attention = "naive" if AttentionCall.of(job.model, job.training).refusals("sdpa") else "sdpa"
    return replace(job, layout=Layout(), training=replace(job.training, attention=attention))


def compare(
    job: Job,
    runs: Sequence[Observation],
    references: References,
    formula: StepAccount,
    rehearsals: Sequence[StepAccount],
) -> VerifyReport:
    """All that `verify` reports, from what every rank and the references observed."""
    accounts = [run.account for run in runs if run.account is not None]
    formula_vs_rehearsal = _ledger_differences([formula] * len(rehearsals), rehearsals)
    rehearsal_vs_run = _ledger_differences(rehearsals, accounts)
    loss_error, _ = _worst_loss(runs, references)
    wrong_loss = _first_loss(job, runs, references)
    gradient_errors = _gradient_errors(job, runs, references)
    first = (
        _first_probe("activation", job, runs, references)
        or wrong_loss
        or _first_probe("gradient", job, runs, references)
        or _first_gradient(gradient_errors)
        or _first_row(formula_vs_rehearsal, rehearsal_vs_run)
    )
    rows = {"formula": formula.ledger, "rehearsal": rehearsals[0].ledger, "run": accounts[0].ledger}
    return VerifyReport(
        world=job.layout.world,
        attention=chosen_attention(job.model, job.training),
        rows={source: len(ledger.rows) for source, ledger in rows.items()},
        formula_vs_rehearsal=tuple(d for _, d in formula_vs_rehearsal),
        rehearsal_vs_run=tuple(d for _, d in rehearsal_vs_run),
        loss_error=loss_error / abs(references.exact.loss),
        loss_passes=wrong_loss is None,
        gradients=_summary(gradient_errors),
        first_difference=first,
    )


# --- ledgers ----------------------------------------------------------------------------------------------------------


def _ledger_differences(a: Sequence[StepAccount], b: Sequence[StepAccount]) -> list[tuple[int, Difference]]:
    return [
        (rank, difference)
        for rank, (first, second) in enumerate(zip(a, b, strict=True))
        for difference in diff_ledgers(first.ledger, second.ledger)
    ]


def _first_row(*differences: list[tuple[int, Difference]]) -> FirstDifference | None:
    for rank, difference in (pair for pairs in differences for pair in pairs):
        return FirstDifference("ledger", difference.site, rank, float(abs(difference.first - difference.second)))
    return None


# --- loss and gradients -----------------------------------------------------------------------------------------------


def _worst_loss(runs: Sequence[Observation], references: References) -> tuple[float, int]:
    """Largest error of a rank's loss, and whose it is."""
    errors = [abs(run.loss - references.exact.loss) for run in runs]
    rank = max(range(len(runs)), key=lambda r: math.inf if math.isnan(errors[r]) else errors[r])
    return errors[rank], rank


def _first_loss(job: Job, runs: Sequence[Observation], references: References) -> FirstDifference | None:
    """None if the loss is within a few roundings of the run's precision on every rank."""
    exact = references.exact.loss
    roundoff = _UNIT_ROUNDOFF[job.training.precision] * abs(exact)
    error, rank = _worst_loss(runs, references)
    excess = _excess(error, FACTOR * max(abs(references.same.loss - exact), roundoff))
    return FirstDifference("loss", "loss", rank, excess) if excess > 1 else None


class _GradientError(NamedTuple):
    parameter: str
    rank: int
    excess: float


def _gradient_errors(job: Job, runs: Sequence[Observation], references: References) -> list[_GradientError]:
    """For each parameter, the rank at which its gradient errs most."""
    exact, same = references.exact.gradients, references.same.gradients
    scale = math.sqrt(sum(_norm(gradient) ** 2 for gradient in exact.values()))
    errors = []
    for spec in specs_of(job):
        g64, g1 = exact[spec.name], same[spec.name]
        allowed = FACTOR * _norm(g1.double() - g64) + FLOOR * scale
        seen = [(_excess(_norm(g.double() - g64), allowed), rank) for rank, g in _assembled(spec, job, runs)]
        excess, rank = max(seen)
        errors.append(_GradientError(spec.name, rank, excess))
    return errors


def _summary(errors: Sequence[_GradientError]) -> GradientReport:
    worst = max(errors, key=lambda error: error.excess)
    failed = tuple(error.parameter for error in errors if error.excess > 1)
    return GradientReport(len(errors), failed, (worst.parameter, worst.excess))


def _first_gradient(errors: Sequence[_GradientError]) -> FirstDifference | None:
    for error in reversed(errors):  # backward meets the last parameter first
        if error.excess > 1:
            return FirstDifference("gradient", error.parameter, error.rank, error.excess)
    return None


def _assembled(spec: ParamSpec, job: Job, runs: Sequence[Observation]) -> Iterator[tuple[int, torch.Tensor]]:
    """The full gradient as each set of ranks that hold it together sees it, by its first rank: none may differ."""
    T = job.layout.tensor
    for start in range(0, len(runs), T):
        parts = [runs[rank].gradients[spec.name] for rank in range(start, start + T)]
        if spec.split is None:
            yield from ((start + t, part) for t, part in enumerate(parts))
        else:
            for copy in range(spec.split.copies):
                yield start + copy, assemble({c: parts[c + copy] for c in range(0, T, spec.split.copies)}, spec)


# --- probes -----------------------------------------------------------------------------------------------------------


def _first_probe(
    direction: Direction, job: Job, runs: Sequence[Observation], references: References
) -> FirstDifference | None:
    """The first module, in the order of the program, at which some rank's probe fails."""
    exact, same = references.exact.probes.values, references.same.probes.values
    for key in exact:
        if key[0] != direction or (key[1] == "loss" and direction == "activation"):
            continue
        errors = [_probe_error(key, job, run, exact[key], same[key]) for run in runs]
        rank = max(range(len(runs)), key=errors.__getitem__)
        if errors[rank] > 1:
            return FirstDifference(direction, key[1], rank, errors[rank])
    return None


def _probe_error(
    key: tuple[Direction, str], job: Job, run: Observation, exact: list[torch.Tensor], same: list[torch.Tensor]
) -> float:
    """Largest error over its allowance among the micro-batches; infinite where the run has no such probe."""
    own = run.probes.values.get(key, [])
    if len(own) != len(exact):
        return math.inf
    per_micro_batch = job.training.batch // job.training.accumulation
    held, columns = _own_tokens(key, job, run.coordinates)
    worst = 0.0
    for a, sequences in enumerate(local_sequences(job, run.coordinates)):
        rows = slice(sequences.start - a * per_micro_batch, sequences.stop - a * per_micro_batch)
        probe, p64, p1 = own[a].cpu()[:, held], exact[a][rows, columns], same[a][rows, columns]
        if _is_of_logits(key, job):
            start, end = _own_columns(job, run.coordinates["tensor"])
            probe, p64, p1 = probe[..., : end - start], p64[..., start:end], p1[..., start:end]
        allowed = FACTOR * _norm(p1.double() - p64) + FLOOR * _norm(p64)
        worst = max(worst, _excess(_norm(probe.double() - p64), allowed))
    return worst


def _own_tokens(key: tuple[Direction, str], job: Job, coordinates: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens of a rank's probe are not padding, and their positions in the sequence."""
    layout, seq_len = job.layout, job.training.seq_len
    positions = local_positions(layout, seq_len, coordinates)
    if layout.sequence_parallel and not _is_of_logits(key, job):
        positions = positions.chunk(layout.tensor)[coordinates["tensor"]]
    held = torch.nonzero(positions < seq_len).flatten()
    return held, positions[held]


def _is_of_logits(key: tuple[Direction, str], job: Job) -> bool:
    return key in _OF_LOGITS and not job.training.loss_chunk  # in chunks, the loss is given the head's input


def _own_columns(job: Job, coordinate: int) -> tuple[int, int]:
    columns = -(-job.model.vocab_size // job.layout.tensor)
    start = min(coordinate * columns, job.model.vocab_size)
    return start, min(start + columns, job.model.vocab_size)


def _excess(error: float, allowed: float) -> float:
    """Error over what is allowed; infinite for what is not a number."""
    if math.isnan(error) or math.isnan(allowed):
        return math.inf
    return error / allowed if allowed else (math.inf if error else 0.0)


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))

"""One rank's program: join the others, try what was cut, build the model, take the steps, audit the second, evaluate.

Rank 0 reports (`training.progress`); what it does besides is seen by no collective, so all ranks take the same steps.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch

from meshwright.comm.exposed import WaitClock
from meshwright.comm.mesh import World
from meshwright.config.tree import Job, Layout
from meshwright.errors import UserError
from meshwright.model.decoder import Norm
from meshwright.parallel.loss import IGNORE
from meshwright.training import trial
from meshwright.training.data import Text
from meshwright.training.group import from_rank_0, joined
from meshwright.training.process import Place, leave_if_asked
from meshwright.training.progress import Outcome, Report
from meshwright.training.run_folder import RunFolder
from meshwright.training.schedule import set_learning_rate
from meshwright.training.step import State, audited_step, step

AUDITED_STEP = 1
"""The second step: optimiser states exist."""


def run(job: Job, place: Place, folder: RunFolder | None) -> None:
    """Train a checked job to its end on this rank. Collective. Rank 0 brings the folder, the others learn it.

    The layout is that of the folder: what `overlap = auto` became was decided once, by who prepared.
    """
    text = Text.open(job, place.rank)  # before joining: who cannot read it says so while nobody waits in a collective
    with joined(job, place) as world:
        folder, layout, fallback = _same_for_all(folder, text, world)
        job = replace(job, layout=layout)
        if fallback is not None:
            job = trial.settled(job, fallback, folder, text, world, lambda one: _create(one, world))
        state = _create(job, world)
        report = Report(job, folder, world.device) if world.rank == 0 else None
        with report or nullcontext():
            for index in range(job.training.steps):
                leave_if_asked()
                outcome = _timed_step(index, state, text, world, report)
                if report is not None:
                    report.step(outcome)
        state.states.settle()
        if report is not None:
            report.close()


def _create(job: Job, world: World) -> State:
    """The initial state. Collective.

    Norms may be compiled; everything that communicates stays eager, so the ledger is the same. Under a recorder torch
    runs eagerly what was compiled: the audited step is the eager one.
    """
    state = State.create(job, world)
    if job.training.compile:
        for module in state.model.modules():
            if isinstance(module, Norm):
                module.compile()
    return state


class _Prepared(NamedTuple):
    """What rank 0 found prepared."""

    folder: RunFolder
    layout: Layout
    fallback: Layout | None


def _same_for_all(folder: RunFolder | None, text: Text, world: World) -> _Prepared:
    """Rank 0's folder, and the layouts in it, on every rank, once all read the same text: else each would train on a
    batch of its own."""
    prepared = None
    if world.rank == 0:
        assert folder is not None
        prepared = _Prepared(folder, folder.layout(), folder.fallback.layout() if folder.fallback.exists() else None)
    prepared, fingerprint = from_rank_0((prepared, text.corpus.fingerprint), world)
    assert prepared is not None
    if fingerprint != text.corpus.fingerprint:
        raise UserError(
            f"training.data = {text.corpus.name} on rank {world.rank} is other text than on rank 0, of "
            f"{text.corpus.num_bytes} bytes (all ranks must read the same): give every host the same files"
        )
    return prepared


def _timed_step(index: int, state: State, text: Text, world: World, report: Report | None) -> Outcome:
    """One step from reading its data to knowing its loss; then, outside the clock, the evaluation that may be due."""
    training = state.job.training
    rate = set_learning_rate(state.optimiser, training, index)
    account = None
    began = time.perf_counter()
    batch = text.batch(index, world.device)
    with WaitClock(world.device) as clock:
        if report is not None and index == AUDITED_STEP:
            result, account = audited_step(state, batch, world)
        else:
            result = step(state, batch, world)
    loss, grad_norm = float(result.loss), float(result.grad_norm)  # waits for the device
    seconds = time.perf_counter() - began
    if report is not None and account is not None:
        report.audited(account)
    due = index + 1 == training.steps or (training.heldout_every and (index + 1) % training.heldout_every == 0)
    heldout_loss = evaluate(state, text, world) if due else None
    return Outcome(
        index + 1, loss, grad_norm, rate, seconds, clock.started_seconds - began, clock.reading(), heldout_loss
    )


@torch.no_grad()
def evaluate(state: State, text: Text, world: World) -> float:
    """Mean token loss over the held-out sequences, in nats: the same for every layout. Collective."""
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)
    for batch in text.heldout(world.device):
        totals[0] += state.model(
            batch.tokens[0], batch.labels[0], batch.positions, None if batch.first is None else batch.first[0]
        )
        totals[1] += (batch.labels != IGNORE).sum()
    total, count = world.gradient_axis.all_reduce(totals, site="heldout", phase="control").wait().tolist()
    return total / count

"""Rehearse a job: build everything for one rank, take a real step on fake tensors, and account for it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from meshwright.account import StepAccount
from meshwright.audit.recorder import Recorder
from meshwright.comm.mesh import World
from meshwright.config.tree import Job
from meshwright.model.decoder import Decoder
from meshwright.rehearsal.fake_world import fake_group, fake_tensors
from meshwright.training.step import Batch, State, step

MICRO_BATCHES = 3
"""The first of a step differs from the second (it touches the batch first); those between second and last are equal."""


def rehearse_job(
    job: Job,
    rank: int = 0,
    instrument: Callable[[Decoder, World], None] | None = None,
    *,
    every_micro_batch: bool = False,
) -> StepAccount:
    """The account of a step, as the second of a run, of a legal job whose `training.device` is resolved, on one rank.

    `instrument` changes the model first, as it would that of a run (see `verify`). Of a long accumulation three
    micro-batches are executed and the middle one stands for the rest; `every_micro_batch` executes them all.
    """
    executed = job.training.accumulation if every_micro_batch else min(job.training.accumulation, MICRO_BATCHES)
    with fake_group(job.layout.world, rank):
        world = World.create(job.layout, torch.device("cpu"))
        with fake_tensors():
            state = State.create(job, world, values_of=None, instrument=instrument)
            batch = _empty_batch(job, executed)
            state.optimiser.step()  # all that a first step leaves behind is the optimiser's states
            recorder = Recorder()
            state.model.register_forward_pre_hook(lambda *_: recorder.mark())
            with recorder:
                step(state, batch, world)
        trace = recorder.trace(repeat=1 + job.training.accumulation - executed)
        return StepAccount.of(trace, source="rehearsed", rank=rank, world=job.layout.world, job=job.name)


def _empty_batch(job: Job, executed: int) -> Batch:
    """Storage of the whole batch, and a view of the micro-batches that are executed."""
    training = job.training
    shape = (
        training.accumulation,
        training.batch // (job.layout.batch_ranks * training.accumulation),
        job.layout.padded(training.seq_len) // (job.layout.ring * job.layout.ulysses),
    )
    attended = (*shape[:2], shape[2] * job.layout.ulysses)
    return Batch(
        torch.empty(shape, dtype=torch.int64)[:executed],
        torch.empty(shape, dtype=torch.int64)[:executed],
        torch.empty(shape[-1], dtype=torch.int64),
        torch.empty(attended, dtype=torch.int64)[:executed] if training.documents == "separate" else None,
    )

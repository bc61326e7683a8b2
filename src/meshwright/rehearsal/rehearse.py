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


def rehearse_job(job: Job, rank: int = 0, instrument: Callable[[Decoder, World], None] | None = None) -> StepAccount:
    """The account of a step, as the second of a run, of a legal job whose `training.device` is resolved, on one rank.

    `instrument` changes the model first, as it would that of a run (see `verify`).
    """
    with fake_group(job.layout.world, rank):
        world = World.create(job.layout, torch.device("cpu"))
        with fake_tensors():
            state = State.create(job, world, materialise=False)
            if instrument is not None:
                instrument(state.model, world)
            batch = _empty_batch(job)
            state.optimiser.step()  # all that a first step leaves behind is the optimiser's states
            with Recorder() as recorder:
                step(state, batch, world)
        return StepAccount.of(recorder.trace(), source="rehearsed", rank=rank, world=job.layout.world, job=job.name)


def _empty_batch(job: Job) -> Batch:
    training = job.training
    shape = (
        training.accumulation,
        training.batch // (job.layout.batch_ranks * training.accumulation),
        training.seq_len // (job.layout.ring * job.layout.ulysses),
    )
    return Batch(
        torch.empty(shape, dtype=torch.int64),
        torch.empty(shape, dtype=torch.int64),
        torch.empty(shape[-1], dtype=torch.int64),
    )

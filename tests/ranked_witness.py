"""Run on the ranks of a lab: make a job ready, then take one step of it, so that what it sends can be read outside."""

from __future__ import annotations

import torch

from meshwright.account import Ledger
from meshwright.comm.mesh import World
from meshwright.config.tree import Job
from meshwright.training.step import State, audited_step, step
from meshwright.verify.observe import own_batch

_ready = {}


def prepare(job: Job) -> Ledger:
    """Take two steps; the ledger of the second."""
    world = World.create(job.layout, torch.device("cpu"))
    state, batch = State.create(job, world), own_batch(job, world.rank)
    step(state, batch, world)
    _, account = audited_step(state, batch, world)
    state.states.settle()
    _ready.clear()
    _ready[job.name] = state, batch, world
    return account.ledger


def step_once(job: Job) -> None:
    """One more step, and nothing else on the wire."""
    state, batch, world = _ready[job.name]
    step(state, batch, world)
    state.states.settle()

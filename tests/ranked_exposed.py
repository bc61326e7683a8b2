"""Run on ranks: steps of the training loop, timed as it times them."""

from __future__ import annotations

import torch

from meshwright.account import Issue, Wait
from meshwright.comm.mesh import World
from meshwright.config.tree import Job
from meshwright.training.data import Text
from meshwright.training.loop import _timed_step
from meshwright.training.progress import Outcome
from meshwright.training.step import State, audited_step


def timed_steps(job: Job, count: int) -> tuple[list[Outcome], set[tuple[str, str]]]:
    """So many steps after one that warms up; and of one more what the recorder sees waited for, by axis and phase."""
    world = World.create(job.layout, torch.device("cpu"))
    text, state = Text.open(job, world.rank), State.create(job, world)
    outcomes = [_timed_step(index, state, text, world, None) for index in range(count + 1)]
    _, account = audited_step(state, text.batch(count + 1, world.device), world)
    state.states.settle()
    events = list(account.trace.expanded())
    axes = {event.ticket: event.axis for event in events if isinstance(event, Issue)}
    return outcomes[1:], {(axes[event.ticket], event.phase) for event in events if isinstance(event, Wait)}

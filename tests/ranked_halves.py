"""Blocks in half-batches as one rank runs them (importable by name)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import ranked_tensor as ranked
import torch
from ranked_tensor import SITE, Outcome

from meshwright.comm.mesh import World
from meshwright.config.tree import Job
from meshwright.parallel import halves
from meshwright.parallel.halves import Crossing, Half, ModuleShares, Stages
from meshwright.parallel.sequence import Region
from meshwright.training.step import State, forward_backward
from meshwright.verify.observe import own_batch


def branch(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, bias: torch.Tensor, crossing: Crossing) -> Stages:
    """A column-parallel layer, a sine, and a row-parallel layer with a bias."""
    x = halves.begin(x, crossing, SITE)
    yield
    (h,) = halves.column_linear(x, [up], [None], crossing, SITE)
    h = h.sin()
    yield
    y = halves.row_linear(h, down, crossing, SITE)
    yield
    return halves.finish(y, bias, crossing, SITE)


def block(x: torch.Tensor, parameters: Sequence[torch.Tensor], dy: torch.Tensor, split: bool) -> Outcome:
    """Two such branches with residuals, in half-batches: y, then dx and the gradients of up, down and bias of each."""
    region, count = Region(ranked.axis(), split), min(2, len(x))

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        shares = [ModuleShares(count), ModuleShares(count)]

        def enter(x: torch.Tensor, half: int, index: int) -> tuple[Half, torch.Tensor]:
            own = parameters[3 * index : 3 * index + 3]
            return Half(branch(x, *own, Crossing.of(region, shares[index])), SITE), x

        return halves.interleaved(x, count, enter, lambda half, _: half.finish())

    dims = (0, 1, None) * 2
    own = [p if dim is None else ranked.own(p, dim) for p, dim in zip(parameters, dims, strict=True)]
    return ranked.recorded(run, [ranked.outside(x, split), *own], [ranked.outside(dy, split)])


def gradients(job: Job) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and this rank's gradients of a step."""
    world = World.create(job.layout, torch.device("cpu"))
    state = State.create(job, world)
    loss = forward_backward(state, own_batch(job, world.rank), world)
    return float(loss), {spec.name: state.states.whole_gradient(spec).clone() for spec in state.specs}


def loss_of_any_batch(job: Job, batch: int) -> tuple[float, float]:
    """Losses without gradients, as an evaluation computes them, of a batch that may be odd: in halves, and whole."""
    world = World.create(job.layout, torch.device("cpu"))
    losses = []
    for halved in (True, False):
        own = replace(job, layout=replace(job.layout, half_batches=halved))
        state = State.create(own, world)
        tokens, labels, positions, _ = own_batch(replace(own, training=replace(job.training, batch=batch)), world.rank)
        with torch.no_grad():
            losses.append(float(state.model(tokens[0], labels[0], positions)))
    return losses[0], losses[1]

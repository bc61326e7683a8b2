"""Training runs that ranks make for the tests of loss curves and of initial weights (importable by name)."""

from __future__ import annotations

import math

import torch

from meshwright.account import Memory
from meshwright.audit.recorder import Recorder
from meshwright.comm.mesh import World
from meshwright.config.tree import Job
from meshwright.model.build import assemble, build, specs_of
from meshwright.parallel.loss import IGNORE
from meshwright.training.shard import shard_batch
from meshwright.training.step import Batch, State, step
from meshwright.verify.observe import global_batch

CPU = torch.device("cpu")


def losses(job: Job, steps: int, labelled: int | None = None) -> list[float]:
    """The losses of so many steps on one repeated batch, of which only the first tokens may be `labelled`."""
    world = World.create(job.layout, CPU)
    state = State.create(job, world)
    batch = _batch(job, world, labelled)
    return [float(step(state, batch, world).loss) for _ in range(steps)]


def num_labels(job: Job, labelled: int | None = None) -> int:
    """Labels of this rank's part of that batch."""
    return int((_batch(job, World.create(job.layout, CPU), labelled).labels != IGNORE).sum())


def _batch(job: Job, world: World, labelled: int | None) -> Batch:
    tokens, labels = global_batch(job)
    if labelled is not None:
        labels = tokens.roll(-1, dims=1)
        labels[:, labelled:] = IGNORE
    return shard_batch(tokens, labels, job, job.layout.coordinates(world.rank))


def local_parameters(job: Job) -> dict[str, torch.Tensor]:
    """This rank's slices."""
    model = build(job, World.create(job.layout, CPU))
    return {spec.name: model.get_parameter(spec.name).detach() for spec in specs_of(job)}


def full_parameters(job: Job) -> dict[str, torch.Tensor]:
    """The parameters of one device."""
    return local_parameters(job)


def assembled(job: Job, parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Full parameters from the slices of the first tensor group."""
    T = job.layout.tensor
    return {spec.name: assemble({t: parts[t][spec.name] for t in range(T)}, spec) for spec in specs_of(job)}


def memory_of_building(job: Job) -> tuple[int, int, int]:
    """Peak bytes while a model is built, bytes of this rank's parameters, and bytes of the largest full parameter."""
    world = World.create(job.layout, CPU)
    with Recorder() as recorder:
        build(job, world)
    level = peak = 0
    for event in recorder.trace().expanded():
        if isinstance(event, Memory):
            level += event.delta_bytes
            peak = max(peak, level)
    specs = specs_of(job)
    return peak, 4 * sum(spec.local_numel for spec in specs), 4 * max(math.prod(spec.shape) for spec in specs)

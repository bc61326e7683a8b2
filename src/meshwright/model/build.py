"""Make a decoder's parameters from their specs: same seed, same full weights, whatever the layout.

A rank draws each parameter whole, keeps its slice and goes on to the next: it never holds more than one full parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from meshwright.comm.mesh import World
from meshwright.config.tree import Job
from meshwright.model.decoder import Decoder
from meshwright.schemes.params import ParamSpec, param_specs

Values = Callable[[ParamSpec, int], torch.Tensor]
"""The full parameter by its spec and the run's seed."""

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def initial_values(spec: ParamSpec, seed: int) -> torch.Tensor:
    """The full parameter, float32, on the CPU: drawn from a generator of its own."""
    if spec.init == "normal":
        generator = torch.Generator().manual_seed(spec.seed(seed))
        return torch.empty(spec.shape).normal_(std=spec.std, generator=generator)
    return torch.full(spec.shape, float(spec.init == "ones"))


def build(job: Job, world: World, *, values_of: Values | None = initial_values, float64: bool = False) -> Decoder:
    """The decoder of a job on this rank, its parameters as `values_of` makes them, or undefined (for rehearsals).

    `float64` makes everything float64 (the reference of `verify`).
    """
    dtype = torch.float64 if float64 else DTYPES[job.training.precision]
    master = torch.float64 if float64 else torch.float32
    decoder = Decoder(job, world, dtype)
    for spec in specs_of(job):
        values = torch.empty(spec.local_shape, dtype=master, device=world.device)
        if values_of is not None:
            values.copy_(local_part(values_of(spec, job.training.seed), spec, world))
        owner, _, leaf = spec.name.rpartition(".")
        decoder.get_submodule(owner).register_parameter(leaf, nn.Parameter(values))
    return decoder


def specs_of(job: Job) -> tuple[ParamSpec, ...]:
    """The parameters of a job's model under its layout."""
    return param_specs(job.model, job.layout, job.training.seq_len)


def local_part(full: torch.Tensor, spec: ParamSpec, world: World) -> torch.Tensor:
    """This rank's slice of a full parameter; padding is zero."""
    if spec.split is None:
        return full
    start, end = spec.span(world.axes[spec.split.axis].rank)
    part = full.narrow(spec.split.dim, start, end - start)
    if part.shape == spec.local_shape:
        return part
    padded = full.new_zeros(spec.local_shape)
    padded.narrow(spec.split.dim, 0, end - start).copy_(part)
    return padded


def assemble(parts: Mapping[int, torch.Tensor], spec: ParamSpec) -> torch.Tensor:
    """The full parameter from the parts of all coordinates of its split axis (`local_part`'s inverse)."""
    if spec.split is None:
        return parts[0]
    pieces = []
    for coordinate in range(0, spec.split.degree, spec.split.copies):
        start, end = spec.span(coordinate)
        pieces.append(parts[coordinate].narrow(spec.split.dim, 0, end - start))
    return torch.cat(pieces, dim=spec.split.dim)

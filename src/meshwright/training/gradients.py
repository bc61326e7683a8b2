"""What happens to gradients between backward and the optimiser, from `ParamSpec` alone.

Gradients that are partial on each rank are summed over the ranks that share the parameter; then all are summed over the
gradient group; then the global norm is taken, each parameter counted once, and they are scaled down to `clip_norm`.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from meshwright.comm.mesh import World
from meshwright.comm.scope import scope
from meshwright.model.decoder import Decoder
from meshwright.parallel.replicate import sum_naive
from meshwright.schemes.params import ParamSpec

PARTIAL_SITE = "gradients"
NORM_SITE = "norm_of_gradients"


def synchronise(model: Decoder, specs: tuple[ParamSpec, ...], world: World) -> None:
    """Make every gradient the sum over all tokens of the global batch, in place."""
    with scope(PARTIAL_SITE, "backward"):
        _sum_partial(model, specs, world)
    sum_naive(((spec.name, model.get_parameter(spec.name)) for spec in specs), world.gradient_axis)


def _sum_partial(model: Decoder, specs: tuple[ParamSpec, ...], world: World) -> None:
    """One flat all-reduce for each group of ranks whose gradients of shared parameters are partial."""
    groups: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
    for spec in specs:
        if spec.partial_over is not None:
            groups[spec.partial_over].append(_gradient(model, spec))
    for (axis, size), gradients in groups.items():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        world.neighbours(axis, size).all_reduce(flat, site=PARTIAL_SITE).wait()
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def clip(model: Decoder, specs: tuple[ParamSpec, ...], world: World, clip_norm: float) -> torch.Tensor:
    """Scale gradients down to a global norm of `clip_norm` (0: do not). Returns the norm before, a scalar tensor."""
    with scope(NORM_SITE, "optimiser"):
        whole = [_gradient(model, spec) for spec in specs if spec.split is None]
        split = [spec for spec in specs if spec.split is not None]
        square = _sum_of_squares(whole, [1.0] * len(whole)) if whole else None
        if split:
            counts = [1.0 / spec.split.copies for spec in split if spec.split]
            over_axis = _sum_of_squares([_gradient(model, spec) for spec in split], counts)
            world.axes["tensor"].all_reduce(over_axis, site=NORM_SITE).wait()
            square = over_axis if square is None else square + over_axis
        assert square is not None
        norm = square.sqrt()
        if clip_norm:
            scale = (clip_norm / (norm + 1e-6)).clamp_(max=1.0)
            torch._foreach_mul_([_gradient(model, spec) for spec in specs], scale)
    return norm


def _gradient(model: Decoder, spec: ParamSpec) -> torch.Tensor:
    gradient = model.get_parameter(spec.name).grad
    assert gradient is not None, spec.name
    return gradient


def _sum_of_squares(gradients: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """Σ weight · |gradient|², a scalar tensor."""
    norms = torch.stack(torch._foreach_norm(gradients))
    return (norms.square_() * torch.tensor(weights, dtype=norms.dtype, device=norms.device)).sum()

"""What happens to gradients between backward and the optimiser: the global norm, each parameter counted once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from meshwright.comm.mesh import World
from meshwright.comm.scope import scope
from meshwright.parallel.replicate import Owned
from meshwright.schemes.params import ParamSpec

NORM_SITE = "norm_of_gradients"


def clip(owned: Sequence[Owned], specs: Sequence[ParamSpec], world: World, clip_norm: float) -> torch.Tensor:
    """Scale gradients down to a global norm of `clip_norm` (0: do not). Returns the norm before, a scalar tensor.

    `owned` is what this rank has to count, `specs` all parameters. Collective.
    """
    with scope(NORM_SITE, "optimiser"):
        square = _sum_of_squares([one for one in owned if one.spec.split is None], world)
        if any(spec.split is not None for spec in specs):
            over_axis = _sum_of_squares([one for one in owned if one.spec.split is not None], world)
            square = square + world.axes["tensor"].all_reduce(over_axis, site=NORM_SITE).wait()
        norm = world.state_axis.all_reduce(square, site=NORM_SITE).wait().sqrt()
        if clip_norm and owned:
            scale = (clip_norm / (norm + 1e-6)).clamp_(max=1.0)
            torch._foreach_mul_([_gradient(one) for one in owned], scale)
    return norm


def _gradient(one: Owned) -> torch.Tensor:
    assert one.parameter.grad is not None, one.spec.name
    return one.parameter.grad


def _sum_of_squares(owned: Sequence[Owned], world: World) -> torch.Tensor:
    """Σ |gradient|², a scalar tensor; of a parameter that ranks of its axis have copies of, a copy's share."""
    if not owned:
        return torch.zeros((), device=world.device)
    norms = torch.stack(torch._foreach_norm([_gradient(one) for one in owned])).square_()
    for norm, (spec, _) in zip(norms, owned, strict=True):
        if spec.split and spec.split.copies > 1:  # one by one: a tensor of shares would be copied from the host
            norm.div_(spec.split.copies)
    return norms.sum()

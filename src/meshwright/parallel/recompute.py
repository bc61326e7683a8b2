"""Recomputation (Chen et al. 2016; selective: Korthikanti et al. 2022, section 5), executed.

    forward   y = function(x), of which only x is kept
    backward  function(x) again, now keeping what its own backward needs, then that backward

The whole function is executed again, its collectives included, in phase `recompute`; parameters inside receive their
gradients from the inner backward. Which functions are wrapped is `schemes.recompute`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from meshwright.comm.scope import scope


def rerun(function: Callable[..., torch.Tensor], *inputs: torch.Tensor | None) -> torch.Tensor:
    """`function(*inputs)`, computed again in backward instead of kept. Its result must depend on `inputs[0]`.

    The function must be deterministic and return one tensor. Outside of training it is simply called.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return _Rerun.apply(function, *inputs)


class _Rerun(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], *inputs: torch.Tensor | None) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        leaves = [
            x if x is None else x.detach().requires_grad_(n) for x, n in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad(), scope(phase="recompute"):
            edge = torch.autograd.graph.get_gradient_edge(ctx.function(*leaves))  # an edge holds no result
        with scope(phase="backward"):
            torch.autograd.backward((edge,), (dy,))
        return None, *(None if leaf is None else leaf.grad for leaf in leaves)

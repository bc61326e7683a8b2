"""What a layer that ranks divide is compared with: the whole operation on one device, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from reference.precision import error

ROUNDING = 1e-13
"""Relative to the largest element: float64, sums of at most a few dozen terms."""


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Float64, from a generator of its own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def assert_equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float = ROUNDING) -> None:
    """But for the order of additions."""
    assert found.shape == expected.shape
    assert error(found, expected) <= tolerance * expected.abs().max()


def unsharded(function: Callable[..., Any], leaves: Sequence[torch.Tensor], dys: Sequence[torch.Tensor]) -> Any:
    """Outputs and gradients on one device."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    return [y.detach() for y in outputs], torch.autograd.grad(outputs, leaves, dys)

"""How an operation of ours is judged: exactly in float64, and by the 2× rule in lower precisions.

The 2× rule: the error of ours against float64 is at most twice that of plain PyTorch in the same precision, plus one
rounding of the largest element (what plain PyTorch computes without any error leaves no room otherwise).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Operation = Callable[..., Any]


def results(operation: Operation, inputs: Sequence[torch.Tensor], seed: int = 0) -> list[torch.Tensor]:
    """Outputs, and the gradients of all floating inputs for random output gradients, in float64."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = operation(*leaves)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    dys = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, [x for x in leaves if x.requires_grad], dys)
    return [x.detach().double() for x in (*outputs, *gradients)]


def assert_exact(ours: Operation, plain: Operation, inputs: Sequence[torch.Tensor]) -> None:
    """Equal in float64 but for the order of a few hundred additions."""
    pairs = zip(results(ours, inputs), results(plain, inputs), strict=True)
    for i, (found, expected) in enumerate(pairs):
        assert found.shape == expected.shape, f"result {i}"
        assert error(found, expected) <= 1e-12 * expected.abs().max().item(), f"result {i}"


def assert_within_twice(
    ours: Operation,
    plain: Operation,
    inputs: Sequence[torch.Tensor],
    dtype: torch.dtype,
    masters: Sequence[int] = (),
) -> None:
    """The 2× rule. `inputs` are float64; those numbered in `masters` are parameters, which ours takes in float32."""
    rounded = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    given = [x.float() if i in masters else x for i, x in enumerate(rounded)]
    exact = results(plain, [x.double() if x.is_floating_point() else x for x in rounded])
    triples = zip(results(ours, given), results(plain, rounded), exact, strict=True)
    for i, (found, same_precision, expected) in enumerate(triples):
        allowed = 2 * error(same_precision, expected) + torch.finfo(dtype).eps * expected.abs().max().item()
        assert error(found, expected) <= allowed, f"result {i}: {error(found, expected):.2e} > {allowed:.2e}"


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()

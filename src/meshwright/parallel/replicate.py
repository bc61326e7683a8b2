"""Data parallelism: the gradients of replicas are summed over the gradient group.

One interface, several strategies (`layout.gradients`); what each sends and when is `schemes.replicate`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from meshwright.comm.collectives import Axis


def sum_naive(parameters: Iterable[tuple[str, nn.Parameter]], axis: Axis) -> None:
    """All-reduce each gradient on its own, in place, waiting for each; in registration order, after backward."""
    for name, parameter in parameters:
        assert parameter.grad is not None, name
        axis.all_reduce(parameter.grad, site=name, phase="backward").wait()

"""Collective matmul as one rank runs it, and torch's fused operations as they fall back (importable by name).

Every function takes the whole problem, keeps this rank's part of it, and returns outputs, gradients, and what the
recorder saw, as `ranked_tensor` does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from ranked_tensor import SITE, Outcome, axis, outside, own, recorded
from torch.distributed import _symmetric_memory as symmetric_memory

from meshwright.account import Compute, Issue, Wait
from meshwright.audit.recorder import Recorder
from meshwright.parallel import tensor
from meshwright.parallel.matmul_columns import gather_columns_matmul, matmul_scatter_columns
from meshwright.parallel.sequence import Region
from meshwright.schemes.tape import Pipeline


class Shape(NamedTuple):
    """How the ends of a region are, and how its products are cut."""

    split: bool
    pipeline: Pipeline | None

    @property
    def region(self) -> Region:
        return Region(axis(), self.split, self.pipeline)


def column(
    shape: Shape, x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], dys: list[torch.Tensor]
) -> Outcome:
    """Linear layers on one input, split by columns; as many biases as weights, or none."""
    count = len(weights)

    def layers(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensor.column_linear(x, parameters[:count], parameters[count:] or [None] * count, shape.region, SITE)

    leaves = [outside(x, shape.split), *(own(p, 0) for p in (*weights, *biases))]
    return recorded(layers, leaves, [own(dy, -1) for dy in dys])


def row(shape: Shape, x: torch.Tensor, weight: torch.Tensor, biases: list[torch.Tensor], dy: torch.Tensor) -> Outcome:
    """A linear layer split by rows; one bias or none."""

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return tensor.row_linear(x, weight, bias, shape.region, SITE)

    return recorded(layer, [own(x, -1), own(weight, 1), *biases], [outside(dy, shape.split)])


def gather_columns(pipeline: Pipeline, x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> Outcome:
    """A column-parallel layer on an input that is split along its features."""

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return gather_columns_matmul(x, weight, axis(), pipeline, SITE)

    return recorded(layer, [own(x, 1), own(weight, 0)], [own(dy, 1)])


def scatter_columns(pipeline: Pipeline, x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> Outcome:
    """A row-parallel layer whose output is split along its features."""

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return matmul_scatter_columns(x, weight, axis(), pipeline, SITE)

    return recorded(layer, [own(x, 1), own(weight, 1)], [own(dy, 1)])


def order(shape: Shape, kind: str, x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> dict[str, str]:
    """Of a layer, by phase: a letter for each product, issue and wait, in the order in which they happened."""
    if kind == "column":
        leaves, dy = [outside(x, shape.split), own(weight, 0)], own(dy, -1)
    else:
        leaves, dy = [own(x, -1), own(weight, 1)], outside(dy, shape.split)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    with Recorder() as recorder:
        if kind == "column":
            (y,) = tensor.column_linear(leaves[0], [leaves[1]], [None], shape.region, SITE)
        else:
            y = tensor.row_linear(leaves[0], leaves[1], None, shape.region, SITE)
        torch.autograd.grad([y], leaves, [dy])
    letters = {"forward": "", "backward": ""}
    for event in recorder.trace().expanded():
        if isinstance(event, Compute) and event.kind == "matmul":
            letters[event.phase] += "c"
        elif isinstance(event, Issue | Wait):
            letters[event.phase] += "i" if isinstance(event, Issue) else "w"
    return letters


# --- torch's ----------------------------------------------------------------------------------------------------------


def _group_name() -> str:
    group = axis().group
    assert group is not None
    return group.group_name


def fused_gather(dim: int, x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """torch's all-gather of x along a dim and products with this rank's rows of the weights."""
    shards = [own(weight, 0).T.contiguous() for weight in weights]
    _, ys = symmetric_memory._fused_all_gather_matmul_fallback(own(x, dim), shards, dim, _group_name())
    return [y.clone() for y in ys]


def fused_scatter(dim: int, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """torch's product of this rank's columns of x and of the weight, summed and scattered along a dim."""
    part = own(weight, 1).T.contiguous()
    return symmetric_memory._fused_matmul_reduce_scatter_fallback(own(x, -1), part, "sum", dim, _group_name()).clone()

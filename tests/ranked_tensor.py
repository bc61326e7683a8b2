"""Tensor-parallel operations as one rank runs them, ours and torch's DTensor (importable by name).

Every function takes the whole problem, keeps this rank's part of it, and returns its results in the order outputs, then
gradients of inputs and parameters, with what the recorder saw sent. An output of DTensor may still be on the wire: its
clone is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

from meshwright.account import Ledger, LedgerKey
from meshwright.audit.recorder import Recorder
from meshwright.comm.collectives import Axis
from meshwright.comm.mesh import World
from meshwright.config.tree import Layout
from meshwright.parallel import tensor

SITE = "here"


class Outcome(NamedTuple):
    """One rank's outputs and gradients, and what it sent."""

    outputs: list[torch.Tensor]
    gradients: list[torch.Tensor]
    rows: dict[LedgerKey, int]


@functools.cache
def axis() -> Axis:
    """The tensor axis over all ranks of the pool."""
    return World.create(Layout(tensor=dist.get_world_size()), torch.device("cpu")).axes["tensor"]


@functools.cache
def mesh() -> DeviceMesh:
    """The same for DTensor."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("oracle",))


def own(whole: torch.Tensor, dim: int) -> torch.Tensor:
    """This rank's part of a dim: ceil(size/T) long, filled up with zeros."""
    length = -(-whole.shape[dim] // axis().size)
    start = min(axis().rank * length, whole.shape[dim])
    part = whole.narrow(dim, start, min(length, whole.shape[dim] - start))
    padding = [0, 0] * (whole.dim() - 1 - dim % whole.dim()) + [0, length - part.shape[dim]]
    return F.pad(part, padding).clone()


def recorded(function: Callable[..., Any], leaves: Sequence[torch.Tensor], dys: Sequence[torch.Tensor]) -> Outcome:
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    with Recorder() as recorder:
        outputs = function(*leaves)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        gradients = torch.autograd.grad(outputs, leaves, list(dys))
    return Outcome([y.detach() for y in outputs], list(gradients), dict(Ledger.of(recorder.trace()).rows))


# --- ours -------------------------------------------------------------------------------------------------------------


def column(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], dys: list[torch.Tensor]
) -> Outcome:
    """Linear layers on one input, split by columns; as many biases as weights, or none."""
    count = len(weights)

    def layers(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensor.column_linear(x, parameters[:count], parameters[count:] or [None] * count, axis(), SITE)

    return recorded(layers, [x, *(own(p, 0) for p in (*weights, *biases))], [own(dy, -1) for dy in dys])


def row(x: torch.Tensor, weight: torch.Tensor, biases: list[torch.Tensor], dy: torch.Tensor) -> Outcome:
    """A linear layer split by rows; one bias or none."""

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return tensor.row_linear(x, weight, bias, axis(), SITE)

    return recorded(layer, [own(x, -1), own(weight, 1), *biases], [dy])


def embedding(tokens: torch.Tensor, table: torch.Tensor, dy: torch.Tensor) -> Outcome:
    """A table split by rows."""
    return recorded(lambda w: tensor.vocab_embedding(tokens, w, dy.dtype, axis(), SITE), [own(table, 0)], [dy])


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, padding: float, dloss: torch.Tensor) -> Outcome:
    """Logits split by columns; columns that are padding hold the value `padding`."""
    columns = own(torch.arange(1.0, 1 + logits.shape[-1]), 0)
    local = torch.where(columns == 0, padding, own(logits, -1))
    vocab_size = logits.shape[-1]
    return recorded(lambda y: tensor.vocab_cross_entropy(y, labels, vocab_size, axis(), SITE), [local], [dloss])


# --- torch's DTensor --------------------------------------------------------------------------------------------------


def dtensor_pair(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, dy: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs and gradients of (column, row) by DTensor, and by us: y, dx, this rank's dup and ddown."""
    module = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in (up, down)))
    with torch.no_grad():
        module[0].weight.copy_(up)
        module[1].weight.copy_(down)
    module = parallelize_module(module, mesh(), {"0": ColwiseParallel(), "1": RowwiseParallel()})
    x_theirs = x.clone().requires_grad_()
    y = module(x_theirs)
    theirs = [y.detach().clone(), *torch.autograd.grad(y, [x_theirs, *module.parameters()], dy)]

    x_ours, up_ours, down_ours = (p.clone().requires_grad_() for p in (x, own(up, 0), own(down, 1)))
    (h,) = tensor.column_linear(x_ours, [up_ours], [None], axis(), SITE)
    y = tensor.row_linear(h, down_ours, None, axis(), SITE)
    ours = [y.detach(), *torch.autograd.grad(y, [x_ours, up_ours, down_ours], dy)]
    return [t.to_local() if hasattr(t, "to_local") else t for t in theirs], ours


def dtensor_loss(logits: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Sum of token losses and this rank's columns of the logits' gradient, by `loss_parallel`."""
    leaf = distribute_tensor(logits, mesh(), [Shard(-1)]).requires_grad_()
    with loss_parallel():
        loss = F.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=tensor.IGNORE)
        loss.backward()
    return [loss.redistribute(placements=[Replicate()]).to_local().detach(), leaf.grad.to_local()]


def dtensor_embedding(tokens: torch.Tensor, table: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """Rows and this rank's part of the table's gradient, by a row-wise DTensor embedding."""
    module = nn.Embedding(*table.shape, dtype=table.dtype)
    with torch.no_grad():
        module.weight.copy_(table)
    module = parallelize_module(module, mesh(), RowwiseParallel(input_layouts=Replicate()))
    y = module(tokens)
    y.backward(dy)
    return [y.detach().clone(), own(module.weight.grad.full_tensor(), 0)]  # theirs may still be partial over the axis

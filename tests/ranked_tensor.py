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
from meshwright.parallel import loss, tensor
from meshwright.parallel.recompute import rerun
from meshwright.parallel.sequence import Region

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


def outside(whole: torch.Tensor, split: bool) -> torch.Tensor:
    """What this rank has of an activation [B, S, E] outside of the tensor-parallel regions."""
    return own(whole, 1) if split else whole


def column(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    dys: list[torch.Tensor],
    split: bool = False,
) -> Outcome:
    """Linear layers on one input, split by columns; as many biases as weights, or none."""
    count, region = len(weights), Region(axis(), split)

    def layers(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensor.column_linear(x, parameters[:count], parameters[count:] or [None] * count, region, SITE)

    return recorded(layers, [outside(x, split), *(own(p, 0) for p in (*weights, *biases))], [own(dy, -1) for dy in dys])


def row(
    x: torch.Tensor, weight: torch.Tensor, biases: list[torch.Tensor], dy: torch.Tensor, split: bool = False
) -> Outcome:
    """A linear layer split by rows; one bias or none."""
    region = Region(axis(), split)

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return tensor.row_linear(x, weight, bias, region, SITE)

    return recorded(layer, [own(x, -1), own(weight, 1), *biases], [outside(dy, split)])


def embedding(tokens: torch.Tensor, table: torch.Tensor, dy: torch.Tensor, split: bool = False) -> Outcome:
    """A table split by rows."""
    region = Region(axis(), split)

    def layer(weight: torch.Tensor) -> torch.Tensor:
        return tensor.vocab_embedding(tokens, weight, dy.dtype, region, SITE)

    return recorded(layer, [own(table, 0)], [outside(dy, split)])


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, padding: float, dloss: torch.Tensor) -> Outcome:
    """Logits split by columns; columns that are padding hold the value `padding`."""
    columns = own(torch.arange(1.0, 1 + logits.shape[-1]), 0)
    local = torch.where(columns == 0, padding, own(logits, -1))
    vocab_size = logits.shape[-1]
    return recorded(lambda y: loss.vocab_cross_entropy(y, labels, vocab_size, axis(), SITE), [local], [dloss])


def rerun_pair(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, dy: torch.Tensor, split: bool
) -> tuple[Outcome, Outcome]:
    """A column- and a row-parallel layer as they are, and computed again in backward: y, then dx, dup, ddown."""
    region = Region(axis(), split)

    def pair(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        (h,) = tensor.column_linear(x, [up], [None], region, SITE)
        return tensor.row_linear(h.sin(), down, None, region, SITE)

    def again(*leaves: torch.Tensor) -> torch.Tensor:
        return rerun(pair, *leaves)

    leaves, dys = [outside(x, split), own(up, 0), own(down, 1)], [outside(dy, split)]
    return recorded(pair, leaves, dys), recorded(again, leaves, dys)


# --- torch's DTensor --------------------------------------------------------------------------------------------------


def dtensor_pair(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, dy: torch.Tensor, split: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs and gradients of (column, row) by DTensor, and by us: y, dx, this rank's dup and ddown.

    If split, activations before and after are split along the sequence.
    """
    x, dy = outside(x, split), outside(dy, split)
    module = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in (up, down)))
    with torch.no_grad():
        module[0].weight.copy_(up)
        module[1].weight.copy_(down)
    layout = Shard(1) if split else Replicate()
    styles = {"0": ColwiseParallel(input_layouts=layout), "1": RowwiseParallel(output_layouts=layout)}
    module = parallelize_module(module, mesh(), styles)
    x_theirs = x.clone().requires_grad_()
    y = module(x_theirs)
    theirs = [y.detach(), *torch.autograd.grad(y, [x_theirs, *module.parameters()], dy)]

    x_ours, up_ours, down_ours = (p.clone().requires_grad_() for p in (x, own(up, 0), own(down, 1)))
    region = Region(axis(), split)
    (h,) = tensor.column_linear(x_ours, [up_ours], [None], region, SITE)
    y = tensor.row_linear(h, down_ours, None, region, SITE)
    ours = [y.detach(), *torch.autograd.grad(y, [x_ours, up_ours, down_ours], dy)]
    return [(t.to_local() if hasattr(t, "to_local") else t).clone() for t in theirs], ours


def dtensor_loss(logits: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Sum of token losses and this rank's columns of the logits' gradient, by `loss_parallel`."""
    leaf = distribute_tensor(logits, mesh(), [Shard(-1)]).requires_grad_()
    with loss_parallel():
        total = F.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=loss.IGNORE)
        total.backward()
    return [total.redistribute(placements=[Replicate()]).to_local().detach(), leaf.grad.to_local()]


def dtensor_embedding(tokens: torch.Tensor, table: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """Rows and this rank's part of the table's gradient, by a row-wise DTensor embedding."""
    module = nn.Embedding(*table.shape, dtype=table.dtype)
    with torch.no_grad():
        module.weight.copy_(table)
    module = parallelize_module(module, mesh(), RowwiseParallel(input_layouts=Replicate()))
    y = module(tokens)
    y.backward(dy)
    return [y.detach().clone(), own(module.weight.grad.full_tensor(), 0)]  # theirs may still be partial over the axis

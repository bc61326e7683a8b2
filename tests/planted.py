"""Bugs planted into a decoder: collectives that are missing, doubled, on the wrong axis or on the wrong tensor.

Each is an instrument for `verify.verify.verify_on`: it swaps the axis of one module, chosen by name, for one that
misbehaves in forward or in backward. Importable by name, because ranks receive them pickled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from meshwright.comm import torch_private
from meshwright.comm.collectives import Axis, Pending
from meshwright.comm.mesh import World
from meshwright.model.decoder import Decoder


@dataclass(frozen=True)
class FaultyAxis(Axis):
    """An axis whose all-reduce misbehaves in one phase."""

    fault: str = ""
    in_backward: bool = False
    other: Any = None

    def all_reduce(self, tensor: torch.Tensor, **keywords: Any) -> Pending:
        reduce = super().all_reduce
        if torch_private.in_backward() != self.in_backward:
            return reduce(tensor, **keywords)
        if self.fault == "missing":
            return Pending(tensor)
        if self.fault == "doubled":
            return reduce(reduce(tensor, **keywords).wait(), **keywords)
        if self.fault == "wrong axis":
            return self.other.all_reduce(tensor, **keywords)
        assert self.fault == "wrong tensor", self.fault
        reduce(tensor.clone(), **keywords).wait()
        return Pending(tensor)


@dataclass(frozen=True)
class Fault:
    """Plant a fault in the collectives of one module."""

    module: str
    fault: str
    in_backward: bool

    def __call__(self, model: Decoder, world: World) -> None:
        owner: Any = model.get_submodule(self.module)
        axis = owner.axis
        owner.axis = FaultyAxis(
            axis.name, axis.size, axis.rank, axis.group, self.fault, self.in_backward, world.axes["replicate"]
        )


def wrong_divisor(model: Decoder, world: World) -> None:
    """A mean of means: each rank divides by its own labels, not by those of the global batch."""
    count_axis = world.gradient_axis

    @dataclass(frozen=True)
    class OwnCount(Axis):
        def all_reduce(self, tensor: torch.Tensor, **keywords: Any) -> Pending:
            if tensor.dtype == torch.int64:
                total = tensor.clone()
                super().all_reduce(total, **keywords).wait()
                return Pending(tensor)
            return super().all_reduce(tensor, **keywords)

    own = OwnCount(count_axis.name, count_axis.size, count_axis.rank, count_axis.group)
    world.axes[world.layout.gradient_axis] = own


@dataclass(frozen=True)
class DoubledMaximum(Axis):
    """Takes the maximum twice: idempotent, so every number stays right."""

    def all_reduce(self, tensor: torch.Tensor, **keywords: Any) -> Pending:
        reduce = super().all_reduce
        if keywords.get("reduction") == "max":
            tensor = reduce(tensor, **keywords).wait()
        return reduce(tensor, **keywords)


def doubled_maximum(model: Decoder, world: World) -> None:
    """Double the loss's idempotent reduction."""
    axis = model.loss.axis
    model.loss.axis = DoubledMaximum(axis.name, axis.size, axis.rank, axis.group)


@dataclass(frozen=True)
class DoubledGather:
    """Gather a module's output and keep this rank's own part, twice: numbers stay, bytes do not."""

    module: str

    def __call__(self, model: Decoder, world: World) -> None:
        axis = world.axes["tensor"]

        def gather(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            for _ in range(2):
                gathered = axis.all_gather(output.detach(), site=self.module).wait()
            return output + 0 * gathered.chunk(axis.size)[axis.rank]

        model.get_submodule(self.module).register_forward_hook(gather)


@dataclass(frozen=True)
class BareAllReduce:
    """A collective straight from torch.distributed, on a copy: nothing but the ledger can see it."""

    module: str

    def __call__(self, model: Decoder, world: World) -> None:
        def pre_hook(module: nn.Module, args: Any) -> None:
            dist.all_reduce(args[0].detach().clone(), group=world.axes["tensor"].group)

        model.get_submodule(self.module).register_forward_pre_hook(pre_hook)


def every_axis_right(model: Decoder, world: World) -> None:
    """No fault: the instrument that the others are compared with."""
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "axis", None), Axis):
            module.axis = replace(module.axis)


def not_a_number(model: Decoder, world: World) -> None:
    """One weight of the first MLP is NaN on every rank."""
    with torch.no_grad():
        model.get_parameter("layers.0.mlp.up.weight")[0, 0] = torch.nan

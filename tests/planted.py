"""Bugs planted into a decoder: collectives that are missing, doubled, on the wrong axis or on the wrong tensor.

Each is an instrument for `verify.verify.verify_on`: it swaps the axis of one module, chosen by name, for one that
misbehaves in forward or in backward, or how one layer attends. Importable by name, because ranks receive them pickled.
All of it goes with the model and the world of one verification: the ranks of a pool serve others afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from meshwright.comm import torch_private
from meshwright.comm.collectives import Axis, Pending
from meshwright.comm.mesh import World
from meshwright.model.decoder import Decoder
from meshwright.parallel import context
from meshwright.parallel.context import ContextAttention
from meshwright.parallel.sequence import Region
from meshwright.schemes.ring import Schedule


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
        other = world.axes["replicate"]
        _replace_axis(
            owner, lambda axis: FaultyAxis(**vars(axis), fault=self.fault, in_backward=self.in_backward, other=other)
        )


def _replace_axis(owner: Any, change: Callable[[Axis], Axis]) -> None:
    """Change the axis of a module, or that of its region."""
    if hasattr(owner, "region"):
        owner.region = replace(owner.region, axis=change(owner.region.axis))
    else:
        owner.axis = change(owner.axis)


def norms_not_summed(model: Decoder, world: World) -> None:
    """The sum of partial gradients over the tensor axis is thrown away."""
    whole = world.neighbours("tensor", world.layout.tensor)
    world.axes[f"tensor/{world.layout.tensor}"] = FaultyAxis(**vars(whole), fault="wrong tensor")


@dataclass(frozen=True)
class _GradientsElsewhere(Axis):
    """Sums counts and losses, but gradients over another axis."""

    other: Any = None

    def all_reduce(self, tensor: torch.Tensor, **keywords: Any) -> Pending:
        axis = super() if tensor.dtype in (torch.int64, torch.float64) else self.other
        return axis.all_reduce(tensor, **keywords)


def gradient_group_without_ring(model: Decoder, world: World) -> None:
    """All that is summed over the gradient group is summed over replicate alone."""
    world.axes[world.layout.gradient_axis] = world.axes["replicate"]


def gradients_not_summed_over_the_ring(model: Decoder, world: World) -> None:
    """Gradients are summed over replicate alone; token counts and losses over the whole group."""
    own = _GradientsElsewhere(**vars(world.gradient_axis), other=world.axes["replicate"])
    world.axes[world.layout.gradient_axis] = own


@dataclass(frozen=True)
class FaultyRing:
    """Let the hops of one module's rings misbehave in one phase."""

    module: str
    fault: str
    in_backward: bool

    def __call__(self, model: Decoder, world: World) -> None:
        owner: Any = model.get_submodule(self.module)
        _replace_axis(owner, lambda axis: _FaultyHops(**vars(axis), fault=self.fault, in_backward=self.in_backward))


@dataclass(frozen=True)
class _FaultyHops(Axis):
    """An axis whose shifts misbehave in one phase; what is sent keeps its bytes."""

    fault: str = ""
    in_backward: bool = False
    previous: list[torch.Tensor] = field(default_factory=list)

    def shift(self, tensor: torch.Tensor, **keywords: Any) -> Pending:
        if torch_private.in_backward() != self.in_backward:
            return super().shift(tensor, **keywords)
        if self.fault == "wrong way":
            send_to, receive_from = keywords["receive_from"], keywords["send_to"]
            return super().shift(tensor, **keywords | {"send_to": send_to, "receive_from": receive_from})
        if self.fault == "counted twice":
            return super().shift(tensor, **keywords).then(lambda rows: rows.mul_(2))
        assert self.fault == "piece before", self.fault
        self.previous.append(tensor)
        same = [piece for piece in self.previous[-2:-1] if piece.shape == tensor.shape]
        return super().shift(same[0].clone() if same else tensor, **keywords)


@dataclass(frozen=True)
class FaultyAttention:
    """Let one layer attend by a kind of `ContextAttention` that has a fault."""

    layer: int
    kind: Callable[..., ContextAttention]

    def __call__(self, model: Decoder, world: World) -> None:
        attention: Any = model.layers[self.layer].attention
        attention.attend = self.kind(**vars(attention.attend))


class ShowsLaterTokens(ContextAttention):
    """A ring whose ranks forget the triangle: each sees all the keys that are its own."""

    def __call__(self, qkv: list[torch.Tensor], site: str, first_BS: torch.Tensor | None = None) -> torch.Tensor:
        schedule = context.schedule

        def unmasked(*args: Any) -> Schedule:
            plan = schedule(*args)
            blocks = (tuple(block._replace(masked=False) for block in step.blocks) for step in plan.steps)
            return replace(plan, steps=tuple(map(lambda s, b: s._replace(blocks=b), plan.steps, blocks)))

        with mock.patch.object(context, "schedule", unmasked):
            return super().__call__(qkv, site, first_BS)


class PermutesHeads(ContextAttention):
    """An exchange that sends heads to the rank at the other end of the axis, and takes them for its own."""

    def __call__(self, qkv: list[torch.Tensor], site: str, first_BS: torch.Tensor | None = None) -> torch.Tensor:
        to_heads = context.to_heads

        def mistaken(tensors: Sequence[torch.Tensor], axis: Axis, site: str) -> tuple[torch.Tensor, ...]:
            return to_heads(tensors, _OtherEnd(**vars(axis)), site)

        with mock.patch.object(context, "to_heads", mistaken):
            return super().__call__(qkv, site, first_BS)


@dataclass(frozen=True)
class _OtherEnd(Axis):
    """Sends to each rank, in forward, what the one at the other end should have."""

    def all_to_all(self, tensor: torch.Tensor, **keywords: Any) -> Pending:
        return super().all_to_all(tensor if torch_private.in_backward() else tensor.flip(0), **keywords)


@dataclass(frozen=True)
class SendsKeysTwice:
    """The ring of one layer on which keys travel in the place of values, in one phase; so do their gradients."""

    layer: int
    in_backward: bool

    def __call__(self, model: Decoder, world: World) -> None:
        attention: Any = model.layers[self.layer].attention
        ring = _FirstTwice(**vars(attention.attend.ring), in_backward=self.in_backward)
        attention.attend = replace(attention.attend, ring=ring)


@dataclass(frozen=True)
class _FirstTwice(Axis):
    """Of each pair that is sent, sends the first twice, in one phase."""

    in_backward: bool = False
    first: list[torch.Tensor] = field(default_factory=list)

    def shift(self, tensor: torch.Tensor, **keywords: Any) -> Pending:
        if torch_private.in_backward() == self.in_backward:
            if self.first:
                tensor = self.first.pop().clone()
            else:
                self.first.append(tensor)
        return super().shift(tensor, **keywords)


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
    for module in model.modules():
        if isinstance(getattr(module, "axis", None), Axis) or isinstance(getattr(module, "region", None), Region):
            _replace_axis(module, replace)


def not_a_number(model: Decoder, world: World) -> None:
    """One weight of the first MLP is NaN on every rank."""
    with torch.no_grad():
        model.get_parameter("layers.0.mlp.up.weight")[0, 0] = torch.nan

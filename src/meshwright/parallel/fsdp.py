"""ZeRO-2, ZeRO-3 and HSDP: torch's `fully_shard`, with collectives that enter the account by their unit's name.

What is gathered, reduced and held, and when, is `schemes.fsdp`. Masters are float32 and sharded; units are gathered in
the compute dtype and reduced in the reduce dtype, as sums: whoever computes the loss divides it. The optimiser steps
this rank's rows as plain tensors, which share the storage of the sharded parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from meshwright.comm import torch_private
from meshwright.comm.collectives import Axis
from meshwright.comm.mesh import World, mesh_of
from meshwright.comm.scope import scope
from meshwright.config.tree import Layout
from meshwright.parallel.replicate import Owned, sum_flat
from meshwright.schemes.fsdp import ROOT
from meshwright.schemes.params import ParamSpec


class FullyShardedStates:
    """A model that `fully_shard` has taken over, layer by layer, then the rest as the root."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        specs: Sequence[ParamSpec],
        layout: Layout,
        world: World,
        *,
        param_dtype: torch.dtype | None,
        reduce_dtype: torch.dtype,
    ) -> None:
        """`layers`: the units beside the root, by name, in the order in which they run."""
        self._model, self._neighbours, self._is_last = model, world.neighbours, False
        axis, mesh = world.state_axis, mesh_of(world.state_axis, world.device)
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
        for module in layers.values():
            fully_shard(module, mesh=mesh, reshard_after_forward=layout.zero_stage == 3, mp_policy=policy)
        fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        torch_private.settle_fully_sharded(model)
        self._parameters = {spec.name: model.get_parameter(spec.name) for spec in specs}
        self._units = [cast(FSDPModule, unit) for unit in (*layers.values(), model)]
        for site, unit in zip((*layers, ROOT), self._units, strict=True):
            own = [name for name in self._parameters if _unit_of(name, layers) == site]
            self._adopt(unit, site, own, axis, world.replica_axis)
        if layout.prefetch > 1:
            _prefetch(model, list(layers.values()), layout.prefetch)
        self.owned = [Owned(spec, nn.Parameter(_local(self._parameters[spec.name]))) for spec in specs]
        for one in self.owned:  # until the first step: an optimiser may make its states
            one.parameter.grad = torch.zeros_like(one.parameter)

    def _adopt(self, unit: FSDPModule, site: str, names: Sequence[str], axis: Axis, replicas: Axis) -> None:
        unit.set_custom_all_gather(cast(Any, _AllGather(axis, site)))
        unit.set_custom_reduce_scatter(cast(Any, _ReduceScatter(axis, site)))
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        if replicas.size > 1:
            parameters = [self._parameters[name] for name in names]

            def reduce_over_replicas(flat: torch.Tensor) -> None:
                _used_here(flat)
                if self._is_last:
                    _take_over(flat, parameters)
                    replicas.all_reduce(flat, site=site, phase="backward").wait()

            unit.set_all_reduce_hook(reduce_over_replicas)

    def begin(self) -> None:
        self._is_last = False
        for unit in self._units:
            unit.reshard()  # an evaluation, which has no backward, leaves gathered what waits for one
        for spec, own in self.owned:
            own.grad = self._parameters[spec.name].grad = None

    def last(self) -> None:
        self._is_last = True

    def finish(self) -> None:
        for one in self.owned:
            gradient = self._parameters[one.spec.name].grad
            one.parameter.grad = torch.zeros_like(one.parameter) if gradient is None else _local(gradient)
        groups: dict[tuple[str, int], list[torch.Tensor]] = {}
        for spec, parameter in self.owned:
            if spec.partial_over is not None:
                assert parameter.grad is not None
                groups.setdefault(spec.partial_over, []).append(parameter.grad)
        for (axis, size), gradients in groups.items():
            sum_flat(gradients, self._neighbours(axis, size))

    def publish(self) -> None:
        """The next forward gathers."""

    def settle(self) -> None:
        """Nothing is on its way."""

    def whole_gradient(self, spec: ParamSpec) -> torch.Tensor:
        gradient = self._parameters[spec.name].grad
        if gradient is None:
            return torch.zeros(spec.local_shape, device=self._parameters[spec.name].device)
        with scope(phase="control"):
            return cast(DTensor, gradient).full_tensor()


def _prefetch(model: nn.Module, layers: Sequence[nn.Module], count: int) -> None:
    """Let every unit put the `count` next ones on the wire, in both directions."""
    order = cast(list[FSDPModule], [model, *layers])
    for index, unit in enumerate(order):
        unit.set_modules_to_forward_prefetch(order[index + 1 : index + 1 + count])
    order[1:] = order[:0:-1]
    for index, unit in enumerate(order):
        unit.set_modules_to_backward_prefetch(order[index + 1 : index + 1 + count])


def _unit_of(name: str, layers: Mapping[str, nn.Module]) -> str:
    """The unit of a parameter, by name."""
    return next((layer for layer in layers if name.startswith(f"{layer}.")), ROOT)


def _local(tensor: Any) -> torch.Tensor:
    """This rank's rows, without padding, sharing storage."""
    return cast(DTensor, tensor.detach()).to_local()


def _take_over(flat: torch.Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Add what earlier micro-batches have left in the gradients to `flat`, and drop those: `flat` becomes them.

    In a reduce dtype of bf16 their sum is rounded to it, as all that is summed over ranks is.
    """
    first = parameters[0].grad
    if first is not None:
        before = _local(first).as_strided((flat.numel(),), (1,), 0)  # all are views of what was reduced then
        _used_here(before)
        flat += before
        for parameter in parameters:
            parameter.grad = None


def _used_here(tensor: torch.Tensor) -> None:
    """On CUDA, keep its memory from being reused before the present stream is done with it.

    fully_shard makes what it reduces on a stream of its own, and holds it for its own sums over replicas, not for those
    of a hook: freed, it would be the next unit's while this one's sum is on the wire. No test on a CPU can see this.
    """
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


class _Allocates:
    """The buffer of a collective: a plain tensor."""

    def __init__(self, axis: Axis, site: str) -> None:
        self._axis, self._site = axis, site

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Allocates):
    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False
    ) -> None:
        """`input_tensor` is this rank's part of `output_tensor`."""
        phase = "backward" if torch_private.in_backward() else "forward"
        self._axis.all_gather_in_place(output_tensor, site=self._site, phase=phase).wait()


class _ReduceScatter(_Allocates):
    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        self._axis.reduce_scatter_into(output_tensor, input_tensor, site=self._site, phase="backward").wait()

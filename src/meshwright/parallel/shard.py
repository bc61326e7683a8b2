"""ZeRO-1 (Rajbhandari et al. 2020, section 5.1), executed: states are sharded, parameters and gradients are not.

What is cut where and what is sent is `schemes.shard`; stages 2 and 3 are `parallel.fsdp`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from meshwright.comm.collectives import Axis, Pending
from meshwright.parallel.replicate import GradientBuckets, Neighbours, Owned, sum_partial
from meshwright.schemes.params import ParamSpec
from meshwright.schemes.replicate import Bucket, Strategy
from meshwright.schemes.shard import in_order_of_need, pieces


class ShardedStates:
    """Parameters live in flat buffers cut like those of their gradients; a rank steps its own part of each."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        parts: Sequence[Bucket],
        strategy: Strategy,
        states: Axis,
        replicas: Axis,
        neighbours: Neighbours,
        handed: Sequence[str] = (),
    ) -> None:
        """`states`: the ranks that divide the states; `replicas`: those that hold the same part. `handed` as of
        `GradientBuckets`."""

        def send(bucket: Bucket, buffer: torch.Tensor) -> Pending:
            return states.reduce_scatter_in_place(buffer, site=bucket.site, phase="backward")

        self._parts, self._states, self._replicas, self._neighbours = parts, states, replicas, neighbours
        self._values = [_moved(bucket, parameters) for bucket in parts]
        self._gradients = GradientBuckets(parameters, parts, strategy, send, handed)
        self._needed = in_order_of_need(parts, parameters)
        self._arriving: dict[str, Pending] = {}
        self.owned = [owned for index in range(len(parts)) for owned in self._pieces(index)]

    def _pieces(self, index: int) -> list[Owned]:
        found = []
        for spec, start, stop in pieces(self._parts[index], self._states.rank):
            piece = nn.Parameter(self._values[index][start:stop])
            piece.grad = self._gradients.buffers[index][start:stop]
            found.append(Owned(spec, piece))
        return found

    def begin(self) -> None:
        self._gradients.begin()

    def last(self) -> None:
        self._gradients.last()

    def finish(self) -> None:
        self._gradients.finish()
        own = [buffer.chunk(self._states.size)[self._states.rank] for buffer in self._gradients.buffers]
        sites = [bucket.site for bucket in self._parts]
        pending = [self._replicas.all_reduce(t, site=s, phase="backward") for t, s in zip(own, sites, strict=True)]
        for reduced in pending:
            reduced.wait()
        sum_partial(self._parts, own, self._neighbours)

    def publish(self) -> None:
        """Put every bucket of parameters on the wire, the first that forward needs first; see `wait_for`."""
        for bucket in self._needed:
            values = self._values[self._parts.index(bucket)]
            pending = self._states.all_gather_in_place(values, site=bucket.site, phase="optimiser")
            self._arriving |= {spec.name: pending for spec in bucket.members}

    def settle(self) -> None:
        self.wait_for(list(self._arriving))

    def wait_for(self, names: Sequence[str]) -> None:
        """Block until these parameters have arrived."""
        for name in names:
            if (pending := self._arriving.pop(name, None)) is not None:
                pending.wait()

    def waited_for_by(self, module: nn.Module, names: Sequence[str]) -> None:
        """Whenever the module runs, it waits for these parameters first."""

        def wait(*_: Any) -> None:
            self.wait_for(names)

        module.register_forward_pre_hook(wait)

    def whole_gradient(self, spec: ParamSpec) -> torch.Tensor:
        index = next(index for index, bucket in enumerate(self._parts) if spec in bucket.members)
        whole = self._gradients.buffers[index].clone()
        self._states.all_gather_in_place(whole, site=self._parts[index].site, phase="control").wait()
        own = self._gradients.whole_gradient(spec)
        return whole.as_strided(own.size(), own.stride(), own.storage_offset())


def _moved(bucket: Bucket, parameters: Mapping[str, nn.Parameter]) -> torch.Tensor:
    """A buffer of which the bucket's parameters are views from now on."""
    like = parameters[bucket.members[0].name]
    buffer = torch.zeros(bucket.numel, dtype=like.dtype, device=like.device)
    for spec, start in bucket.places():
        parameter = parameters[spec.name]
        view = buffer[start : start + spec.local_numel].view(spec.local_shape)
        view.copy_(parameter.detach())
        parameter.data = view
    return buffer

"""Data parallelism: the gradients of replicas are summed over the gradient group.

One executor for the four strategies of `layout.gradients`; which parameters share a bucket, and when it is sent, is
`schemes.replicate`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn

from meshwright.comm.collectives import Axis
from meshwright.comm.mesh import Tiers
from meshwright.comm.scope import scope
from meshwright.parallel.hierarchical import HierarchicalSums
from meshwright.schemes.params import ParamSpec
from meshwright.schemes.replicate import PARTIAL_SITE, Bucket, Strategy, is_overlapped, partial_buckets

Neighbours = Callable[[str, int], Axis]
"""The group of ranks, by axis and size, that hold the same part of a parameter."""


class Sent(Protocol):
    """A bucket on the wire."""

    def wait(self) -> torch.Tensor:
        """Block until what it becomes is there."""
        ...


Send = Callable[[Bucket, torch.Tensor], Sent]
"""Put a bucket's buffer on the wire."""


class Owned(NamedTuple):
    """What this rank steps: a parameter, or the part of one, whose `.grad` is final after `States.finish`."""

    spec: ParamSpec
    parameter: nn.Parameter


class States(Protocol):
    """Parameters, gradients and what is stepped, whatever of it is sharded. Every method is collective."""

    @property
    def owned(self) -> Sequence[Owned]:
        """What this rank steps."""
        ...

    def begin(self) -> None:
        """A step begins: gradients are forgotten."""

    def last(self) -> None:
        """The next backward is the last of the step."""

    def finish(self) -> None:
        """Backward is over: leave in every owned `.grad` the sum over all tokens of the global batch."""

    def publish(self) -> None:
        """The optimiser has stepped: let every rank have what it needs of it."""

    def settle(self) -> None:
        """Wait for what `publish` has left on its way: before parameters are read by others than the model."""

    def whole_gradient(self, spec: ParamSpec) -> torch.Tensor:
        """After `finish`: the gradient of this rank's whole part of a parameter (`ParamSpec.local_shape`)."""
        ...


class GradientBuckets:
    """Gradients that live in flat buffers, each put on the wire by `send` as its strategy says.

    Every `.grad` is a view of its bucket's buffer. The first gradient of a step is copied there as soon as autograd has
    it, others are added: nothing need be zeroed before. A parameter that no backward reaches gets zeros at the end; its
    bucket is sent in its turn, when backward is over. The gradient of a parameter that is used several times must
    become final once: autograd sees to it in one graph, `model.decoder` for a tied head, which hands its share to the
    embedding. `handed` names parameters that get shares in such a way: they are zeroed first, and all is added.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        parts: Sequence[Bucket],
        strategy: Strategy,
        send: Send,
        handed: Sequence[str] = (),
    ) -> None:
        self.parts, self.buffers = parts, [_buffer(bucket, parameters) for bucket in parts]
        self._overlapped, self._send = is_overlapped(strategy), send
        self._missing: list[set[str]] = [set() for _ in parts]
        self._pending: list[Sent] = []
        self._armed = False
        self._parameters, self._handed, self._views = parameters, handed, {}
        for index, (bucket, buffer) in enumerate(zip(parts, self.buffers, strict=True)):
            for spec, start in bucket.places():
                parameter = parameters[spec.name]
                parameter.grad = self._views[spec.name] = _view(buffer, start, parameter.shape)
                parameter.register_post_accumulate_grad_hook(self._hook(index, spec.name))

    def begin(self) -> None:
        """Forget all gradients."""
        for name, parameter in self._parameters.items():
            if name in self._handed:
                parameter.grad = self._views[name].zero_()
            else:
                parameter.grad = None

    def last(self) -> None:
        """From now on a gradient that autograd adds to is final."""
        self._armed, self._pending = True, []
        self._missing = [{spec.name for spec in bucket.members} for bucket in self.parts]

    def finish(self) -> None:
        """Send what is not on the wire yet, and wait for all."""
        self._armed = False
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                parameter.grad = self._views[name].zero_()
        while len(self._pending) < len(self.parts):
            self._send_next()
            if not self._overlapped:
                self._pending[-1].wait()
        for pending in self._pending:
            pending.wait()
        self._pending = []

    def _hook(self, index: int, name: str) -> Callable[[torch.Tensor], None]:
        """It holds these buckets weakly: they hold the parameter, which holds it where no collector sees the cycle."""
        view, buckets = self._views[name], weakref.ref(self)

        def ready(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            if parameter.grad is not view:
                view.copy_(parameter.grad)
                parameter.grad = view
            if (own := buckets()) is not None:
                own._arrived(index, name)

        return ready

    def _arrived(self, index: int, name: str) -> None:
        """Autograd has added to a gradient, which is in its buffer."""
        if self._armed and self._overlapped:
            self._missing[index].discard(name)
            while len(self._pending) < len(self.parts) and not self._missing[len(self._pending)]:
                self._send_next()

    def _send_next(self) -> None:
        """Always in the order of the buckets: it is the same on every rank, whatever a rank finished first."""
        index = len(self._pending)
        self._pending.append(self._send(self.parts[index], self.buffers[index]))

    def whole_gradient(self, spec: ParamSpec) -> torch.Tensor:
        """A view of the buffer."""
        return self._views[spec.name]


def _buffer(bucket: Bucket, parameters: Mapping[str, nn.Parameter]) -> torch.Tensor:
    like = parameters[bucket.members[0].name]
    return torch.zeros(bucket.numel, dtype=like.dtype, device=like.device)


def _view(buffer: torch.Tensor, start: int, shape: torch.Size) -> torch.Tensor:
    return buffer[start : start + shape.numel()].view(shape)


class Replicated:
    """Zero 0: every rank of the gradient group holds all states and steps them all."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        parts: Sequence[Bucket],
        strategy: Strategy,
        axis: Axis | Tiers,
        neighbours: Neighbours,
        handed: Sequence[str] = (),
    ) -> None:
        """`axis`: the gradient group, all at once or by tiers. `handed` as of `GradientBuckets`."""
        sums = HierarchicalSums(axis) if isinstance(axis, Tiers) else axis

        def send(bucket: Bucket, buffer: torch.Tensor) -> Sent:
            return sums.all_reduce(buffer, site=bucket.site, phase="backward")

        self._gradients, self._neighbours = GradientBuckets(parameters, parts, strategy, send, handed), neighbours
        specs = {spec.name: spec for bucket in parts for spec in bucket.members}
        self.owned = [Owned(specs[name], parameter) for name, parameter in parameters.items()]

    def begin(self) -> None:
        self._gradients.begin()

    def last(self) -> None:
        self._gradients.last()

    def finish(self) -> None:
        self._gradients.finish()
        sum_partial(self._gradients.parts, self._gradients.buffers, self._neighbours)

    def publish(self) -> None:
        """Every rank has stepped everything."""

    def settle(self) -> None:
        """Nothing is on its way."""

    def whole_gradient(self, spec: ParamSpec) -> torch.Tensor:
        return self._gradients.whole_gradient(spec)


def sum_partial(parts: Sequence[Bucket], own: Sequence[torch.Tensor], neighbours: Neighbours) -> None:
    """Sum gradients that are partial over the ranks that share their parameters; `own` is a tensor a bucket."""
    tensors = {bucket.site: tensor for bucket, tensor in zip(parts, own, strict=True)}
    with scope(PARTIAL_SITE, "backward"):
        for (axis, size), group in partial_buckets(parts).items():
            sum_flat([tensors[bucket.site] for bucket in group], neighbours(axis, size))


def sum_flat(tensors: Sequence[torch.Tensor], axis: Axis) -> None:
    """One all-reduce of several tensors, in place; through a copy if they are several."""
    if len(tensors) == 1:
        axis.all_reduce(tensors[0], site=PARTIAL_SITE).wait()
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    axis.all_reduce(flat, site=PARTIAL_SITE).wait()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))

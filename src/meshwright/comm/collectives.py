"""Collectives on one mesh axis. Each returns a `Pending`: issuing and waiting are two events of the account.

The wire's formats have the ranks outermost: a gather or scatter along another dim than the first costs a copy of the
full tensor, unless all dims before it are of length 1. The site (the module's name) is passed with every call. On an
axis of one rank nothing is issued.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from meshwright.comm import torch_private
from meshwright.comm.failure import Call, failing_as
from meshwright.comm.scope import current, notify_wait, observed, scope, unaccounted, waiting

Reduction = Literal["sum", "max"]
_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass
class Pending:
    """A collective on the wire, and the tensor that will hold its result.

    While it is pending, its tensor's storage is a communication buffer of the account, and what is sent is kept.
    """

    tensor: torch.Tensor
    works: Sequence[dist.Work] = ()
    wired: Sequence[torch.Tensor] = ()
    """What the backend was given, see `_wired`: what it fills, and what it sends."""
    call: Call | None = None
    """None where nothing was put on the wire."""
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None
    """From the wire's format to the result."""
    num_holders: int | None = None
    """Tensors of the filled storage before the backend had it; None where others may make some meanwhile."""

    def wait(self) -> torch.Tensor:
        """Block until the result is there (on CUDA: make the current stream wait), and return it.

        Raises CollectiveError where a peer is lost.
        """
        if self.works:
            works, self.works = list(self.works), ()
            with unaccounted(), failing_as(self.call, accepted=True), waiting(self.call):
                while works:  # a work that is done must not be kept: it may hold the tensor
                    works.pop(0).wait()
            if observed():
                self._settle()
                notify_wait(self)
            self.wired = ()
        if self.finish is not None:
            self.tensor, self.finish = self.finish(self.tensor), None
        return self.tensor

    def then(self, finish: Callable[[torch.Tensor], torch.Tensor]) -> Pending:
        """The same, whose result is `finish` of what arrives."""
        self.finish = finish
        return self

    def _settle(self, limit_seconds: float = 10.0) -> None:
        """Wait until the backend's thread lets go of the tensors: gloo's does so a moment after the result is there.

        Else that thread might be the last holder and free a storage, unseen by whoever follows memory on this one.
        """
        deadline = time.monotonic() + limit_seconds
        alone = [torch_private.num_references(alias) for alias in _wired(*self.wired)]
        while [torch_private.num_references(alias) for alias in self.wired] != alone and time.monotonic() < deadline:
            time.sleep(0)
        if self.num_holders is not None:  # of views, it gives back the alias first and then the storage
            while torch_private.num_holders(self.tensor) > self.num_holders and time.monotonic() < deadline:
                time.sleep(0)


def _wired(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Aliases to put on the wire: held by a `Pending` and the backend alone, so that the one sees the other let go."""
    with unaccounted():
        return tuple(tensor.detach() for tensor in tensors)


@dataclass(frozen=True)
class Axis:
    """A mesh axis as this rank sees it: name, degree, coordinate, and the group of its ranks (None for degree 1)."""

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    def all_reduce(
        self, tensor: torch.Tensor, *, site: str, reduction: Reduction = "sum", phase: str | None = None
    ) -> Pending:
        """Reduce `tensor` over the axis, in place. Payload: the tensor."""
        if self.size == 1:
            return Pending(tensor)
        wired = _wired(tensor)
        with self._issue("all_reduce", site, phase) as call:
            work = dist.all_reduce(wired[0], op=_REDUCTIONS[reduction], group=self.group, async_op=True)
        return Pending(tensor, (work,), wired, call)

    def all_gather(self, tensor: torch.Tensor, *, site: str, dim: int = 0, phase: str | None = None) -> Pending:
        """Concatenate every rank's `tensor` along `dim`. Payload: the gathered tensor."""
        if self.size == 1:
            return Pending(tensor)
        with self._issue("all_gather", site, phase) as call:
            part = tensor.contiguous()
            gathered = part.new_empty(self.size * part.shape[0], *part.shape[1:])
            wired = _wired(gathered, part)
            num_holders = torch_private.num_holders(gathered)
            work = torch_private.all_gather_into(*wired, group=self.group, async_op=True)
        pending = Pending(gathered, (work,), wired, call, num_holders=num_holders)
        return pending.then(lambda parts: _side_by_side(parts, self.size, dim)) if dim else pending

    def reduce_scatter(self, tensor: torch.Tensor, *, site: str, dim: int = 0, phase: str | None = None) -> Pending:
        """Sum `tensor` over the axis and keep this rank's part of `dim`. Payload: the full tensor."""
        if self.size == 1:
            return Pending(tensor)
        with self._issue("reduce_scatter", site, phase) as call:
            parts = tensor.unflatten(dim, (self.size, -1)).movedim(dim, 0).flatten(0, 1).contiguous()
            part = parts.new_empty(parts.shape[0] // self.size, *parts.shape[1:])
            wired = _wired(part, parts)
            work = torch_private.reduce_scatter_into(*wired, group=self.group, async_op=True)
        return Pending(part, (work,), wired, call)

    def all_gather_in_place(self, tensor: torch.Tensor, *, site: str, phase: str | None = None) -> Pending:
        """Fill `tensor`, 1-D, of which each rank has its own equal part. Payload: the tensor."""
        if self.size == 1:
            return Pending(tensor)
        with self._issue("all_gather", site, phase) as call:
            own = tensor.chunk(self.size)[self.rank]
            wired = _wired(tensor, own)
            work = torch_private.all_gather_into(*wired, group=self.group, async_op=True)
        return Pending(tensor, (work,), wired, call)

    def reduce_scatter_in_place(self, tensor: torch.Tensor, *, site: str, phase: str | None = None) -> Pending:
        """Leave in this rank's equal part of `tensor`, 1-D, the sum over the axis; the rest is undefined after.

        Payload: the tensor.
        """
        if self.size == 1:
            return Pending(tensor)
        with self._issue("reduce_scatter", site, phase) as call:
            own = tensor.chunk(self.size)[self.rank]
            wired = _wired(own, tensor)
            work = torch_private.reduce_scatter_into(*wired, group=self.group, async_op=True)
        return Pending(own, (work,), wired, call)

    def reduce_scatter_into(
        self, part: torch.Tensor, tensor: torch.Tensor, *, site: str, phase: str | None = None
    ) -> Pending:
        """Fill `part` with this rank's equal part of the sum of `tensor`, both 1-D. Payload: the tensor."""
        assert self.size > 1
        with self._issue("reduce_scatter", site, phase) as call:
            wired = _wired(part, tensor)
            work = torch_private.reduce_scatter_into(*wired, group=self.group, async_op=True)
        return Pending(part, (work,), wired, call)

    def all_to_all(self, tensor: torch.Tensor, *, site: str, phase: str | None = None) -> Pending:
        """Send part i of dim 0, [size, ...], to rank i; receive what rank i sent as part i. Payload: the tensor."""
        if self.size == 1:
            return Pending(tensor)
        with self._issue("all_to_all", site, phase) as call:
            received = torch.empty_like(tensor)
            wired = _wired(received, tensor)
            work = dist.all_to_all_single(wired[0], wired[1], group=self.group, async_op=True)
        return Pending(received, (work,), wired, call)

    def shift(
        self,
        tensor: torch.Tensor,
        *,
        send_to: int,
        receive_from: int,
        site: str,
        phase: str | None = None,
        into: torch.Tensor | None = None,
    ) -> Pending:
        """Send `tensor` to one rank of the axis and receive its like from another. Payload: the tensor.

        What comes is put `into` a contiguous tensor of the same shape, perhaps a part of a larger one. The receive is
        posted first: gloo tells the sender so on the connection that carries what this rank sends, and between two
        ranks that would wait behind all of it, so that one rank could send only after the other.
        """
        if self.size == 1:
            return Pending(tensor)
        with self._issue("shift", site, phase, (send_to, receive_from)) as call:
            received = torch.empty_like(tensor) if into is None else into
            wired = _wired(received, tensor)
            ends = (dist.irecv, wired[0], receive_from), (dist.isend, wired[1], send_to)
            operations = [dist.P2POp(op, t, group=self.group, group_peer=peer) for op, t, peer in ends]
            works = dist.batch_isend_irecv(operations)
        return Pending(received, tuple(works), wired, call)

    def broadcast(self, tensor: torch.Tensor, *, site: str, source: int = 0, phase: str | None = None) -> Pending:
        """Copy `tensor` of the rank with coordinate `source` to all, in place. Payload: the tensor."""
        if self.size == 1:
            return Pending(tensor)
        wired = _wired(tensor)
        with self._issue("broadcast", site, phase) as call:
            work = dist.broadcast(wired[0], group=self.group, group_src=source, async_op=True)
        return Pending(tensor, (work,), wired, call)

    @contextmanager
    def _issue(self, operation: str, site: str, phase: str | None, peers: tuple[int, ...] = ()) -> Iterator[Call]:
        """Put on the wire, inside, what the call says."""
        phase_then = phase or current().phase or ("backward" if torch_private.in_backward() else "forward")
        call = Call(operation, self.name, site, phase_then, self.group, peers, time.perf_counter())
        with scope(site, phase, self.name), failing_as(call):
            yield call


def _side_by_side(parts: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """[size·n, ..., m, ...] -> [n, ..., size·m, ...]."""
    return parts.unflatten(0, (size, -1)).movedim(0, dim).flatten(dim, dim + 1).contiguous()

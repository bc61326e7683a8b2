"""Collectives on one mesh axis. Each returns a `Pending`: issuing and waiting are two events of the account.

The site (the module's name) is passed with every call. On an axis of one rank nothing is issued.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from meshwright.comm import torch_private
from meshwright.comm.scope import notify_wait, observed, scope

Reduction = Literal["sum", "max"]
_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass
class Pending:
    """A collective on the wire, and the tensor that will hold its result.

    While it is pending, its tensor's storage is a communication buffer of the account.
    """

    tensor: torch.Tensor
    work: dist.Work | None = None
    num_references: int = 0
    """Holders of the tensor before it was put on the wire; known only while somebody observes."""

    def wait(self) -> torch.Tensor:
        """Block until the result is there (on CUDA: make the current stream wait), and return it."""
        if self.work is not None:
            self.work.wait()
            self.work = None
            if observed():
                self._settle()
                notify_wait(self)
        return self.tensor

    def _settle(self, limit_seconds: float = 1.0) -> None:
        """Wait until the backend's thread lets go of the tensor: gloo's does so a moment after the result is there.

        Else that thread might be the last holder and free the storage, unseen by whoever follows memory on this one.
        """
        deadline = time.monotonic() + limit_seconds
        while torch_private.num_references(self.tensor) > self.num_references and time.monotonic() < deadline:
            time.sleep(0)


def _holders(tensor: torch.Tensor) -> int:
    return torch_private.num_references(tensor) if observed() else 0


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
        holders = _holders(tensor)
        with scope(site, phase):
            work = dist.all_reduce(tensor, op=_REDUCTIONS[reduction], group=self.group, async_op=True)
        return Pending(tensor, work, holders)

    def all_gather(self, tensor: torch.Tensor, *, site: str, phase: str | None = None) -> Pending:
        """Concatenate every rank's `tensor` [n, ...] along dim 0 into [size·n, ...]. Payload: the gathered tensor."""
        if self.size == 1:
            return Pending(tensor)
        with scope(site, phase):
            gathered = tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
            holders = _holders(gathered)
            work = torch_private.all_gather_into(gathered, tensor.contiguous(), group=self.group, async_op=True)
        return Pending(gathered, work, holders)

    def reduce_scatter(self, tensor: torch.Tensor, *, site: str, phase: str | None = None) -> Pending:
        """Sum `tensor` [size·n, ...] over the axis and keep this rank's [n, ...] of dim 0. Payload: the full tensor."""
        if self.size == 1:
            return Pending(tensor)
        with scope(site, phase):
            part = tensor.new_empty(tensor.shape[0] // self.size, *tensor.shape[1:])
            holders = _holders(part)
            work = torch_private.reduce_scatter_into(part, tensor.contiguous(), group=self.group, async_op=True)
        return Pending(part, work, holders)

    def broadcast(self, tensor: torch.Tensor, *, site: str, source: int = 0, phase: str | None = None) -> Pending:
        """Copy `tensor` of the rank with coordinate `source` to all, in place. Payload: the tensor."""
        if self.size == 1:
            return Pending(tensor)
        holders = _holders(tensor)
        with scope(site, phase):
            work = dist.broadcast(tensor, group=self.group, group_src=source, async_op=True)
        return Pending(tensor, work, holders)

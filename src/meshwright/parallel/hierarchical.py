"""Sums by tiers (Centauri, Chen et al. 2024), executed: what is sent when is `schemes.hierarchical`.

flat_P   [P]   contiguous, P a multiple of the ranks that cut it: summed in place
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch

from meshwright.comm.collectives import Axis, Pending
from meshwright.comm.mesh import Tiers
from meshwright.schemes.hierarchical import Hop, Relay, Stage, Sum, all_gather_hops, reduce_scatter_hops

# --- buckets, by the backend's own collectives ------------------------------------------------------------------------


class HierarchicalSum:
    """A tensor on its way through the stages."""

    def __init__(self, relay: Relay[Pending], sent: Sum[Pending]) -> None:
        self._relay, self._sent = relay, sent

    def wait(self) -> torch.Tensor:
        """Block until the sum is there (on CUDA: make the current stream wait), and return it."""
        return self._relay.finish(self._sent).wait()


class HierarchicalSums:
    """Sums over both tiers of a group, one tensor after another; all ranks must send them in the same order."""

    def __init__(self, tiers: Tiers) -> None:
        self.intra, self.inter = tiers
        self._relay: Relay[Pending] = Relay()
        self._stream: torch.cuda.Stream | None = None

    def all_reduce(self, tensor_P: torch.Tensor, *, site: str, phase: str | None = None) -> HierarchicalSum:
        """Put it on the wire, and put on what was sent before it."""
        return HierarchicalSum(self._relay, self._relay.send(partial(self._start, tensor_P, site, phase)))

    def _start(
        self, tensor_P: torch.Tensor, site: str, phase: str | None, stage: Stage, before: Pending | None
    ) -> Pending:
        if before is None:
            return self.intra.reduce_scatter_in_place(tensor_P, site=site, phase=phase)
        with self._beside(tensor_P):
            own = before.wait()
            if stage == "all_reduce":
                return self.inter.all_reduce(own, site=site, phase=phase)
            return self.intra.all_gather_in_place(tensor_P, site=site, phase=phase)

    def _beside(self, tensor: torch.Tensor) -> AbstractContextManager[object]:
        """On CUDA a stream of its own waits between stages: the one that computes waits for the whole sum only."""
        if tensor.device.type != "cuda":
            return nullcontext()
        self._stream = self._stream or torch.cuda.Stream(tensor.device)
        return torch.cuda.stream(self._stream)


# --- rings, by single hops --------------------------------------------------------------------------------------------


def ring_reduce_scatter(
    tensor_P: torch.Tensor, axis: Axis, *, site: str, phase: str | None = None, segments: int = 1
) -> torch.Tensor:
    """Leave in this rank's equal part of `tensor_P` the sum over the axis; that part. The rest is undefined after.

    P is a multiple of the ranks. With several segments, of which P/n is then a multiple, hops of one are on the wire
    while others are added, so that it never runs dry. What arrives is held beside the tensor until it is added.
    """
    parts = tensor_P.unflatten(0, (axis.size, segments, -1)).unbind(1)
    _run([_reducing(part, axis) for part in parts], site, phase)
    return tensor_P.chunk(axis.size)[axis.rank]


def ring_all_gather(
    tensor_P: torch.Tensor, axis: Axis, *, site: str, phase: str | None = None, segments: int = 1
) -> torch.Tensor:
    """Fill `tensor_P`, of which each rank has its own equal part. Sizes are as of `ring_reduce_scatter`."""
    parts = tensor_P.unflatten(0, (axis.size, segments, -1)).unbind(1)
    _run([_gathering(part, axis) for part in parts], site, phase)
    return tensor_P


def ring_all_reduce(
    tensor_P: torch.Tensor, axis: Axis, *, site: str, phase: str | None = None, segments: int = 1
) -> torch.Tensor:
    """Sum `tensor_P` over the axis, in place: rule 1. P: a multiple of n times the segments."""
    parts = [part.unflatten(0, (axis.size, -1)) for part in tensor_P.unflatten(0, (segments, -1))]
    _run([_reducing(part, axis) + _gathering(part, axis) for part in parts], site, phase)
    return tensor_P


def hierarchical_ring_all_reduce(
    tensor_P: torch.Tensor, tiers: Tiers, *, site: str, phase: str | None = None, segments: int = 1
) -> torch.Tensor:
    """Sum `tensor_P` over both tiers, in place, every stage by rings: rules 1 and 2.

    P: a multiple of r·h times the segments. With several, one is between hosts while another is inside of one.
    """
    intra, inter = tiers
    courses = []
    for segment in tensor_P.unflatten(0, (segments, -1)):
        inside = segment.unflatten(0, (intra.size, -1))
        between = inside[intra.rank].unflatten(0, (inter.size, -1))
        summed = _reducing(inside, intra) + _reducing(between, inter)
        courses.append(summed + _gathering(between, inter) + _gathering(inside, intra))
    _run(courses, site, phase)
    return tensor_P


class _Move(NamedTuple):
    """A hop: what is sent, and what is added to, or else filled with, what comes."""

    axis: Axis
    hop: Hop
    sends: torch.Tensor
    receives: torch.Tensor
    adds: bool

    def start(self, site: str, phase: str | None) -> Pending:
        """Put it on the wire."""
        into = None if self.adds else self.receives
        to, origin = self.hop.send_to, self.hop.receive_from
        return self.axis.shift(self.sends, send_to=to, receive_from=origin, site=site, phase=phase, into=into)

    def finish(self, pending: Pending) -> None:
        """It has arrived."""
        arrived = pending.wait()
        if self.adds:
            self.receives.add_(arrived)


def _reducing(parts: torch.Tensor, axis: Axis) -> list[_Move]:
    """`parts` [n, ...]: one for each rank."""
    hops = reduce_scatter_hops(axis.rank, axis.size)
    return [_Move(axis, hop, parts[hop.sends], parts[hop.receives], True) for hop in hops]


def _gathering(parts: torch.Tensor, axis: Axis) -> list[_Move]:
    hops = all_gather_hops(axis.rank, axis.size)
    return [_Move(axis, hop, parts[hop.sends], parts[hop.receives], False) for hop in hops]


def _run(courses: Sequence[Sequence[_Move]], site: str, phase: str | None) -> None:
    """Courses of as many moves side by side; in each, a move sends what the one before has brought."""
    pending = [course[0].start(site, phase) for course in courses if course]
    for index in range(len(courses[0])):
        for number, course in enumerate(courses):
            course[index].finish(pending[number])
            if index + 1 < len(course):
                pending[number] = course[index + 1].start(site, phase)

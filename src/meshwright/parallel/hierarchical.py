"""Sums by tiers (Centauri, Chen et al. 2024), executed: what is sent when is `schemes.hierarchical`.

flat_P   [P]   contiguous, P a multiple of the ranks that cut it: summed in place
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from meshwright.comm.collectives import Axis, Pending
from meshwright.comm.mesh import Tiers
from meshwright.schemes.hierarchical import Relay, Stage, Sum, all_gather_hops, reduce_scatter_hops

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


def ring_reduce_scatter(tensor_P: torch.Tensor, axis: Axis, *, site: str, phase: str | None = None) -> torch.Tensor:
    """Leave in this rank's equal part of `tensor_P` the sum over the axis; that part. The rest is undefined after.

    A hop is waited for before the next, which sends on what it brought. One part is held beside the tensor.
    """
    parts = _parts(tensor_P, axis.size)
    arriving = torch.empty_like(parts[0]) if axis.size > 1 else None
    for hop in reduce_scatter_hops(axis.rank, axis.size):
        pending = axis.shift(
            parts[hop.sends],
            send_to=hop.send_to,
            receive_from=hop.receive_from,
            site=site,
            phase=phase,
            into=arriving,
        )
        parts[hop.receives].add_(pending.wait())
    return parts[axis.rank]


def ring_all_gather(tensor_P: torch.Tensor, axis: Axis, *, site: str, phase: str | None = None) -> torch.Tensor:
    """Fill `tensor_P`, of which each rank has its own equal part."""
    parts = _parts(tensor_P, axis.size)
    for hop in all_gather_hops(axis.rank, axis.size):
        axis.shift(
            parts[hop.sends],
            send_to=hop.send_to,
            receive_from=hop.receive_from,
            site=site,
            phase=phase,
            into=parts[hop.receives],
        ).wait()
    return tensor_P


def ring_all_reduce(tensor_P: torch.Tensor, axis: Axis, *, site: str, phase: str | None = None) -> torch.Tensor:
    """Sum `tensor_P` over the axis, in place: rule 1."""
    ring_reduce_scatter(tensor_P, axis, site=site, phase=phase)
    return ring_all_gather(tensor_P, axis, site=site, phase=phase)


def hierarchical_ring_all_reduce(
    tensor_P: torch.Tensor, tiers: Tiers, *, site: str, phase: str | None = None
) -> torch.Tensor:
    """Sum `tensor_P` over both tiers, in place, every stage by rings: rules 1 and 2. P: a multiple of r·h."""
    own = ring_reduce_scatter(tensor_P, tiers.intra, site=site, phase=phase)
    ring_all_reduce(own, tiers.inter, site=site, phase=phase)
    return ring_all_gather(tensor_P, tiers.intra, site=site, phase=phase)


def _parts(tensor_P: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    assert tensor_P.ndim == 1 and tensor_P.is_contiguous() and len(tensor_P) % size == 0, (tensor_P.shape, size)
    return tensor_P.chunk(size)

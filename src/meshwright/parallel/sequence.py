"""Megatron sequence parallelism (Korthikanti et al. 2022, section 4.2), executed: the regions between layers.

    B batch   S sequence of this rank outside the tensor axis   E d_model   T tensor degree

A column-parallel layer, what follows it on the same rank, and a row-parallel layer form a tensor-parallel region. Its
input is entered on every rank and its output is left summed over the ranks. Two pairs of conjugates do that, each pair
the other's backward:

                 enter                               leave
    whole        identity                            all-reduce             outside, activations are whole on every rank
    split        all-gather [B, S/T, E] -> [B, S, E] reduce-scatter back    outside, each rank has S/T of the sequence

Entering in forward is leaving in backward, and the other way round. What each sends is `schemes.sequence`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meshwright.comm.collectives import Axis, Pending
from meshwright.schemes.tape import Pipeline


@dataclass(frozen=True)
class Region:
    """The two ends of the tensor-parallel regions of a model."""

    axis: Axis
    split: bool = False
    """Whether activations outside are split along the sequence."""
    pipeline: Pipeline | None = None
    """How products at either end are cut, so that the communication runs under them; None: they are not."""

    def enter(self, x: torch.Tensor, site: str) -> Pending:
        """[B, S/T, E] -> [B, S, E] if split; else x itself."""
        return self.axis.all_gather(x, dim=1, site=site) if self.split else Pending(x)

    def leave(self, y: torch.Tensor, site: str) -> Pending:
        """[B, S, E] -> the sum over the axis of this rank's [B, S/T, E] if split; else the sum of all, in place."""
        return self.axis.reduce_scatter(y, dim=1, site=site) if self.split else self.axis.all_reduce(y, site=site)

    def own(self, x_S: torch.Tensor) -> torch.Tensor:
        """This rank's part of something that has one element a position."""
        return x_S.chunk(self.axis.size)[self.axis.rank] if self.split else x_S

"""The one function that divides a global batch among ranks.

Micro-batch a of the step is the same set of sequences for every layout; its sequences are divided, in order, over
replicate × shard. Which sequences a rank sees therefore never depends on `tensor`, and the batch as a whole on nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from meshwright.config.tree import Job
from meshwright.training.step import Batch


def local_sequences(job: Job, coordinates: Mapping[str, int]) -> list[range]:
    """Indices into the global batch of this rank's sequences, for each micro-batch."""
    layout, training = job.layout, job.training
    per_micro_batch = training.batch // training.accumulation
    per_rank = per_micro_batch // layout.batch_ranks
    first = (coordinates["replicate"] * layout.shard + coordinates["shard"]) * per_rank
    starts = (a * per_micro_batch + first for a in range(training.accumulation))
    return [range(start, start + per_rank) for start in starts]


def shard_batch(tokens: torch.Tensor, labels: torch.Tensor, job: Job, coordinates: Mapping[str, int]) -> Batch:
    """This rank's `Batch` of a global batch: tokens and labels [batch, seq_len] int64."""
    rows = torch.tensor([list(indices) for indices in local_sequences(job, coordinates)])
    positions = torch.arange(job.training.seq_len)
    return Batch(tokens[rows].contiguous(), labels[rows].contiguous(), positions)

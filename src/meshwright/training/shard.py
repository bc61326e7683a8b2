"""The one function that divides a global batch among ranks, and its inverse.

Micro-batch a of the step is the same set of sequences for every layout. Its sequences are divided, in order, over
replicate × shard; each sequence is divided over ring × ulysses: a ring rank has its chunks (one, or one from either
end) in rising order, and ulysses ranks divide those in rank order. Which tokens a rank sees therefore never depends on
`tensor` (sequence parallelism divides inside the model), and the batch as a whole on nothing.

Sequences whose length does not divide are filled up by `training.pad`: token 0 without a label, at the end, where no
token that counts attends to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from meshwright.config.tree import Job, Layout
from meshwright.parallel.loss import IGNORE
from meshwright.schemes.ring import owned_chunks
from meshwright.training.step import Batch


def local_sequences(job: Job, coordinates: Mapping[str, int]) -> list[range]:
    """Indices into the global batch of this rank's sequences, for each micro-batch."""
    layout, training = job.layout, job.training
    per_micro_batch = training.batch // training.accumulation
    per_rank = per_micro_batch // layout.batch_ranks
    first = (coordinates["replicate"] * layout.shard + coordinates["shard"]) * per_rank
    starts = (a * per_micro_batch + first for a in range(training.accumulation))
    return [range(start, start + per_rank) for start in starts]


def local_positions(layout: Layout, seq_len: int, coordinates: Mapping[str, int]) -> torch.Tensor:
    """[S] int64: the global position of each token of this rank, in the order in which it holds them.

    Positions at or above `seq_len` are padding.
    """
    return attended_positions(layout, seq_len, coordinates).chunk(layout.ulysses)[coordinates["ulysses"]]


def attended_positions(layout: Layout, seq_len: int, coordinates: Mapping[str, int]) -> torch.Tensor:
    """[U·S] int64: those of the queries that this rank attends with, once ulysses has exchanged sequence for heads."""
    chunks = owned_chunks(coordinates["ring"], layout.ring, layout.ring_order) if layout.ring > 1 else (0,)
    length = layout.padded(seq_len) // (layout.ring * len(chunks))
    return torch.cat([torch.arange(chunk * length, (chunk + 1) * length) for chunk in chunks])


def shard_batch(
    tokens: torch.Tensor,
    labels: torch.Tensor,
    job: Job,
    coordinates: Mapping[str, int],
    first: torch.Tensor | None = None,
) -> Batch:
    """This rank's `Batch` of a global batch: tokens, labels and, if they matter, document starts [batch, seq_len]."""
    rows = torch.tensor([list(indices) for indices in local_sequences(job, coordinates)], device=tokens.device)
    return split_sequences(tokens[rows], labels[rows], job, coordinates, None if first is None else first[rows])


def split_sequences(
    tokens: torch.Tensor,
    labels: torch.Tensor,
    job: Job,
    coordinates: Mapping[str, int],
    first: torch.Tensor | None = None,
) -> Batch:
    """This rank's part of sequences that are its own, all [A, B, seq_len] int64, on any device.

    `first`: the position at which the document of each token begins; padding is a document of its own.
    """
    layout, seq_len = job.layout, job.training.seq_len
    positions = local_positions(layout, seq_len, coordinates).to(tokens.device)
    missing = layout.padded(seq_len) - seq_len
    filled = (F.pad(x, (0, missing), value=fill) for x, fill in ((tokens, 0), (labels, IGNORE)))
    own_tokens, own_labels = (x[..., positions] for x in filled)  # copies: each has a storage of its own
    if first is not None:
        attended = attended_positions(layout, seq_len, coordinates).to(tokens.device)
        first = F.pad(first, (0, missing), value=seq_len)[..., attended]
    # Padding repeats the last position: a learned table has no more.
    return Batch(own_tokens, own_labels, positions.clamp(max=seq_len - 1), first)


def unshard(parts: Sequence[torch.Tensor], job: Job) -> torch.Tensor:
    """The global [batch, seq_len, ...] from every rank's [A, B, S, ...], in rank order: `shard_batch`'s inverse.

    Where ranks hold the same part (those of a tensor axis), the last one's counts; padding is dropped.
    """
    layout, training = job.layout, job.training
    first = parts[0]
    whole = first.new_zeros((training.batch, layout.padded(training.seq_len), *first.shape[3:]))
    for rank, part in enumerate(parts):
        coordinates = layout.coordinates(rank)
        positions = local_positions(layout, training.seq_len, coordinates)
        for own, rows in zip(part, local_sequences(job, coordinates), strict=True):
            whole[rows.start : rows.stop, positions] = own
    return whole[:, : training.seq_len]

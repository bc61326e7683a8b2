"""How a global batch is divided: every rank's part put together again is the batch, for any layout and any length."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import tiny_job

from meshwright.config.tree import Job, Layout
from meshwright.parallel.loss import IGNORE
from meshwright.training.shard import attended_positions, local_positions, local_sequences, shard_batch, unshard
from meshwright.training.step import Batch

SPLITTING = ("replicate", "shard", "ring", "ulysses", "tensor")
LARGEST_WORLD = 8


def token_at(sequence: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Every token of the global batch names its place; none is 0, which is padding."""
    return 1000 * (sequence + 1) + position


def global_batch(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and labels that are the next token; every seventh is missing."""
    sequences, positions = torch.arange(job.training.batch)[:, None], torch.arange(job.training.seq_len)
    tokens = token_at(sequences, positions)
    return tokens, (tokens + 1).masked_fill(tokens % 7 == 0, IGNORE)


def shards(job: Job) -> list[Batch]:
    """Every rank's part."""
    batch = global_batch(job)
    return [shard_batch(*batch, job, job.layout.coordinates(rank)) for rank in range(job.layout.world)]


@st.composite
def jobs(draw: st.DrawFn, axis: str, degree: int) -> Job:
    """A job with a given degree on one axis, whatever the others are, of at most so many ranks."""
    degrees = {axis: degree}
    for other in draw(st.permutations([name for name in SPLITTING if name != axis])):
        degrees[other] = draw(st.integers(1, LARGEST_WORLD // math.prod(degrees.values())))
    layout = Layout(
        **degrees,
        ring_order=draw(st.sampled_from(["contiguous", "zigzag"])),
        sequence_parallel=draw(st.booleans()),
    )
    accumulation = draw(st.integers(1, 3))
    pad = draw(st.booleans())
    return tiny_job(
        layout=layout,
        accumulation=accumulation,
        batch=layout.batch_ranks * accumulation * draw(st.integers(1, 3)),
        seq_len=draw(st.integers(1, 40)) if pad else layout.sequence_parts * draw(st.integers(1, 4)),
        pad=pad,
    )


@pytest.mark.parametrize("degree", range(1, LARGEST_WORLD + 1))
@pytest.mark.parametrize("axis", SPLITTING)
def test_what_is_divided_can_be_put_together_again(axis: str, degree: int) -> None:
    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(jobs(axis, degree))
    def check(job: Job) -> None:
        assert job.layout.degree(axis) == degree
        parts, (tokens, labels) = shards(job), global_batch(job)
        _every_position_has_one_owner(job)
        for rank, part in enumerate(parts):
            _tokens_labels_and_positions_agree(job, rank, part)
        assert torch.equal(unshard([part.tokens for part in parts], job), tokens)
        assert torch.equal(unshard([part.labels for part in parts], job), labels)
        features = [torch.stack([part.tokens, -part.tokens], dim=-1).double() for part in parts]
        assert torch.equal(unshard(features, job), torch.stack([tokens, -tokens], dim=-1).double())

    check()


def _every_position_has_one_owner(job: Job) -> None:
    """Each position of each sequence of the padded batch, at as many ranks as share it: those of the tensor axis."""
    layout, training = job.layout, job.training
    owners: Counter[tuple[int, int]] = Counter()
    for rank in range(layout.world):
        coordinates = layout.coordinates(rank)
        positions = local_positions(layout, training.seq_len, coordinates).tolist()
        owners.update((row, p) for rows in local_sequences(job, coordinates) for row in rows for p in positions)
    padded = layout.padded(training.seq_len)
    assert owners == {(row, p): layout.tensor for row in range(training.batch) for p in range(padded)}
    assert training.seq_len <= padded < training.seq_len + layout.sequence_parts
    assert padded == training.seq_len or training.pad


def _tokens_labels_and_positions_agree(job: Job, rank: int, part: Batch) -> None:
    """Each token is the one of its position, each label the one after it; padding has a token and no label."""
    layout, training = job.layout, job.training
    coordinates = layout.coordinates(rank)
    own = local_positions(layout, training.seq_len, coordinates)
    rows = torch.tensor([list(rows) for rows in local_sequences(job, coordinates)])[..., None]
    expected = token_at(rows, own)
    labels = (expected + 1).masked_fill(expected % 7 == 0, IGNORE)
    padding = own >= training.seq_len
    assert torch.equal(part.tokens, expected.masked_fill(padding, 0))
    assert torch.equal(part.labels, labels.masked_fill(padding, IGNORE))
    assert torch.equal(part.positions, own.clamp(max=training.seq_len - 1))
    assert {x.dtype for x in part[:3]} == {torch.int64} and part.first is None
    shape = (training.accumulation, training.batch // training.accumulation // layout.batch_ranks, len(own))
    assert part.tokens.shape == part.labels.shape == shape
    # What a rank attends with is what the ranks of its ulysses group hold, joined in rank order: a causal mask by
    # local order is right because positions rise.
    attended = attended_positions(layout, training.seq_len, coordinates)
    group = [local_positions(layout, training.seq_len, coordinates | {"ulysses": u}) for u in range(layout.ulysses)]
    assert torch.equal(torch.cat(group), attended)
    assert torch.all(attended.diff() > 0)


def test_zigzag_ring_by_ulysses_by_hand() -> None:
    """Four chunks of two tokens: ring rank 0 has the first and the last, and ulysses divides what a ring rank has."""
    job = tiny_job(layout=Layout(ring=2, ulysses=2), batch=1, seq_len=8)
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15, 16, 17]])
    labels = torch.tensor([[11, 12, 13, IGNORE, 15, 16, 17, 18]])
    parts = [shard_batch(tokens, labels, job, job.layout.coordinates(rank)) for rank in range(4)]
    assert [tuple(x.flatten().tolist() for x in part[:3]) for part in parts] == [
        ([10, 11], [11, 12], [0, 1]),
        ([16, 17], [17, 18], [6, 7]),
        ([12, 13], [13, IGNORE], [2, 3]),
        ([14, 15], [15, 16], [4, 5]),
    ]
    assert torch.equal(unshard([part.tokens for part in parts], job), tokens)


@pytest.mark.parametrize("layout", [Layout(), Layout(ulysses=3), Layout(tensor=2)], ids=["1", "ulysses", "tensor"])
def test_without_a_ring_nothing_need_be_even(layout: Layout) -> None:
    """Zigzag, the default order, has two chunks a rank; one rank has the whole sequence, whatever its length."""
    parts = [local_positions(layout, 15, layout.coordinates(rank)) for rank in range(layout.ulysses)]
    assert torch.cat(parts).tolist() == list(range(15))


def test_padding_by_hand() -> None:
    """Five tokens on the same four ranks: three of padding, two of them beside the first chunk of ring rank 0."""
    job = tiny_job(layout=Layout(ring=2, ulysses=2), batch=1, seq_len=5, pad=True)
    tokens, labels = torch.tensor([[10, 11, 12, 13, 14]]), torch.tensor([[11, 12, 13, 14, 15]])
    parts = [shard_batch(tokens, labels, job, job.layout.coordinates(rank)) for rank in range(4)]
    assert [tuple(x.flatten().tolist() for x in part[:3]) for part in parts] == [
        ([10, 11], [11, 12], [0, 1]),
        ([0, 0], [IGNORE, IGNORE], [4, 4]),
        ([12, 13], [13, 14], [2, 3]),
        ([14, 0], [15, IGNORE], [4, 4]),
    ]
    assert torch.equal(unshard([part.tokens for part in parts], job), tokens)


def test_micro_batches_are_the_same_sequences_for_every_layout() -> None:
    """Micro-batch a of the ranks together: sequences 4·a to 4·a + 3."""
    for layout in (Layout(), Layout(replicate=2), Layout(replicate=2, shard=2), Layout(shard=4, ring=2)):
        job = tiny_job(layout=layout, accumulation=2, batch=8)
        held = [local_sequences(job, layout.coordinates(rank)) for rank in range(layout.world)]
        for a in range(2):
            assert sorted({row for rows in held for row in rows[a]}) == [4 * a, 4 * a + 1, 4 * a + 2, 4 * a + 3]
    job = tiny_job(layout=Layout(replicate=2, shard=2, tensor=2), accumulation=2, batch=8)
    by_rank = [[list(rows) for rows in local_sequences(job, job.layout.coordinates(rank))] for rank in range(8)]
    assert by_rank == [[[0], [4]]] * 2 + [[[1], [5]]] * 2 + [[[2], [6]]] * 2 + [[[3], [7]]] * 2


def test_parts_have_storages_of_their_own() -> None:
    """Writing labels must not write tokens, nor the global batch."""
    for layout in (Layout(), Layout(ring=2), Layout(replicate=2)):
        job = tiny_job(layout=layout, batch=2)
        tokens, labels = global_batch(job)
        part = shard_batch(tokens, labels, job, layout.coordinates(0))
        before = part.tokens.clone()
        part.labels.fill_(IGNORE)
        part.positions.fill_(0)
        assert torch.equal(part.tokens, before)
        assert all(torch.equal(x, y) for x, y in zip(global_batch(job), (tokens, labels), strict=True))


def test_the_comparison_can_fail() -> None:
    """A part of the wrong order of chunks does not make the batch whole again."""
    job = tiny_job(layout=Layout(ring=2), batch=2)
    other = replace(job, layout=replace(job.layout, ring_order="contiguous"))
    assert not torch.equal(unshard([part.tokens for part in shards(job)], other), global_batch(job)[0])

"""A smaller model of the same kinds and divisibility, to verify a layout whose model does not fit here."""

from __future__ import annotations

import math
from dataclasses import replace

from meshwright.config.attention import FLASH_HEAD_DIMS
from meshwright.config.tree import Job, Model

LAYERS = 2
HEAD_DIM = 8
PART = 16
"""Rows of a split dim that each rank keeps."""


def shrink_job(job: Job) -> Job:
    """Two layers and a few rows a rank; what divides, and what has a remainder, stays so."""
    layout, training = job.layout, job.training
    heads, kv_heads = _heads(job.model, layout.tensor * layout.ulysses)
    model = replace(
        job.model,
        layers=min(job.model.layers, LAYERS),
        d_model=min(job.model.d_model, heads * HEAD_DIM),
        d_ff=min(job.model.d_ff, layout.tensor * PART),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=min(job.model.head_dim, FLASH_HEAD_DIMS[0] if training.attention == "flash" else HEAD_DIM),
        vocab_size=min(job.model.vocab_size, layout.tensor * PART + job.model.vocab_size % layout.tensor),
    )
    parts = 2 * layout.ring * layout.ulysses
    training = replace(
        training,
        batch=layout.batch_ranks * training.accumulation * (2 if layout.halves else 1),
        seq_len=min(training.seq_len, parts * max(1, PART // parts)),
    )
    return replace(job, model=model, training=training)


def _heads(model: Model, degree: int) -> tuple[int, int]:
    """The fewest heads that keep grouped or multi-head attention, and KV heads above, at or below the degree."""
    if model.kv_heads < degree:
        kv_heads = model.kv_heads
        return min(model.heads, math.lcm(degree, kv_heads)), kv_heads
    group = min(model.heads // model.kv_heads, 2)
    kv_heads = min(model.kv_heads, degree * min(2, model.kv_heads // degree))
    return kv_heads * group, kv_heads

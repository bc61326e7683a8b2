"""The cells of the agreement matrix: tiny models, layouts, precisions and options.

Two matrices: tensor and data parallelism, the full product; and layouts that divide the sequence or compute again, each
with every model and recomputation, where precision, chunks of the loss and documents take turns.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, TypeVar

from meshwright.config.tree import Job, Layout, Model, Training

# Narrow models have four layers: the few kilobytes in which oneDNN reorders a bf16 operand, seen by the profiler alone,
# must be small beside the model.
MODELS = {
    "grouped_query": Model(layers=2, d_model=64, d_ff=96, heads=8, kv_heads=4, head_dim=8, vocab_size=64),
    "kv_heads_below_tensor": Model(layers=4, d_model=32, d_ff=64, heads=4, kv_heads=1, head_dim=8, vocab_size=48),
    "tied": Model(layers=4, d_model=32, d_ff=96, heads=4, kv_heads=4, head_dim=8, vocab_size=64, tied=True),
    "layernorm_bias_learned": Model(
        layers=4,
        d_model=32,
        d_ff=128,
        heads=4,
        kv_heads=4,
        head_dim=8,
        vocab_size=64,
        norm="layernorm",
        bias=True,
        positions="learned",
        mlp="gelu",
    ),
    "odd_vocabulary": Model(layers=4, d_model=32, d_ff=64, heads=4, kv_heads=2, head_dim=8, vocab_size=61),
}

LAYOUTS = {
    "1": Layout(),
    "replicate 2": Layout(replicate=2),
    "tensor 2": Layout(tensor=2),
    "replicate 2 × tensor 2": Layout(replicate=2, tensor=2),
    "tensor 4": Layout(tensor=4),
    "replicate 4": Layout(replicate=4),
}

C = TypeVar("C", "Case", "LongCase")

Precision = Literal["float32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bf16")
ACCUMULATIONS = (1, 2)


LONG_MODELS = {
    "multi_head": Model(layers=4, d_model=64, d_ff=192, heads=8, kv_heads=8, head_dim=8, vocab_size=64),
    "grouped_query": Model(layers=4, d_model=64, d_ff=192, heads=8, kv_heads=4, head_dim=8, vocab_size=64),
    "kv_heads_below_degree": Model(
        layers=4, d_model=64, d_ff=192, heads=8, kv_heads=1, head_dim=8, vocab_size=61, bias=True, norm="layernorm"
    ),
}

LONG_LAYOUTS = {
    "1": Layout(),
    "tensor 2, sequence parallel": Layout(tensor=2, sequence_parallel=True),
    "tensor 4, sequence parallel": Layout(tensor=4, sequence_parallel=True),
    "ulysses 2": Layout(ulysses=2),
    "ulysses 4": Layout(ulysses=4),
    "ring 2": Layout(ring=2),
    "ring 3": Layout(ring=3),
    "ring 3, contiguous": Layout(ring=3, ring_order="contiguous"),
    "ring 4": Layout(ring=4),
    "ring 4, contiguous": Layout(ring=4, ring_order="contiguous"),
    "ring 2 × ulysses 2": Layout(ring=2, ulysses=2),
    "ring 2 × ulysses 2, contiguous": Layout(ring=2, ulysses=2, ring_order="contiguous"),
    "ulysses 2 × tensor 2": Layout(ulysses=2, tensor=2),
    "ulysses 2 × tensor 2, sequence parallel": Layout(ulysses=2, tensor=2, sequence_parallel=True),
    "ring 2 × tensor 2": Layout(ring=2, tensor=2),
    "ring 2 × tensor 2, sequence parallel": Layout(ring=2, tensor=2, sequence_parallel=True),
    "replicate 2 × ring 2": Layout(replicate=2, ring=2),
    "ring 2 × ulysses 2 × tensor 2, sequence parallel": Layout(ring=2, ulysses=2, tensor=2, sequence_parallel=True),
}

Recompute = Literal["none", "selective", "full"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")

LOSS_CHUNKS = (0, 20)
"""20 divides no rank's tokens: the last chunk is a short one."""


Documents = Literal["joined", "separate"]
DOCUMENTS: tuple[Documents, ...] = ("joined", "joined", "separate")
"""Every third case has a mask of documents."""


class Case(NamedTuple):
    """One cell of the matrix, by the names of its options."""

    model: str
    layout: str
    precision: Precision
    accumulation: int

    @property
    def job(self) -> Job:
        """The job it stands for."""
        training = Training(batch=8, seq_len=16, precision=self.precision, accumulation=self.accumulation, device="cpu")
        return Job(name=str(self), model=MODELS[self.model], layout=LAYOUTS[self.layout], training=training)

    def __str__(self) -> str:
        return f"{self.model}, {self.layout}, {self.precision}, accumulation {self.accumulation}"


class LongCase(NamedTuple):
    """One cell of the matrix of layouts that divide the sequence or compute again."""

    model: str
    layout: str
    recompute: Recompute
    precision: Precision
    loss_chunk: int
    documents: Documents

    @property
    def job(self) -> Job:
        """The job it stands for: one sequence a rank, or two where the batch is replicated."""
        layout = replace(LONG_LAYOUTS[self.layout], recompute=self.recompute)
        training = Training(
            batch=2,
            seq_len=48,
            precision=self.precision,
            loss_chunk=self.loss_chunk,
            documents=self.documents,
            device="cpu",
        )
        return Job(name=str(self), model=LONG_MODELS[self.model], layout=layout, training=training)

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.layout}, recompute {self.recompute}, {self.precision}, loss chunk {self.loss_chunk}, "
            f"documents {self.documents}"
        )


AnyCase = Case | LongCase


def all_cases() -> list[Case]:
    """The whole matrix of tensor and data parallelism."""
    return [Case(*options) for options in itertools.product(MODELS, LAYOUTS, PRECISIONS, ACCUMULATIONS)]


def all_long_cases() -> list[LongCase]:
    """Every model, layout and recomputation; precision, chunks and documents take turns so that all pairs occur."""
    cells = itertools.product(LONG_MODELS, LONG_LAYOUTS, RECOMPUTES)
    turns = itertools.cycle(itertools.product(PRECISIONS, LOSS_CHUNKS, DOCUMENTS))
    return [LongCase(*cell, *turn) for cell, turn in zip(cells, turns, strict=False)]


def covering_cases(cases: Sequence[C], at_least: int = 0) -> list[C]:
    """A fixed selection in which every pair of option values that there is occurs; greedy, then filled up."""
    chosen: list[C] = []
    missing = {pair for case in cases for pair in pairs(case)}
    while missing:
        best = max(cases, key=lambda case: len(missing & pairs(case)))
        chosen.append(best)
        missing -= pairs(best)
    others = [case for case in cases if case not in chosen]
    wanted = max(0, at_least - len(chosen))
    return chosen + others[:: max(1, len(others) // wanted)][:wanted] if wanted else chosen


def pairs(case: AnyCase) -> set[tuple[tuple[str, object], ...]]:
    """The pairs of option values of a case."""
    return set(itertools.combinations(zip(case._fields, case, strict=True), 2))

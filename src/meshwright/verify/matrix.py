"""The cells of the agreement matrix: tiny models, layouts, precisions and options.

Six matrices: tensor and data parallelism, the full product; layouts that divide the sequence or compute again, each
with every model and recomputation, where precision, chunks of the loss and documents take turns; layouts by how
they sum gradients and shard states, each with every model, where precision, accumulation and other options take turns;
layouts whose products are cut so that communication runs under them, each with every model and ring; layouts whose
blocks run in two half-batches, each with every model; and other attention kernels than torch's, each with every model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, TypeVar

from meshwright.config.attention import Attention
from meshwright.config.tree import Cluster, Job, Layout, Model, Training

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

C = TypeVar("C", "Case", "LongCase", "StateCase", "OverlapCase", "HalfCase", "AttentionCase")

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

STATE_MODELS = {
    "tied": replace(MODELS["tied"], layers=3),
    "layernorm_bias_learned": replace(MODELS["layernorm_bias_learned"], layers=3),
    "odd_sizes": Model(layers=3, d_model=36, d_ff=60, heads=6, kv_heads=2, head_dim=6, vocab_size=61),
}
"""36 and 60 rows, and those of a vocabulary of 61, are not divisible by 8 ranks, nor all by 4."""

_SMALL_MIB = 0.02
"""So that tiny models have several buckets."""

STATE_LAYOUTS = {
    "replicate 2, flat": Layout(replicate=2, gradients="flat"),
    "replicate 2, per_parameter": Layout(replicate=2, gradients="per_parameter"),
    "replicate 2, bucketed": Layout(replicate=2, bucket_mib=_SMALL_MIB),
    "replicate 2 × tensor 2, naive": Layout(replicate=2, tensor=2, gradients="naive"),
    "replicate 2 × tensor 2, flat, sequence parallel": Layout(
        replicate=2, tensor=2, gradients="flat", sequence_parallel=True
    ),
    "replicate 2 × tensor 2, per_parameter": Layout(replicate=2, tensor=2, gradients="per_parameter"),
    "replicate 2 × tensor 2, bucketed": Layout(replicate=2, tensor=2, bucket_mib=_SMALL_MIB),
    "replicate 2 × ulysses 2, bucketed": Layout(replicate=2, ulysses=2, bucket_mib=_SMALL_MIB),
    "ring 2, bucketed": Layout(ring=2, bucket_mib=_SMALL_MIB),
    "ulysses 2, zero 1": Layout(ulysses=2, zero=1, bucket_mib=_SMALL_MIB),
    "ring 2, zero 1": Layout(ring=2, zero=1, gradients="per_parameter"),
    "shard 2, zero 1": Layout(shard=2, zero=1, bucket_mib=_SMALL_MIB),
    "shard 2, zero 2": Layout(shard=2, zero=2),
    "shard 2, zero 3": Layout(shard=2),
    "shard 4, zero 3, prefetch 2": Layout(shard=4, prefetch=2),
    "shard 4, zero 2, prefetch 3": Layout(shard=4, zero=2, prefetch=3),
    "shard 3, zero 3": Layout(shard=3),
    "shard 3, zero 1, flat": Layout(shard=3, zero=1, gradients="flat"),
    "replicate 2 × shard 2, zero 1": Layout(replicate=2, shard=2, zero=1, bucket_mib=_SMALL_MIB),
    "replicate 2 × shard 2, zero 2": Layout(replicate=2, shard=2, zero=2),
    "replicate 2 × shard 2, zero 3": Layout(replicate=2, shard=2),
    "shard 2 × tensor 2, zero 1": Layout(shard=2, tensor=2, zero=1, bucket_mib=_SMALL_MIB),
    "shard 2 × tensor 2, zero 1, naive, sequence parallel": Layout(
        shard=2, tensor=2, zero=1, gradients="naive", sequence_parallel=True
    ),
    "shard 2 × tensor 2, zero 2": Layout(shard=2, tensor=2, zero=2),
    "shard 2 × tensor 2, zero 3, sequence parallel": Layout(shard=2, tensor=2, sequence_parallel=True),
    "shard 2 × ulysses 2, zero 1": Layout(shard=2, ulysses=2, zero=1, bucket_mib=_SMALL_MIB),
    "shard 2 × ulysses 2, zero 2": Layout(shard=2, ulysses=2, zero=2),
    "shard 2 × ulysses 2, zero 3": Layout(shard=2, ulysses=2),
    "ulysses 2, zero 3": Layout(ulysses=2, zero=3),
    "shard 2 × ring 2, zero 1": Layout(shard=2, ring=2, zero=1, bucket_mib=_SMALL_MIB),
    "shard 2 × ring 2, zero 2": Layout(shard=2, ring=2, zero=2),
    "shard 2 × ring 2, zero 3": Layout(shard=2, ring=2),
    "ring 2, zero 3": Layout(ring=2, zero=3),
    "replicate 2 × shard 2 × tensor 2, zero 3": Layout(replicate=2, shard=2, tensor=2),
    "replicate 2 × ring 2 × ulysses 2, zero 3": Layout(replicate=2, ring=2, ulysses=2, zero=3),
    "replicate 4, naive, hierarchical": Layout(replicate=4, gradients="naive", hierarchical=True),
    "replicate 4, flat, hierarchical": Layout(replicate=4, gradients="flat", hierarchical=True),
    "replicate 4, bucketed, hierarchical": Layout(replicate=4, bucket_mib=_SMALL_MIB, hierarchical=True),
    "replicate 2 × ring 2, bucketed, hierarchical": Layout(
        replicate=2, ring=2, bucket_mib=_SMALL_MIB, hierarchical=True
    ),
    "ring 2 × ulysses 2, per_parameter, hierarchical": Layout(
        ring=2, ulysses=2, gradients="per_parameter", hierarchical=True
    ),
    "replicate 2 × ring 2, naive, hierarchical": Layout(replicate=2, ring=2, gradients="naive", hierarchical=True),
}

STATE_ACCUMULATIONS = (1, 2, 3)

OVERLAP_LAYOUTS = {
    "tensor 2": Layout(tensor=2),
    "tensor 2, sequence parallel": Layout(tensor=2, sequence_parallel=True),
    "tensor 4": Layout(tensor=4),
    "tensor 4, sequence parallel": Layout(tensor=4, sequence_parallel=True),
    "replicate 2 × tensor 2": Layout(replicate=2, tensor=2, bucket_mib=_SMALL_MIB),
    "replicate 2 × tensor 2, sequence parallel": Layout(replicate=2, tensor=2, sequence_parallel=True),
    "shard 2 × tensor 2, zero 1": Layout(shard=2, tensor=2, zero=1, bucket_mib=_SMALL_MIB),
    "shard 2 × tensor 2, zero 2, sequence parallel": Layout(shard=2, tensor=2, zero=2, sequence_parallel=True),
    "shard 2 × tensor 2, zero 3": Layout(shard=2, tensor=2),
    "shard 2 × tensor 2, zero 3, sequence parallel": Layout(shard=2, tensor=2, sequence_parallel=True),
    "ulysses 2 × tensor 2": Layout(ulysses=2, tensor=2),
    "ulysses 2 × tensor 2, sequence parallel": Layout(ulysses=2, tensor=2, sequence_parallel=True),
    "ring 2 × tensor 2": Layout(ring=2, tensor=2),
    "ring 2 × tensor 2, sequence parallel": Layout(ring=2, tensor=2, sequence_parallel=True),
}

OVERLAP_CHUNKS = (1, 3, 4)
"""3 divides no rank's rows, and its second piece has rows of both sequences."""

Ring = Literal["unidirectional", "bidirectional"]
OVERLAP_RINGS: tuple[Ring, ...] = ("unidirectional", "bidirectional")

HALF_MODELS = {
    "layernorm_bias_learned": MODELS["layernorm_bias_learned"],
    "kv_heads_below_degree": LONG_MODELS["kv_heads_below_degree"],
    "peak_in_blocks": Model(layers=2, d_model=64, d_ff=704, heads=8, kv_heads=4, head_dim=8, vocab_size=16),
}
"""In the last one, the most memory is in use inside a block also where nothing is computed again."""

HALF_LAYOUTS = {
    name: OVERLAP_LAYOUTS[name]
    for name in (
        "tensor 2",
        "tensor 2, sequence parallel",
        "tensor 4, sequence parallel",
        "replicate 2 × tensor 2",
        "shard 2 × tensor 2, zero 1",
        "shard 2 × tensor 2, zero 2, sequence parallel",
        "shard 2 × tensor 2, zero 3",
        "ulysses 2 × tensor 2, sequence parallel",
        "ring 2 × tensor 2",
    )
}

HALF_SEQUENCES = (2, 4)
"""In a micro-batch of a rank: a half of one sequence is gathered and scattered without a copy, one of two is not."""

Recompute = Literal["none", "selective", "full"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")

LOSS_CHUNKS = (0, 20)
"""20 divides no rank's tokens: the last chunk is a short one."""


ATTENTION_MODELS = {
    "multi_head": Model(layers=3, d_model=64, d_ff=96, heads=4, kv_heads=4, head_dim=16, vocab_size=64),
    "grouped_query": Model(layers=3, d_model=64, d_ff=96, heads=8, kv_heads=4, head_dim=16, vocab_size=64),
    "kv_heads_below_degree": Model(
        layers=3, d_model=32, d_ff=64, heads=4, kv_heads=1, head_dim=16, vocab_size=61, positions="learned"
    ),
}

ATTENTION_LAYOUTS = {
    name: LONG_LAYOUTS[name]
    for name in (
        "1",
        "tensor 2, sequence parallel",
        "ulysses 2",
        "ring 2",
        "ring 3",
        "ring 3, contiguous",
        "ring 2 × ulysses 2",
        "ulysses 2 × tensor 2, sequence parallel",
        "replicate 2 × ring 2",
    )
} | {"tensor 2, half-batches": Layout(tensor=2, overlap="none", half_batches=True)}

OTHER_ATTENTIONS: tuple[Attention, ...] = ("naive", "flash")
"""Beside sdpa, which the other matrices have. FlexAttention does not run on a CPU."""

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


class StateCase(NamedTuple):
    """One cell of the matrix of layouts that sum gradients and shard states."""

    model: str
    layout: str
    precision: Precision
    accumulation: int
    recompute: Recompute
    loss_chunk: int
    reduce: Precision

    @property
    def job(self) -> Job:
        """The job it stands for: twelve sequences a micro-batch, for 1 to 4 ranks."""
        layout = replace(STATE_LAYOUTS[self.layout], recompute=self.recompute)
        training = Training(
            batch=12 * self.accumulation,
            seq_len=8,
            precision=self.precision,
            accumulation=self.accumulation,
            loss_chunk=self.loss_chunk,
            reduce_precision=self.reduce if layout.zero_stage >= 2 else "float32",
            device="cpu",
        )
        cluster = Cluster(hosts=2, devices_per_host=layout.world // 2) if layout.hierarchical else Cluster()
        return Job(str(self), STATE_MODELS[self.model], layout, cluster, training)

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.layout}, {self.precision}, accumulation {self.accumulation}, recompute "
            f"{self.recompute}, loss chunk {self.loss_chunk}, reduce {self.reduce}"
        )


class OverlapCase(NamedTuple):
    """One cell of the matrix of layouts whose products are cut so that communication runs under them."""

    model: str
    layout: str
    ring: Ring
    chunks: int
    recompute: Recompute
    precision: Precision
    loss_chunk: int

    @property
    def job(self) -> Job:
        """The job it stands for: two sequences a micro-batch, of a length that 3 chunks do not divide."""
        layout = replace(
            OVERLAP_LAYOUTS[self.layout],
            overlap="pipelined",
            overlap_chunks=self.chunks,
            overlap_ring=self.ring,
            recompute=self.recompute,
        )
        training = Training(
            batch=2 * layout.batch_ranks,
            seq_len=56,
            precision=self.precision,
            loss_chunk=self.loss_chunk,
            device="cpu",
        )
        return Job(name=str(self), model=LONG_MODELS[self.model], layout=layout, training=training)

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.layout}, pipelined, {self.ring}, {self.chunks} chunks, recompute {self.recompute}, "
            f"{self.precision}, loss chunk {self.loss_chunk}"
        )


class HalfCase(NamedTuple):
    """One cell of the matrix of layouts whose blocks run in two half-batches."""

    model: str
    layout: str
    sequences: int
    recompute: Recompute
    precision: Precision
    documents: Documents
    accumulation: int

    @property
    def job(self) -> Job:
        """The job it stands for. The loss is in chunks, so that not all peaks are its own."""
        layout = replace(HALF_LAYOUTS[self.layout], overlap="none", half_batches=True, recompute=self.recompute)
        training = Training(
            batch=self.sequences * layout.batch_ranks * self.accumulation,
            seq_len=40,
            accumulation=self.accumulation,
            precision=self.precision,
            documents=self.documents,
            loss_chunk=20,
            device="cpu",
        )
        return Job(name=str(self), model=HALF_MODELS[self.model], layout=layout, training=training)

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.layout}, half-batches of {self.sequences // 2}, recompute {self.recompute}, "
            f"{self.precision}, documents {self.documents}, accumulation {self.accumulation}"
        )


class AttentionCase(NamedTuple):
    """One cell of the matrix of attention kernels."""

    attention: Attention
    model: str
    layout: str
    recompute: Recompute
    precision: Precision

    @property
    def job(self) -> Job:
        """The job it stands for: two sequences a rank, of one and a half of our kernel's smallest tiles at least."""
        layout = replace(ATTENTION_LAYOUTS[self.layout], recompute=self.recompute)
        training = Training(
            batch=2 * layout.batch_ranks,
            seq_len=96,
            precision=self.precision,
            loss_chunk=40,
            attention=self.attention,
            device="cpu",
        )
        return Job(name=str(self), model=ATTENTION_MODELS[self.model], layout=layout, training=training)

    def __str__(self) -> str:
        return f"{self.attention}, {self.model}, {self.layout}, recompute {self.recompute}, {self.precision}"


AnyCase = Case | LongCase | StateCase | OverlapCase | HalfCase | AttentionCase


def all_cases() -> list[Case]:
    """The whole matrix of tensor and data parallelism."""
    return [Case(*options) for options in itertools.product(MODELS, LAYOUTS, PRECISIONS, ACCUMULATIONS)]


def all_long_cases() -> list[LongCase]:
    """Every model, layout and recomputation; precision, chunks and documents take turns so that all pairs occur."""
    cells = itertools.product(LONG_MODELS, LONG_LAYOUTS, RECOMPUTES)
    turns = itertools.cycle(itertools.product(PRECISIONS, LOSS_CHUNKS, DOCUMENTS))
    return [LongCase(*cell, *turn) for cell, turn in zip(cells, turns, strict=False)]


def all_state_cases() -> list[StateCase]:
    """Every model and layout, twice; the other options take turns so that all pairs occur."""
    cells = (cell for _ in range(2) for cell in itertools.product(STATE_MODELS, STATE_LAYOUTS))
    turns = itertools.product(PRECISIONS, STATE_ACCUMULATIONS, RECOMPUTES, LOSS_CHUNKS, PRECISIONS)
    shuffled = itertools.cycle([turn for _, turn in sorted(enumerate(turns), key=lambda item: item[0] * 29 % 72)])
    return [
        StateCase(model, layout, precision, accumulation, recompute, loss_chunk, reduce)
        for (model, layout), (precision, accumulation, recompute, loss_chunk, reduce) in zip(
            cells, shuffled, strict=False
        )
    ]


def all_overlap_cases() -> list[OverlapCase]:
    """Every model, layout and ring; the other options take turns so that all pairs occur."""
    cells = itertools.product(OVERLAP_LAYOUTS, LONG_MODELS, OVERLAP_RINGS)
    turns = list(itertools.product(OVERLAP_CHUNKS, RECOMPUTES, PRECISIONS, LOSS_CHUNKS))
    shuffled = (turns[number * 21 % 37 % len(turns)] for number in itertools.count())  # 37: prime to every option
    return [
        OverlapCase(model, layout, ring, *turn) for (layout, model, ring), turn in zip(cells, shuffled, strict=False)
    ]


def all_half_cases() -> list[HalfCase]:
    """Every model and layout, twice; the other options take turns so that all pairs occur."""
    cells = (cell for _ in range(2) for cell in itertools.product(HALF_LAYOUTS, HALF_MODELS))
    turns = list(itertools.product(HALF_SEQUENCES, RECOMPUTES, PRECISIONS, DOCUMENTS[1:], ACCUMULATIONS))
    shuffled = (turns[number * 29 % len(turns)] for number in itertools.count())
    return [HalfCase(model, layout, *turn) for (layout, model), turn in zip(cells, shuffled, strict=False)]


def all_attention_cases() -> list[AttentionCase]:
    """Every kernel, model, layout and precision; recomputation takes turns so that all pairs occur."""
    cells = itertools.product(OTHER_ATTENTIONS, ATTENTION_LAYOUTS, ATTENTION_MODELS, PRECISIONS)
    shuffled = (RECOMPUTES[number * 5 % 37 % len(RECOMPUTES)] for number in itertools.count())
    return [
        AttentionCase(attention, model, layout, recompute, precision)
        for (attention, layout, model, precision), recompute in zip(cells, shuffled, strict=False)
    ]


def every_case() -> list[AnyCase]:
    """All matrices, but for the cells whose kernel a CPU runs in an interpreter only."""
    natively = [case for case in all_attention_cases() if case.attention != "flash"]
    matrices = all_cases(), all_long_cases(), all_state_cases(), all_overlap_cases(), all_half_cases(), natively
    return list(itertools.chain(*matrices))


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

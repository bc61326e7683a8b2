"""Attention by formula: tiles against a mask written out, FLOPs and bytes by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.account import Footprint, Memory, Work
from meshwright.config.attention import Attention
from meshwright.config.tree import Job, Layout, Model, Training
from meshwright.planner.estimate import model_flops
from meshwright.planner.step import formula
from meshwright.schemes.attention import AttentionCore
from meshwright.schemes.flash import flash_tile, visited_tiles
from meshwright.schemes.tape import Sizes, Tape

MODEL = Model(layers=1, d_model=512, heads=8, kv_heads=2, head_dim=64)


def sizes(attention: Attention, *, precision: str = "bf16", device: str = "cuda", **training: object) -> Sizes:
    given = Training(
        batch=2, seq_len=1024, attention=attention, precision=precision, device=device, **training  # type: ignore[arg-type]
    )  # fmt: skip
    return Sizes.of(MODEL, Layout(), given)


def written(sizes: Sizes) -> Tape:
    """Forward of attention alone; what it saved stays."""
    tape = Tape()
    with tape.at("attention", "forward"):
        AttentionCore(sizes).forward(tape, "temporaries", "saved_activations")
    return tape


def flops(sizes: Sizes) -> tuple[int, int]:
    tape = written(sizes)
    with tape.at("attention", "backward"):
        AttentionCore(sizes).backward(tape)
    work = Work.of(tape.trace())
    return work.flops(phase="forward"), work.flops(phase="backward")


@given(
    queries=st.integers(1, 70),
    keys=st.integers(1, 70),
    block_q=st.integers(1, 20),
    block_k=st.integers(1, 20),
    causal=st.booleans(),
    offset=st.integers(-40, 40),
)
def test_visited_tiles_are_those_with_something_to_see(
    queries: int, keys: int, block_q: int, block_k: int, causal: bool, offset: int
) -> None:
    seen = {(i // block_q, j // block_k) for i in range(queries) for j in range(keys) if not causal or j <= i + offset}
    assert visited_tiles(queries, keys, block_q, block_k, causal, offset) == len(seen)


def test_flops_by_hand() -> None:
    """B = 2, H = 8, S = 1024, D = 64."""
    product = 2 * 2 * 8 * 1024**2 * 64
    assert flops(sizes("sdpa")) == (2 * product, 5 * product)
    assert flops(sizes("sdpa", precision="float32")) == (2 * product, 5 * product)
    assert flops(sizes("naive")) == (2 * product, 4 * product)
    # 8 × 8 tiles of 128, of which 36 are not empty.
    assert flops(sizes("flex")) == (2 * product * 36 // 64, 7 * product * 36 // 64)
    tile = flash_tile(64, 2)
    computed = [visited_tiles(1024, 1024, a, b, True) * a * b for a, b in zip(tile[::2], tile[1::2], strict=True)]
    one = 2 * 2 * 8 * 64
    assert flops(sizes("flash")) == (2 * one * computed[0], one * (4 * computed[1] + 3 * computed[2]))
    assert all(one * scores < product for scores in computed)


@pytest.mark.parametrize(
    ("attention", "saved"),
    [
        ("sdpa", 2 * 1024 * 8 * 4 + 24),  # log-sum-exp, and random state
        ("flash", 2 * 1024 * 8 * 4),
        ("flex", 2 * 1024 * 8 * 4),
        ("naive", 2 * 8 * 1024 * 1024 * 2),  # the probabilities
    ],
)
def test_saved_bytes_by_hand(attention: Attention, saved: int) -> None:
    kept = [event for event in written(sizes(attention)).trace().expanded() if isinstance(event, Memory)]
    found = sum(event.delta_bytes for event in kept if event.category == "saved_activations")
    assert found == saved == AttentionCore(sizes(attention)).statistics_bytes


def test_temporaries_of_forward_by_hand() -> None:
    """The fused kernels have none but repeated keys and values (torch's in float32); naive has its scores twice."""
    qkv = {"q": 2 * 1024 * 8 * 64 * 2, "kv": 2 * 1024 * 2 * 64 * 2}
    scores = 2 * 8 * 1024 * 1024
    peaks = {name: Footprint.of(written(sizes(name)).trace()).peak for name in ("sdpa", "flash", "naive")}
    assert peaks["flash"] == qkv["q"] + 2 * 1024 * 8 * 4
    assert peaks["sdpa"] == peaks["flash"] + 24
    float32 = Footprint.of(written(sizes("sdpa", precision="float32")).trace()).peak
    assert float32 == 2 * 2 * qkv["q"] + 2 * qkv["q"] + 2 * 1024 * 8 * 4 + 16
    # As its largest, scores of two bytes are cast to four beside the mask, or those of four to probabilities of two.
    assert peaks["naive"] == scores * 6 + max(1024 * 1024 * 2, 2 * 1024 * 8 * 4)


def test_model_flops_do_not_depend_on_the_kernel() -> None:
    job = Job(
        model=replace(MODEL, d_ff=1024), training=Training(batch=2, seq_len=1024, precision="bf16", device="cuda")
    )
    asked: tuple[Attention, ...] = ("naive", "sdpa", "flash", "flex", "auto")
    jobs = [replace(job, training=replace(job.training, attention=attention)) for attention in asked]
    assert len({model_flops(job) for job in jobs}) == 1
    computed = [formula(job).work.flops() for job in jobs]
    assert computed[2] < computed[0] < computed[1]

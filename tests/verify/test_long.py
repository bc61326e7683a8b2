"""`verify` passes for sequences that ranks divide and for recomputation, and names what is planted into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from jobs import sampled, tiny_job
from planted import (
    FaultyAttention,
    PermutesHeads,
    SendsKeysTwice,
    ShowsLaterTokens,
    every_axis_right,
    gradient_group_without_ring,
    gradients_not_summed_over_the_ring,
    norms_not_summed,
)

from meshwright.account import StepAccount
from meshwright.comm.ranks import Ranks
from meshwright.config.tree import Job, Layout, Model
from meshwright.model.build import specs_of
from meshwright.planner.step import formula
from meshwright.rehearsal.rehearse import rehearse_job
from meshwright.verify.observe import observe_rank
from meshwright.verify.verify import verify_on

Pool = Callable[[int], Ranks]

GROUPED = Model(layers=2, d_model=32, d_ff=48, heads=4, kv_heads=2, head_dim=8, vocab_size=40)
ONE_KV_HEAD = replace(GROUPED, kv_heads=1)
LEARNED = replace(GROUPED, kv_heads=4, norm="layernorm", bias=True, positions="learned", mlp="gelu")

SPLIT = Layout(tensor=2, sequence_parallel=True)
RING_SPLIT = replace(SPLIT, ring=2)

CASES: dict[str, tuple[Model, Layout, dict[str, Any]]] = {
    "sequence parallel": (GROUPED, SPLIT, {}),
    "sequence parallel, full recompute": (GROUPED, replace(SPLIT, recompute="full"), {}),
    "sequence parallel, selective recompute": (GROUPED, replace(SPLIT, recompute="selective"), {}),
    "sequence parallel, learned positions, biases": (LEARNED, SPLIT, {}),
    "ulysses 2": (GROUPED, Layout(ulysses=2), {}),
    "ulysses 4, one KV head": (ONE_KV_HEAD, Layout(ulysses=4), {}),
    "ring 3": (GROUPED, Layout(ring=3), {"seq_len": 18}),
    "ring 4, contiguous": (GROUPED, Layout(ring=4, ring_order="contiguous"), {}),
    "ring 4, zigzag": (GROUPED, Layout(ring=4), {}),
    "ring 2 × ulysses 2": (GROUPED, Layout(ring=2, ulysses=2), {}),
    "replicate 2 × ring 2": (GROUPED, Layout(replicate=2, ring=2, recompute="full"), {"accumulation": 2}),
    "ring 2 × tensor 2, sequence parallel": (GROUPED, RING_SPLIT, {}),
    "ulysses 2 × tensor 2": (GROUPED, Layout(ulysses=2, tensor=2), {}),
    "padded": (GROUPED, RING_SPLIT, {"seq_len": 13, "pad": True}),
    "padded, learned positions, biases": (LEARNED, Layout(ring=2, ulysses=2), {"seq_len": 13, "pad": True}),
    "bf16": (GROUPED, replace(RING_SPLIT, recompute="selective"), {"precision": "bf16", "accumulation": 2}),
}


def job_of(model: Model, layout: Layout, **training: Any) -> Job:
    return tiny_job(model, layout, **{"batch": 4} | training)


@pytest.mark.parametrize("case", sampled(CASES, 4))
def test_right_layouts_agree(ranks: Pool, case: str) -> None:
    model, layout, training = CASES[case]
    report = verify_on(job_of(model, layout, **training), ranks(layout.world), every_axis_right)
    assert report.agree, report.text()
    assert report.gradients.checked > 10 and report.rows["formula"] == report.rows["run"] > 0


@pytest.mark.parametrize("model", [GROUPED, LEARNED], ids=["norms", "norms, biases, positions"])
def test_partial_gradients_that_are_not_summed_are_named(ranks: Pool, model: Model) -> None:
    """Of norms, row biases and learned positions under sequence parallelism; of nothing else."""
    job = job_of(model, SPLIT)
    report = verify_on(job, ranks(2), norms_not_summed)
    partial = [spec.name for spec in specs_of(job) if spec.partial_over is not None]
    assert {"norm.weight", "layers.0.attention_norm.weight", "layers.1.mlp_norm.weight"} <= set(partial)
    assert set(report.gradients.failed) == set(partial)
    assert report.first_difference is not None
    assert report.first_difference.kind == "gradient"
    assert report.first_difference.module == partial[-1]
    assert report.loss_passes and not report.formula_vs_rehearsal and not report.rehearsal_vs_run


def test_a_gradient_group_without_the_ring_is_named(ranks: Pool) -> None:
    job = job_of(GROUPED, Layout(ring=2, gradients="naive"))
    report = verify_on(job, ranks(2), gradients_not_summed_over_the_ring)
    assert report.loss_passes and len(report.gradients.failed) == report.gradients.checked
    assert report.first_difference is not None
    assert (report.first_difference.kind, report.first_difference.module) == ("gradient", "head.weight")
    assert {d.row["axis"] for d in report.formula_vs_rehearsal} == {"ring"}
    assert len(report.formula_vs_rehearsal) == job.layout.world * report.gradients.checked


def test_a_loss_without_the_ring_is_named(ranks: Pool) -> None:
    report = verify_on(job_of(GROUPED, Layout(replicate=2, ring=2)), ranks(4), gradient_group_without_ring)
    assert not report.agree and report.first_difference is not None
    assert (report.first_difference.kind, report.first_difference.module) == ("loss", "loss")
    assert {d.row["axis"] for d in report.formula_vs_rehearsal} == {"replicate", "replicate*ring"}


@pytest.mark.parametrize(
    ("layout", "kind", "layer"),
    [
        (Layout(ring=2), ShowsLaterTokens, 0),
        (Layout(ring=2, ring_order="contiguous"), ShowsLaterTokens, 1),
        (Layout(ulysses=2), PermutesHeads, 0),
    ],
    ids=["mask, zigzag", "mask, contiguous", "heads"],
)
def test_attention_that_is_wrong_is_named(ranks: Pool, layout: Layout, kind: Any, layer: int) -> None:
    report = verify_on(job_of(GROUPED, layout), ranks(2), FaultyAttention(layer, kind))
    assert report.first_difference is not None
    assert (report.first_difference.kind, report.first_difference.module) == (
        "activation",
        f"layers.{layer}.attention",
    )
    assert not report.formula_vs_rehearsal and not report.rehearsal_vs_run, "the bytes are right, the numbers are not"


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
def test_keys_in_the_place_of_values_are_named(ranks: Pool, in_backward: bool) -> None:
    report = verify_on(job_of(GROUPED, Layout(ring=2)), ranks(2), SendsKeysTwice(0, in_backward))
    kind = "gradient" if in_backward else "activation"
    assert report.first_difference is not None
    assert (report.first_difference.kind, report.first_difference.module) == (kind, "layers.0.attention")
    assert report.loss_passes == in_backward
    assert not report.formula_vs_rehearsal and not report.rehearsal_vs_run, "the bytes are right, the numbers are not"


# --- what recomputation adds ------------------------------------------------------------------------------------------


def accounts(ranks: Pool, job: Job) -> list[StepAccount]:
    """Formula, rehearsal and run of the last rank."""
    rank = job.layout.world - 1
    run = (ranks(job.layout.world).run(observe_rank, job) if rank else [observe_rank(job)])[rank].account
    assert run is not None
    return [formula(job, rank), rehearse_job(job, rank), run]


def flops(account: StepAccount, phase: str) -> dict[str, int]:
    """By kind; those of elementwise operations are not counted."""
    return {kind: account.work.flops(phase=phase, kind=kind) for kind in ("matmul", "attention")}


@pytest.mark.parametrize("layout", [Layout(), Layout(ring=2)], ids=["one device", "ring 2"])
def test_flops_of_recomputation(ranks: Pool, layout: Layout) -> None:
    """Selective: the attention core once more, and no product. Full: the blocks, which are all but the head."""
    job = job_of(GROUPED, layout)
    B, S, L = job.training.batch, job.training.seq_len, GROUPED.layers
    per_rank = S // layout.ring
    # Each rank of a zigzag ring of 2 computes 6 of the 16 pairs of chunks: its own 2 × 2, masked, and 2 of the other's.
    scores = S * S if layout.ring == 1 else (2 * 2 + 2) * (S // 4) ** 2
    attention = 4 * B * GROUPED.heads * GROUPED.head_dim * scores * L
    weights = GROUPED.d_model * (2 * GROUPED.heads + 2 * GROUPED.kv_heads) * GROUPED.head_dim
    products = 2 * B * per_rank * L * (weights + 3 * GROUPED.d_model * GROUPED.d_ff)
    head = 2 * B * per_rank * GROUPED.d_model * GROUPED.vocab_size
    for kind, again in {
        "none": {"matmul": 0, "attention": 0},
        "selective": {"matmul": 0, "attention": attention},
        "full": {"matmul": products, "attention": attention},
    }.items():
        for account in accounts(ranks, replace(job, layout=replace(layout, recompute=kind))):
            assert flops(account, "forward") == {"matmul": products + head, "attention": attention}
            assert flops(account, "recompute") == again, (account.source, kind)
            assert flops(account, "backward")["matmul"] == 2 * (products + head)

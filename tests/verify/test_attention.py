"""Other attention kernels than torch's: formula = rehearsal = run, and the right numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from jobs import sampled, tiny_job

from meshwright.account import CATEGORIES, diff
from meshwright.comm.ranks import Ranks
from meshwright.config.attention import Attention
from meshwright.config.tree import Layout
from meshwright.planner.step import formula
from meshwright.rehearsal.rehearse import rehearse_job
from meshwright.verify.agreement import check, differences_of
from meshwright.verify.matrix import (
    ATTENTION_LAYOUTS,
    ATTENTION_MODELS,
    AttentionCase,
    Precision,
    all_attention_cases,
    pairs,
)
from meshwright.verify.verify import verify_on

NAIVE = [case for case in all_attention_cases() if case.attention == "naive"]
FLASH = [case for case in all_attention_cases() if case.attention == "flash"]


def test_the_matrix_has_every_pair_of_options() -> None:
    options = range(len(AttentionCase._fields))
    for cases in (NAIVE, FLASH):
        values = [{case[option] for case in cases} for option in options]
        found = set().union(*map(pairs, cases))
        assert len(found) == sum(len(values[i]) * len(values[j]) for i in options for j in options if i < j)
    assert len(NAIVE) == len(FLASH) == 60


@pytest.mark.parametrize("case", sampled(NAIVE, 29))
def test_formula_rehearsal_and_run_agree_without_a_fused_kernel(
    case: AttentionCase, ranks: Callable[[int], Ranks]
) -> None:
    agreement = check(case, ranks(case.job.layout.world), thorough=case in NAIVE[::7])
    assert not agreement.differences, agreement.differences[:3]
    assert agreement.agrees, (agreement.profiler_peaks, agreement.run_peaks)


@pytest.mark.parametrize("case", sampled(FLASH, 17))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_formula_equals_rehearsal_with_our_kernel(case: AttentionCase, device: Literal["cpu", "cuda"]) -> None:
    job = case.job
    job = replace(job, training=replace(job.training, device=device))
    for rank in {0, job.layout.world - 1}:
        assert not list(differences_of(formula(job, rank), rehearse_job(job, rank)))


@pytest.mark.parametrize("attention", ["naive", "flash", "flex", "auto"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_formula_equals_rehearsal_of_a_gpu(attention: Attention, precision: Precision) -> None:
    """What a GPU would save and compute, checked without one; sequences of several tiles, the last one not full."""
    job = tiny_job(
        replace(ATTENTION_MODELS["grouped_query"], head_dim=64),
        replace(ATTENTION_LAYOUTS["ring 2"], recompute="selective"),
        precision,
        attention=attention,
        device="cuda",
        seq_len=600,
        batch=2,
    )
    planned, rehearsed = formula(job, 1), rehearse_job(job, 1)
    assert not diff(planned, rehearsed)
    assert {c: planned.footprint.bytes[c] for c in CATEGORIES} == {c: rehearsed.footprint.bytes[c] for c in CATEGORIES}


@pytest.mark.parametrize(
    ("layout", "precision"),
    [(Layout(), "bf16"), (Layout(ring=2, recompute="selective"), "float32")],
    ids=["one device", "ring 2"],
)
def test_a_run_without_a_fused_kernel_is_right(
    ranks: Callable[[int], Ranks], layout: Layout, precision: Precision
) -> None:
    job = tiny_job(ATTENTION_MODELS["grouped_query"], layout, precision, attention="naive", batch=2)
    report = verify_on(job, ranks(layout.world))
    assert not report.gradients.failed and report.loss_passes, report.text()
    assert not report.formula_vs_rehearsal and not report.rehearsal_vs_run


@pytest.mark.parametrize("every", [[], pytest.param(["15"], marks=pytest.mark.slow)], ids=["a ring", "more"])
def test_a_run_with_our_kernel_agrees_and_is_right(tmp_path: Path, every: list[str]) -> None:
    """In Triton's interpreter, which must be asked for before the kernel is imported: a process of its own."""
    pytest.importorskip("triton")
    found = subprocess.run(
        [sys.executable, "-m", "ranked_flash", *every],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert found.returncode == 0, found.stdout + found.stderr

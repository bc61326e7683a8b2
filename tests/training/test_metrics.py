"""Metrics: the definitions against hand-made numbers, and the keys of the file."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.tiny import MODEL, job

from meshwright.config.tree import Layout, Training
from meshwright.planner.estimate import model_flops
from meshwright.training import metrics
from meshwright.training.metrics import MetricsFile, StepMetrics


def test_model_flops_of_a_decoder() -> None:
    """6 FLOPs a weight and token, and 12·S·H·D a token and layer (Chowdhery et al. 2022, appendix B)."""
    tokens, width = 8 * 16, MODEL.heads * MODEL.head_dim
    weights = MODEL.layers * (4 * MODEL.d_model * width + 3 * MODEL.d_model * MODEL.d_ff) + 256 * MODEL.d_model
    assert model_flops(job()) == tokens * (6 * weights + 12 * MODEL.layers * 16 * width)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(replicate=2, tensor=2),
        Layout(ring=4),
        Layout(ring=2, ring_order="contiguous"),
        Layout(ulysses=2, recompute="full"),
        Layout(tensor=2, sequence_parallel=True, recompute="selective"),
    ],
)
def test_no_layout_changes_the_models_flops(layout: Layout) -> None:
    """Neither what is computed twice, nor blocks that a ring leaves out."""
    whole, divided = job(), replace(job(), layout=layout)
    assert model_flops(divided) * layout.world == model_flops(whole)
    assert model_flops(replace(whole, training=replace(whole.training, accumulation=2))) == model_flops(whole)


def test_rates() -> None:
    assert metrics.tokens_per_second(Training(batch=4, seq_len=128), 0.5) == 1024
    assert metrics.bits_per_byte(math.log(256)) == pytest.approx(8)
    assert metrics.memory_bytes(torch.device("cpu")) > 2**20


def test_the_file(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(StepMetrics(step=1, loss=5.5, grad_norm=math.inf, tokens_per_s=10.0))
    file.write(StepMetrics(step=2, loss=math.nan, grad_norm=1.0, tokens_per_s=10.0, heldout_bits_per_byte=7.5))
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    keys = "step loss grad_norm tokens_per_s mfu exposed_seconds memory_bytes heldout_bits_per_byte"
    assert list(first) == keys.split()
    assert (first["loss"], first["grad_norm"], first["heldout_bits_per_byte"]) == (5.5, None, None)
    assert (second["loss"], second["heldout_bits_per_byte"]) == (None, 7.5)

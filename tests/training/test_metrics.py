"""Metrics: the definitions against hand-made numbers, and the keys of the file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from training.tiny import MODEL, job

from meshwright.account import Amount, Work, WorkKey
from meshwright.config.tree import Device, Training
from meshwright.planner.step import formula
from meshwright.training import metrics
from meshwright.training.metrics import MetricsFile, StepMetrics

WORK = Work(
    {
        WorkKey("forward", "matmul"): Amount(1, 100, 0),
        WorkKey("forward", "attention"): Amount(1, 10, 0),
        WorkKey("forward", "elementwise"): Amount(1, 7, 0),
        WorkKey("recompute", "matmul"): Amount(1, 100, 0),
        WorkKey("backward", "matmul"): Amount(2, 200, 0),
        WorkKey("backward", "attention"): Amount(1, 25, 0),
    }
)
DEVICE = Device(name="gpu", kind="cuda", peak_flops={"bf16": 1000.0})


def test_model_flops_leave_out_what_is_computed_twice() -> None:
    assert WORK.model_flops == 330


def test_model_flops_of_a_decoder() -> None:
    """6 FLOPs a weight and token, and 12·S·H·D a token and layer (Chowdhery et al. 2022, appendix B)."""
    tokens, width = 8 * 16, MODEL.heads * MODEL.head_dim
    weights = MODEL.layers * (4 * MODEL.d_model * width + 3 * MODEL.d_model * MODEL.d_ff) + 256 * MODEL.d_model
    assert formula(job()).work.model_flops == tokens * (6 * weights + 12 * MODEL.layers * 16 * width)


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

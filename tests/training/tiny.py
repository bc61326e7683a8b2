"""Jobs small enough for a test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from meshwright.config.files import load_cluster
from meshwright.config.tree import Job, Layout, Model, Training

MODEL = Model(layers=1, d_model=16, d_ff=32, heads=2, kv_heads=2, head_dim=8)
TRAINING = Training(batch=8, seq_len=16, steps=3, warmup_steps=1, heldout_sequences=5, device="cpu")


def job(layout: Layout | None = None, model: Model = MODEL, **training: Any) -> Job:
    """A one-block decoder over bytes."""
    return Job("tiny", model, layout or Layout(), load_cluster("laptop"), replace(TRAINING, **training))


def write_text(path: Path, num_bytes: int = 4000) -> str:
    """A text file without two equal sequences in a row; returns its name, as `training.data` takes it."""
    text = " ".join(str(number) for number in range(num_bytes)).encode()[:num_bytes]
    path.write_bytes(text)
    return str(path)

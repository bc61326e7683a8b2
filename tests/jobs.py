"""Tiny jobs that the tests share."""

from __future__ import annotations

from typing import Any

from meshwright.config.tree import Job, Layout, Model, Training
from meshwright.verify.agreement import MODELS

LAYOUTS = {
    "1": Layout(),
    "replicate2": Layout(replicate=2),
    "tensor2": Layout(tensor=2),
    "replicate2xtensor2": Layout(replicate=2, tensor=2),
    "tensor4": Layout(tensor=4),
    "replicate4": Layout(replicate=4),
}


def tiny_job(
    model: str | Model = "grouped_query",
    layout: str | Layout = "1",
    precision: str = "float32",
    accumulation: int = 1,
    **training: Any,
) -> Job:
    """A job of a few thousand parameters on the CPU."""
    settings: dict[str, Any] = {"batch": 8, "seq_len": 16, "device": "cpu", "precision": precision}
    return Job(
        name="tiny",
        model=MODELS[model] if isinstance(model, str) else model,
        layout=LAYOUTS[layout] if isinstance(layout, str) else layout,
        training=Training(accumulation=accumulation, **(settings | training)),
    )

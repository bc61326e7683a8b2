"""Tiny jobs that the tests share."""

from __future__ import annotations

from typing import Any

from meshwright.config.tree import Job, Layout, Model, Training
from meshwright.verify.matrix import LAYOUTS, MODELS


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

"""Tiny jobs that the tests share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

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


def sampled(cases: Iterable[Any], every: int) -> list[Any]:
    """Parameters of a test: of so many neighbours one runs by default, the others with `make test-all`."""
    rows = [case if type(case) is tuple else (case,) for case in cases]
    return [
        pytest.param(*row, marks=[pytest.mark.slow] if index % every else [], id=" ".join(map(str, row)))
        for index, row in enumerate(rows)
    ]

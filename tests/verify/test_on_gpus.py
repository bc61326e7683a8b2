"""Where `verify` runs: on GPUs if this host has one for each rank and the job may use them, else on CPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
from jobs import tiny_job

from meshwright.config.tree import Job, Layout
from meshwright.errors import UserError
from meshwright.training import device as device_module
from meshwright.verify import verify as verify_module
from meshwright.verify.compare import reference_job
from meshwright.verify.matrix import MODELS, Precision
from meshwright.verify.verify import needed_memory, verify


class Pool:
    """Says how it was made, instead of starting ranks."""

    made: ClassVar[list[tuple[int, bool]]] = []

    def __init__(self, world: int, *, timeout_seconds: float, on_gpus: bool) -> None:
        self.made.append((world, on_gpus))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("gpus", "device", "documents", "expected"),
    [
        (0, "auto", "joined", "cpu"),
        (1, "auto", "joined", "cpu"),
        (2, "auto", "joined", "cuda"),
        (2, "cuda", "joined", "cuda"),
        (8, "cpu", "joined", "cpu"),
        (8, "auto", "separate", "cpu"),
    ],
)
def test_each_rank_has_a_gpu_where_there_are_enough(
    monkeypatch: pytest.MonkeyPatch, gpus: int, device: str, documents: str, expected: str
) -> None:
    seen: list[Job] = []
    monkeypatch.setattr(Pool, "made", [])
    monkeypatch.setattr(verify_module, "Ranks", Pool)
    monkeypatch.setattr(device_module, "_num_gpus", lambda: gpus)
    monkeypatch.setattr(verify_module, "available_gpu_memory", lambda: 2**36)
    monkeypatch.setattr(verify_module, "verify_on", lambda job, pool: seen.append(job))
    verify(tiny_job(layout=Layout(replicate=2), device=device, documents=documents, compile=True))
    assert Pool.made == [(2, expected == "cuda")]
    assert (seen[0].training.device, seen[0].training.compile) == (expected, False)


def test_gpus_that_are_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing runs on CPUs instead."""
    monkeypatch.setattr(Pool, "made", [])
    monkeypatch.setattr(verify_module, "Ranks", Pool)
    monkeypatch.setattr(device_module, "_num_gpus", lambda: 1)
    with pytest.raises(UserError) as refused:
        verify(tiny_job(layout=Layout(replicate=2), device="cuda"))
    assert str(refused.value) == (
        "training.device = cuda, but this host has 1 GPUs for 2 ranks (each rank needs its own): use training.device "
        "cpu, or a layout of 1 ranks"
    )
    assert not Pool.made


@pytest.mark.parametrize(
    ("head_dim", "precision", "device", "expected"),
    [
        (6, "float32", "cuda", "naive"),
        (8, "float32", "cuda", "sdpa"),
        (12, "bf16", "cuda", "naive"),
        (16, "bf16", "cuda", "sdpa"),
        (6, "float32", "cpu", "sdpa"),
    ],
)
def test_one_device_has_an_attention_that_takes_the_shape(
    head_dim: int, precision: Precision, device: str, expected: str
) -> None:
    for asked in ("naive", "flash"):
        job = tiny_job(replace(MODELS["grouped_query"], head_dim=head_dim), precision=precision, device=device)
        job = replace(job, training=replace(job.training, attention=asked))
        assert reference_job(job).training.attention == expected


def test_on_gpus_one_rank_shares_its_memory_with_the_references() -> None:
    on_cpus = tiny_job(layout=Layout(replicate=2))
    on_gpus = replace(on_cpus, training=replace(on_cpus.training, device="cuda"))
    assert needed_memory(on_gpus) < needed_memory(on_cpus)

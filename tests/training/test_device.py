"""Which device a job runs on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from training.tiny import job

from meshwright.config.tree import Cluster, Device, Layout
from meshwright.errors import UserError
from meshwright.training import device
from meshwright.training.device import resolve_device


@pytest.mark.parametrize(("kind", "expected"), [("cpu", "cpu"), ("cuda", "cuda"), ("tpu", "cuda")])
def test_planning_follows_the_cluster(kind: str, expected: str) -> None:
    planned = replace(job(device="auto"), cluster=Cluster(device=Device(kind=kind)))  # type: ignore[arg-type]
    assert resolve_device(planned, planning=True).training.device == expected


@pytest.mark.parametrize(("gpus", "expected"), [(0, "cpu"), (1, "cpu"), (2, "cuda"), (8, "cuda")])
def test_running_needs_a_gpu_for_every_rank(monkeypatch: pytest.MonkeyPatch, gpus: int, expected: str) -> None:
    monkeypatch.setattr(device, "_num_gpus", lambda: gpus)
    two_ranks = job(Layout(replicate=2), device="auto")
    assert resolve_device(two_ranks, planning=False).training.device == expected


def test_only_ranks_of_this_host_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_num_gpus", lambda: 2)
    four_ranks = job(Layout(replicate=4), device="cuda")
    assert resolve_device(four_ranks, planning=False, local_ranks=2).training.device == "cuda"


def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_num_gpus", lambda: 1)
    with pytest.raises(UserError, match="this host has 1 GPUs for 2 ranks"):
        resolve_device(job(Layout(replicate=2), device="cuda"), planning=False)

"""Which device a job runs on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from training.tiny import job

from meshwright.config.files import load_cluster
from meshwright.config.tree import Cluster, Device, Job, Layout
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


# --- a mask that no kernel of a GPU takes -----------------------------------------------------------------------------

REFUSAL = (
    "training.documents = separate needs training.device = cpu (no attention kernel for GPUs takes its mask yet): "
    "use training.documents joined, or training.device cpu"
)


@pytest.mark.parametrize(("kind", "asked"), [("cuda", "auto"), ("tpu", "auto"), ("cuda", "cuda"), ("cpu", "cuda")])
def test_separate_documents_are_not_planned_for_gpus(kind: str, asked: str) -> None:
    planned = replace(job(device=asked, documents="separate"), cluster=Cluster(device=Device(kind=kind)))  # type: ignore[arg-type]
    with pytest.raises(UserError) as refused:
        resolve_device(planned, planning=True)
    assert str(refused.value) == REFUSAL
    joined = replace(planned, training=replace(planned.training, documents="joined"))
    assert resolve_device(joined, planning=True).training.device == "cuda"


@pytest.mark.parametrize(("kind", "asked"), [("cpu", "auto"), ("cuda", "cpu"), ("tpu", "cpu")])
def test_separate_documents_are_planned_for_a_cpu(kind: str, asked: str) -> None:
    planned = replace(job(device=asked, documents="separate"), cluster=Cluster(device=Device(kind=kind)))  # type: ignore[arg-type]
    assert resolve_device(planned, planning=True).training.device == "cpu"


def test_separate_documents_are_not_planned_for_an_h100() -> None:
    planned = replace(job(device="auto", documents="separate"), cluster=load_cluster("h100x8"))
    with pytest.raises(UserError) as refused:
        resolve_device(planned, planning=True)
    assert str(refused.value) == REFUSAL


@pytest.mark.parametrize(("gpus", "asked", "refused"), [(0, "auto", False), (1, "auto", True), (1, "cuda", True)])
def test_separate_documents_run_without_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, asked: str, refused: bool
) -> None:
    monkeypatch.setattr(device, "_num_gpus", lambda: gpus)
    separate = job(device=asked, documents="separate")
    if refused:
        with pytest.raises(UserError) as found:
            resolve_device(separate, planning=False)
        assert str(found.value) == REFUSAL
    else:
        assert resolve_device(separate, planning=False).training.device == "cpu"
    on_cpu = job(device="cpu", documents="separate")
    assert resolve_device(on_cpu, planning=False).training.device == "cpu"


# --- attention kernels that cannot run here ---------------------------------------------------------------------------


def attending(**training: Any) -> Job:
    """A job whose heads every kernel takes."""
    tiny = job(**training)
    return replace(tiny, model=replace(tiny.model, head_dim=16))


@pytest.mark.parametrize(("asked", "interpreted"), [("cpu", "0"), ("auto", "0"), ("cpu", "1"), ("cuda", "0")])
def test_our_kernel_runs_on_a_cpu_only_if_it_is_interpreted(
    monkeypatch: pytest.MonkeyPatch, asked: str, interpreted: str
) -> None:
    monkeypatch.setattr(device, "_num_gpus", lambda: int(asked == "cuda"))
    monkeypatch.setattr(device, "_has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    flash = attending(device=asked, attention="flash")
    assert resolve_device(flash, planning=True)
    if asked == "cuda" or interpreted == "1":
        assert resolve_device(flash, planning=False).training.attention == "flash"
        return
    with pytest.raises(UserError) as refused:
        resolve_device(flash, planning=False)
    assert str(refused.value) == (
        "training.attention = flash with training.device = cpu needs TRITON_INTERPRET=1 in the environment (a CPU runs "
        "our kernel in Triton's interpreter only, thousands of times slower): set it, or use training.attention sdpa "
        "or naive"
    )


def test_our_kernel_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_num_gpus", lambda: 1)
    monkeypatch.setattr(device, "_has_triton", lambda: False)
    for asked in ("naive", "sdpa"):
        assert resolve_device(attending(device="cuda", attention=asked, precision="bf16"), planning=False)
    for asked in ("flash", "auto"):
        with pytest.raises(UserError) as refused:
            resolve_device(attending(device="cuda", attention=asked, precision="bf16"), planning=False)
        assert str(refused.value) == (
            f"training.attention = {asked} needs the package triton, which is not installed (our kernel is written in "
            "it): pip install triton, or use training.attention sdpa"
        )


def test_flex_is_planned_and_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_num_gpus", lambda: 1)
    job = attending(device="cuda", attention="flex", precision="bf16")
    assert resolve_device(job, planning=True) == job
    with pytest.raises(
        UserError, match=r"^training\.attention = flex can be planned.*: use training\.attention flash or sdpa$"
    ):
        resolve_device(job, planning=False)


def test_what_a_device_cannot_take_is_refused_once_the_device_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_num_gpus", lambda: 0)
    with pytest.raises(UserError, match="flex has no backward on a CPU"):
        resolve_device(attending(device="auto", attention="flex"), planning=False)
    planned = replace(attending(device="auto", attention="flex"), cluster=load_cluster("h100x8"))
    assert resolve_device(planned, planning=True).training.device == "cuda"

"""Which device a job runs on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from training.tiny import job

from meshwright.config.files import load_cluster
from meshwright.config.legality import require_legal
from meshwright.config.tree import Cluster, Device, Job, Layout
from meshwright.errors import UserError
from meshwright.launch import checked
from meshwright.training import device
from meshwright.training.device import check_machine, resolve_device


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
    four_ranks = job(Layout(replicate=4), device="auto")
    assert resolve_device(four_ranks, planning=False, local_ranks=2).training.device == "cuda"
    check_machine(job(Layout(replicate=4), device="cuda"), local_ranks=2)


def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_num_gpus", lambda: 1)
    with pytest.raises(UserError, match="this host has 1 GPUs for 2 ranks"):
        checked(job(Layout(replicate=2), device="cuda"))


def test_what_no_machine_can_run_is_said_before_what_this_one_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_num_gpus", lambda: 0)
    monkeypatch.setattr(device, "_has_triton", lambda: False)
    broken = job(Layout(tensor=3), device="cuda", attention="flash")
    with pytest.raises(UserError) as refused:
        checked(broken)
    lines = str(refused.value).splitlines()
    found = broken.layout.violations(broken.model, broken.cluster, broken.training)
    assert lines == [violation.message for violation in found]
    assert {"heads", "d_ff", "attention_head_dim"} <= {violation.rule for violation in found}
    with pytest.raises(UserError) as refused:
        checked(attending(device="cuda", attention="flex"))
    assert len(str(refused.value).splitlines()) == 2


# --- a mask that no kernel of a GPU takes -----------------------------------------------------------------------------

REFUSAL = (
    "training.documents = separate needs training.device = cpu (no attention kernel for GPUs takes its mask yet): "
    "use training.documents joined, or training.device cpu"
)


@pytest.mark.parametrize(("kind", "asked"), [("cuda", "auto"), ("tpu", "auto"), ("cuda", "cuda"), ("cpu", "cuda")])
def test_separate_documents_are_not_planned_for_gpus(kind: str, asked: str) -> None:
    planned = replace(job(device=asked, documents="separate"), cluster=Cluster(device=Device(kind=kind)))  # type: ignore[arg-type]
    with pytest.raises(UserError) as refused:
        require_legal(resolve_device(planned, planning=True))
    assert str(refused.value) == REFUSAL
    joined = replace(planned, training=replace(planned.training, documents="joined"))
    require_legal(resolve_device(joined, planning=True))


@pytest.mark.parametrize(("kind", "asked"), [("cpu", "auto"), ("cuda", "cpu"), ("tpu", "cpu")])
def test_separate_documents_are_planned_for_a_cpu(kind: str, asked: str) -> None:
    planned = replace(job(device=asked, documents="separate"), cluster=Cluster(device=Device(kind=kind)))  # type: ignore[arg-type]
    planned = resolve_device(planned, planning=True)
    assert planned.training.device == "cpu"
    require_legal(planned)


def test_separate_documents_are_not_planned_for_an_h100() -> None:
    planned = replace(job(device="auto", documents="separate"), cluster=load_cluster("h100x8"))
    with pytest.raises(UserError) as refused:
        require_legal(resolve_device(planned, planning=True))
    assert str(refused.value) == REFUSAL


@pytest.mark.parametrize(("gpus", "asked", "refused"), [(0, "auto", False), (1, "auto", True), (1, "cuda", True)])
def test_separate_documents_run_without_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, asked: str, refused: bool
) -> None:
    monkeypatch.setattr(device, "_num_gpus", lambda: gpus)
    separate = job(device=asked, documents="separate")
    if refused:
        with pytest.raises(UserError) as found:
            checked(separate)
        assert str(found.value) == REFUSAL
    else:
        assert checked(separate).training.device == "cpu"
    on_cpu = job(device="cpu", documents="separate")
    assert checked(on_cpu).training.device == "cpu"


# --- attention kernels that cannot run here ---------------------------------------------------------------------------


def attending(**training: Any) -> Job:
    """A job whose heads every kernel takes."""
    tiny = job(**training)
    return replace(tiny, model=replace(tiny.model, head_dim=16))


def refused(attended: Job) -> list[str]:
    """The lines of why it cannot run."""
    try:
        checked(attended)
    except UserError as error:
        return str(error).splitlines()
    return []


NOT_INTERPRETED = (
    "training.attention = flash with training.device = cpu needs TRITON_INTERPRET=1 in the environment (a CPU runs our "
    "kernel in Triton's interpreter only, thousands of times slower): set it, or use training.attention sdpa or naive"
)
WRONG_BITS = (
    "training.attention = flash with training.device = cpu and training.precision = bf16 is computed wrong (Triton's "
    "interpreter multiplies the bits of bfloat16 as integers): use training.precision float32, or training.attention "
    "sdpa"
)
INSTEAD = (
    "training.attention = {} with training.device = cuda does not go with TRITON_INTERPRET=1 in the environment "
    "(Triton's interpreter would run in place of the GPU's kernel): unset it, or use training.attention sdpa"
)
NO_TRITON = (
    "training.attention = {} needs the package triton, which is not installed (our kernel is written in it): pip "
    "install triton, or use training.attention sdpa"
)


@pytest.mark.parametrize(
    ("asked", "precision", "interpreted", "lines"),
    [
        ("cpu", "float32", "0", [NOT_INTERPRETED]),
        ("auto", "float32", "0", [NOT_INTERPRETED]),
        ("cpu", "float32", "1", []),
        ("cpu", "bf16", "1", [WRONG_BITS]),
        ("cpu", "bf16", "0", [NOT_INTERPRETED, WRONG_BITS]),
        ("cuda", "bf16", "0", []),
        ("cuda", "bf16", "1", [INSTEAD.format("flash")]),
        ("cuda", "float32", "1", [INSTEAD.format("flash")]),
    ],
)
def test_where_our_kernel_runs(
    monkeypatch: pytest.MonkeyPatch, asked: str, precision: str, interpreted: str, lines: list[str]
) -> None:
    monkeypatch.setattr(device, "_num_gpus", lambda: int(asked == "cuda"))
    monkeypatch.setattr(device, "_has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    flash = attending(device=asked, attention="flash", precision=precision)
    require_legal(resolve_device(flash, planning=True))
    assert refused(flash) == lines
    assert refused(attending(device=asked, attention="sdpa", precision=precision)) == []


def test_what_auto_takes_must_run_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_num_gpus", lambda: 1)
    monkeypatch.setattr(device, "_has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert refused(attending(device="cuda", attention="auto", precision="bf16")) == [INSTEAD.format("auto")]
    assert refused(attending(device="cuda", attention="auto")) == []


def test_our_kernel_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_num_gpus", lambda: 1)
    monkeypatch.setattr(device, "_has_triton", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for asked in ("naive", "sdpa"):
        assert refused(attending(device="cuda", attention=asked, precision="bf16")) == []
    for asked in ("flash", "auto"):
        assert refused(attending(device="cuda", attention=asked, precision="bf16")) == [NO_TRITON.format(asked)]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_where_flex_runs(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(device, "_num_gpus", lambda: 1)
    monkeypatch.setattr(device, "_has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    flex = attending(device="cuda", attention="flex", precision=precision)
    assert refused(flex) == []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert refused(flex) == [INSTEAD.format("flex")]
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(device, "_has_triton", lambda: False)
    reason = "our kernel is written in it", "torch compiles FlexAttention into it"
    assert refused(flex) == [NO_TRITON.format("flex").replace(*reason)]


def test_what_a_device_cannot_take_is_refused_once_the_device_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_num_gpus", lambda: 0)
    flex = attending(device="auto", attention="flex")
    (line,) = refused(flex)
    assert "flex has no backward on a CPU" in line
    planned = resolve_device(replace(flex, cluster=load_cluster("h100x8")), planning=True)
    assert planned.training.device == "cuda"
    require_legal(planned)

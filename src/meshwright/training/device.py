"""Which device a job runs on, and which device of the catalog that is."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from typing import Literal

from meshwright.config.attention import AttentionCall
from meshwright.config.files import load_device
from meshwright.config.tree import Device, Job
from meshwright.errors import UserError
from meshwright.training.process import TRITON_INTERPRET, interprets_triton

_CATALOG_NAMES = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
"""Driver's name → catalog name, in full: an H100 PCIe has another peak than an H100 SXM, and must stay unknown."""


def resolve_device(job: Job, *, planning: bool, local_ranks: int | None = None) -> Job:
    """The job with a definite `training.device`.

    `auto` becomes, for planning, the kind of the cluster's device (a TPU is accounted for like a GPU); for running,
    CUDA if each of the `local_ranks` on this host (default: all ranks) has a GPU, else the CPU. Raises UserError where
    a run asks for CUDA and this host has too few GPUs, for a mask that no kernel of the device takes, or for a kernel
    that cannot take its shape or run here. Planning does not import torch.
    """
    job = _resolved(job, planning, local_ranks or job.layout.world)
    if job.training.documents == "separate" and job.training.device != "cpu":
        raise UserError(
            "training.documents = separate needs training.device = cpu (no attention kernel for GPUs takes its mask "
            "yet): use training.documents joined, or training.device cpu"
        )
    check_attention(job, planning=planning)
    return job


def check_attention(job: Job, *, planning: bool) -> None:
    """Raise UserError where a job's device cannot take its attention kernel, or this machine cannot run it."""
    call, asked = AttentionCall.of(job.model, job.training), job.training.attention
    if job.model.block != "decoder":
        return
    if refusals := call.refusals(asked):
        raise UserError("\n".join(message for _, message in refusals))
    kernel = call.choose(asked).kernel
    if kernel == "flex" and not planning:
        raise UserError(
            "training.attention = flex can be planned, rehearsed and timed (bench attention), not trained with: on an "
            "H200 with torch 2.11, 6 of 7 tests of its operators failed: use training.attention flash or sdpa"
        )
    if planning or kernel != "flash":
        return
    if not _has_triton():
        raise UserError(
            f"training.attention = {asked} needs the package triton, which is not installed (our kernel is written in "
            f"it): pip install triton, or use training.attention sdpa"
        )
    if job.training.device == "cpu" and not interprets_triton(os.environ):
        raise UserError(
            f"training.attention = {asked} with training.device = cpu needs {TRITON_INTERPRET}=1 in the environment (a "
            f"CPU runs our kernel in Triton's interpreter only, thousands of times slower): set it, or use "
            f"training.attention sdpa or naive"
        )


def _resolved(job: Job, planning: bool, ranks: int) -> Job:
    asked = job.training.device
    if planning:
        planned: Literal["cpu", "cuda"] = "cpu" if job.cluster.device.kind == "cpu" else "cuda"
        return _with_device(job, planned if asked == "auto" else asked)
    if asked == "cpu":
        return job
    gpus = _num_gpus()
    if asked == "auto":
        return _with_device(job, "cuda" if gpus >= ranks else "cpu")
    if gpus < ranks:
        raise UserError(
            f"training.device = cuda, but this host has {gpus} GPUs for {ranks} ranks (each rank needs its own): "
            f"use training.device cpu{f', or a layout of {gpus} ranks' if gpus else ''}"
        )
    return job


def known_device() -> Device | None:
    """The catalog's device that this process computes on; None for a CPU, and for a GPU it does not list."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = _CATALOG_NAMES.get(torch.cuda.get_device_name())
    return load_device(name) if name else None


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _with_device(job: Job, device: Literal["cpu", "cuda"]) -> Job:
    return replace(job, training=replace(job.training, device=device))

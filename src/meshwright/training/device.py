"""Which device a job runs on, whether this machine can run it there, and which device of the catalog that is.

What a kernel cannot take on a device, whatever the machine, is a violation of the job's (`Layout.violations`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

from meshwright.config.attention import Kernel, chosen_attention
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
    CUDA if each of the `local_ranks` on this host (default: all ranks) has a GPU, else the CPU. Planning does not
    import torch.
    """
    if job.training.device != "auto":
        return job
    if planning:
        return _with_device(job, "cpu" if job.cluster.device.kind == "cpu" else "cuda")
    return _with_device(job, "cuda" if _num_gpus() >= (local_ranks or job.layout.world) else "cpu")


def check_machine(job: Job, *, local_ranks: int | None = None) -> None:
    """Raise UserError with all that keeps this machine from running a legal job on its device, which is resolved.

    On CUDA each of the `local_ranks` on this host (default: all ranks) needs a GPU.
    """
    _require_none([*_missing_gpus(job, local_ranks or job.layout.world), *_unrunnable_attention(job)])


def check_attention(job: Job) -> None:
    """Raise UserError if this machine cannot run the attention kernel of a legal job on its device."""
    _require_none(_unrunnable_attention(job))


def _require_none(mistakes: Iterable[str]) -> None:
    if found := "\n".join(mistakes):
        raise UserError(found)


def _missing_gpus(job: Job, ranks: int) -> Iterator[str]:
    if job.training.device == "cuda" and (gpus := _num_gpus()) < ranks:
        yield (
            f"training.device = cuda, but this host has {gpus} GPUs for {ranks} ranks (each rank needs its own): "
            f"use training.device cpu{f', or a layout of {gpus} ranks' if gpus else ''}"
        )


def _unrunnable_attention(job: Job) -> Iterator[str]:
    kernel = chosen_attention(job.model, job.training).kernel
    if kernel in ("flash", "flex"):
        yield from _uncompiled(job, kernel)


def _uncompiled(job: Job, kernel: Kernel) -> Iterator[str]:
    """Why Triton cannot run our kernel, or what torch compiles FlexAttention to, here."""
    asked, interpreted = f"training.attention = {job.training.attention}", interprets_triton(os.environ)
    there = f"{asked} with training.device = {job.training.device}"
    if not _has_triton():
        reason = "our kernel is written in it" if kernel == "flash" else "torch compiles FlexAttention into it"
        yield (
            f"{asked} needs the package triton, which is not installed ({reason}): pip install triton, or use "
            f"training.attention sdpa"
        )
    if job.training.device != "cpu":
        if interpreted:
            yield (
                f"{there} does not go with {TRITON_INTERPRET}=1 in the environment (Triton's interpreter would run in "
                f"place of the GPU's kernel): unset it, or use training.attention sdpa"
            )
        return
    if not interpreted:
        yield (
            f"{there} needs {TRITON_INTERPRET}=1 in the environment (a CPU runs our kernel in Triton's interpreter "
            f"only, thousands of times slower): set it, or use training.attention sdpa or naive"
        )
    if job.training.precision == "bf16":
        yield (
            f"{there} and training.precision = bf16 is computed wrong (Triton's interpreter multiplies the bits of "
            f"bfloat16 as integers): use training.precision float32, or training.attention sdpa"
        )


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

"""Which launch of a flash kernel runs: few candidates for each device, dtype and head dimension, the first by default.

Tiles are not tuned: they are the same everywhere (`schemes.flash.flash_tile`). What remains is the implementation, how
many warps, and how deep the pipeline of loads is. `tune` times the candidates on this device and keeps the fastest in a
file that all processes of a user share; nothing is timed unless somebody asks for it (`meshwright bench attention
--tune`), so that no run is slow at first, and ranks never choose apart.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

KernelName = Literal["forward", "dkv", "dq"]
KERNELS: tuple[KernelName, ...] = ("forward", "dkv", "dq")
HOPPER = 90
"""Compute capability that `flash_hopper` is written for."""


@dataclass(frozen=True)
class Candidate:
    """One way to launch a kernel."""

    implementation: Literal["triton", "hopper"]
    num_warps: int
    """Of the whole program; for hopper, of each of its two computing halves."""
    num_stages: int
    """Tiles of each walked tensor in shared memory."""
    descriptors: bool = False
    """Tiles are read through tensor descriptors: 16-byte aligned strides, Hopper or later."""
    late: bool = False
    """hopper's dkv only: products run under the exponentials of the next block."""


class Problem(NamedTuple):
    """What decides how to launch."""

    capability: int
    """Compute capability, 10 times its major number and its minor one; 0 for the interpreter and other makers."""
    itemsize: int
    head_dim: int
    aligned: bool
    """Whether all inputs can be read through descriptors."""


def _triton(num_warps: int, num_stages: int, *, descriptors: bool = False) -> Candidate:
    return Candidate("triton", num_warps, num_stages, descriptors)


def _hopper(num_stages: int, *, late: bool = False) -> Candidate:
    return Candidate("hopper", 4, num_stages, descriptors=True, late=late)


_ON_HOPPER: dict[tuple[KernelName, int], tuple[Candidate, ...]] = {
    ("forward", 64): (_triton(4, 3, descriptors=True), _triton(4, 4, descriptors=True), _hopper(3)),
    ("dkv", 64): (_hopper(3, late=True), _hopper(4, late=True), _hopper(3)),
    ("dq", 64): (_triton(4, 3, descriptors=True), _triton(4, 4, descriptors=True)),
    ("forward", 128): (_hopper(2), _triton(8, 3, descriptors=True)),
    ("dkv", 128): (_hopper(2), _hopper(3), _triton(8, 2, descriptors=True)),
    ("dq", 128): (_hopper(2), _hopper(3), _triton(8, 3, descriptors=True)),
}
"""16-bit inputs that descriptors can read; the first of each was the fastest on an H200."""

_ELSEWHERE: dict[tuple[KernelName, int], tuple[Candidate, ...]] = {
    ("forward", 64): (_triton(4, 3), _triton(4, 2), _triton(8, 3)),
    ("dkv", 64): (_triton(8, 3), _triton(8, 2)),
    ("dq", 64): (_triton(4, 3), _triton(4, 2)),
    ("forward", 128): (_triton(8, 3), _triton(8, 2), _triton(8, 1)),
    ("dkv", 128): (_triton(8, 3), _triton(8, 2), _triton(8, 1)),
    ("dq", 128): (_triton(8, 2), _triton(8, 3)),
    ("forward", 256): (_triton(8, 2), _triton(4, 2), _triton(8, 1)),
    ("dkv", 256): (_triton(8, 2), _triton(8, 1)),
    ("dq", 256): (_triton(8, 2), _triton(8, 3), _triton(8, 1)),
}
"""16-bit inputs on any other device, or with any strides; the first of each loads ahead and spills few registers on
sm_80, if any. Head dimensions below 64 are launched as 64 is."""

_FLOAT32 = (_triton(8, 2), _triton(8, 1))
"""float32, also where it is multiplied as tf32: any device, any strides."""


def candidates(kernel: KernelName, problem: Problem) -> tuple[Candidate, ...]:
    """All that may run, the default first."""
    if problem.itemsize > 2:
        return _FLOAT32
    head_dim = max(problem.head_dim, 64)
    if problem.capability == HOPPER and problem.aligned and problem.head_dim in (64, 128):
        return _ON_HOPPER[kernel, head_dim]
    return _ELSEWHERE[kernel, head_dim]


@functools.cache
def chosen(kernel: KernelName, problem: Problem) -> Candidate:
    """The candidate that was the fastest when this device was tuned; the default where it was not."""
    options = candidates(kernel, problem)
    if problem.capability == 0 or len(options) == 1:
        return options[0]
    kept = _kept(_file()).get(_key(kernel, problem))
    return next((option for option in options if asdict(option) == kept), options[0])


def tune(kernel: KernelName, problem: Problem, launch: Callable[[Candidate], object]) -> dict[Candidate, float]:
    """Milliseconds of each candidate that runs here; the fastest is kept for `chosen`.

    Raises RuntimeError if none runs.
    """
    from triton.testing import do_bench

    times: dict[Candidate, float] = {}
    failures = []
    for option in candidates(kernel, problem):
        try:
            times[option] = do_bench(functools.partial(launch, option), warmup=5, rep=30, return_mode="median")
        except Exception as error:  # one that needs more shared memory than this device has, say
            failures.append(f"{option}: {error}")
    if not times:
        raise RuntimeError(f"no launch of the flash {kernel} kernel runs on this device: {'; '.join(failures)}")
    path = _file()
    kept = {**_kept(path), _key(kernel, problem): asdict(min(times, key=times.__getitem__))}
    _write(path, kept)
    chosen.cache_clear()
    return times


def _key(kernel: KernelName, problem: Problem) -> str:
    return f"{kernel}, {problem.itemsize} bytes, head_dim {problem.head_dim}{', aligned' if problem.aligned else ''}"


def _file() -> Path:
    """Choices of this user for this device, beside what Triton compiled."""
    import torch
    import triton

    device = torch.cuda.get_device_name().lower().replace(" ", "-").replace("/", "-")
    return Path(triton.knobs.cache.dir) / "meshwright-flash" / f"{device}-triton-{triton.__version__}.json"


def _kept(path: Path) -> dict[str, dict[str, object]]:
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _write(path: Path, kept: dict[str, dict[str, object]]) -> None:
    """Replace the file in one step: another process reads the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(kept, file, indent=1)
    os.replace(file.name, path)

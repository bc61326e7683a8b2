"""What `bench attention` measures beside its cells: the rate of a matrix product, and launches of our kernels.

What breaks here is a row that says so, and the cells are measured all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from meshwright.bench.attention_clock import Meter
from meshwright.bench.attention_cost import Cell
from meshwright.bench.attention_rows import matmul_row
from meshwright.bench.attention_run import Lost, attempted
from meshwright.bench.attention_subjects import Inputs
from meshwright.bench.record import row
from meshwright.config.tree import Device
from meshwright.model.build import DTYPES

if TYPE_CHECKING:
    from meshwright.kernels.flash_tuning import Candidate

MATMUL_SAMPLES = 10
MATMUL_WARMUP = 3
MATMUL_MATRICES = 3
"""Both factors and the product."""


def matmul_rows(
    dtypes: Sequence[str], size: int, meter: Meter, device: torch.device, known: Device | None
) -> Iterator[dict[str, Any]]:
    """For each dtype the rate of a square product; what the device reaches in this very run."""
    for dtype in dict.fromkeys(dtypes):
        seconds = attempted(partial(_matmul_seconds, meter, dtype, size, device))
        if isinstance(seconds, Lost):
            yield {"kind": "matmul", "dtype": dtype, "size": size, **seconds.row()}
            continue
        found = matmul_row(dtype, size, seconds, known)
        yield found | {"float32_precision": torch.get_float32_matmul_precision(), "threads": torch.get_num_threads()}


def _matmul_seconds(meter: Meter, dtype: str, size: int, device: torch.device) -> list[float]:
    """Of a product of square matrices of random numbers."""
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    seconds = [meter.seconds(lambda: torch.mm(a, b, out=out))[1] for _ in range(MATMUL_WARMUP + MATMUL_SAMPLES)]
    return seconds[MATMUL_WARMUP:]


def launch_rows(cells: Sequence[Cell], device: torch.device, tell: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Of each cell, every launch of our kernels that may be chosen here; the fastest is kept for later runs."""
    for cell in cells:
        name = f"{cell.dtype} d {cell.head_dim} seq {cell.seq}"
        about: dict[str, Any] = {"kind": "launch", "dtype": cell.dtype, "head_dim": cell.head_dim, "seq": cell.seq}
        tuned = attempted(partial(_tuned, cell, device))
        if isinstance(tuned, Lost):
            tell(f"{name}: launches were not chosen: {tuned.status}: {tuned.reason}")
            yield {**about, "kernel": "all", **tuned.row()}
            continue
        for kernel, times in tuned.items():
            kept = min(times, key=times.__getitem__)
            tell(f"{name} {kernel}: {times[kept]:.3f} ms by {kept}")
            for launch, milliseconds in times.items():
                settings = about | asdict(launch)
                yield row(**settings, kernel=kernel, kept=launch == kept, samples=[milliseconds / 1000], unit="s")


def _tuned(cell: Cell, device: torch.device) -> Mapping[Any, Mapping[Candidate, float]]:
    """Milliseconds of each launch, by kernel. Raises where a kernel has none that runs, or a choice cannot be kept."""
    from meshwright.kernels.flash_attention import tune_flash

    q, k, v = (x.detach() for x in Inputs.of(cell, device))
    return tune_flash(q, k, v, causal=cell.causal)

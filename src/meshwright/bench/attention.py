"""Attention measured: our flash kernels beside naive attention and torch's, over widths, lengths and dtypes.

    meshwright bench attention --quick                     a minute's fraction, on a CPU too
    meshwright bench attention --grid flash --out records  batch 1, 16 heads, causal: fused implementations
    meshwright bench attention --grid naive --out records  batch 8, one head, full: naive attention, compiled and not

A cell is a dtype, a width of a head and a length. `bench.attention_run` says how one is measured,
`bench.attention_cost` what it must compute and keep, `bench.attention_subjects` what there is,
`bench.attention_rows` what is recorded, `bench.attention_beside` what is measured beside the cells.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from meshwright.bench.attention_beside import MATMUL_MATRICES, launch_rows, matmul_rows
from meshwright.bench.attention_clock import CpuMeter, CudaMeter, Meter, free_bytes
from meshwright.bench.attention_cost import ITEM_BYTES, Cell
from meshwright.bench.attention_rows import cell_rows
from meshwright.bench.attention_run import Budget, CellResult, Lost, attempted, run_cell, skipped_cell
from meshwright.bench.attention_subjects import IMPLEMENTATIONS, not_available
from meshwright.bench.record import NOT_REACHED
from meshwright.config.legality import divisors, listed
from meshwright.config.values import nearest
from meshwright.errors import UserError
from meshwright.training.device import known_device
from meshwright.units import format_bytes

DEVICES = ("auto", "cpu", "cuda")
LEAST_SAMPLES = 5
TUNED_SEQ = 8192
TURNS_BESIDE_SAMPLES = 7
"""What a cell's warm-up, memory and profile cost, in turns of all its implementations."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The grid, and how long it may take."""

    grid: str = "flash"
    """Of which preset it was made: a name for people."""
    implementations: tuple[str, ...] = ("flash", "sdpa-flash", "sdpa-cudnn", "flex")
    head_dims: tuple[int, ...] = (64, 128)
    seqs: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    dtypes: tuple[str, ...] = ("bf16",)
    batch: int = 1
    heads: int = 16
    kv_heads: int = 0
    """0 is as many as heads."""
    causal: bool = True
    device: str = "auto"
    repeats: int = 50
    """At most so many samples of each measure."""
    seconds: float = 0.25
    """For one measure of one implementation in a cell, as far as at least 5 samples allow."""
    max_seconds: float = 120.0
    """For all: cells that come later are rows that say so."""
    compile: bool = True
    tune: bool = False
    """First times every launch of our kernels, for each dtype and width, and keeps the fastest for this user."""
    matmul_size: int = 0
    """Of the square product that is timed beside it: 0 is 8192 on a GPU, 1024 on a CPU."""

    @property
    def cells(self) -> list[Cell]:
        """The grid, short sequences first."""
        return [
            Cell(
                dtype=dtype,
                head_dim=head_dim,
                seq=seq,
                batch=self.batch,
                heads=self.heads,
                kv_heads=self.kv_heads or self.heads,
                causal=self.causal,
            )
            for dtype in self.dtypes
            for head_dim in self.head_dims
            for seq in sorted(self.seqs)
        ]

    def command(self) -> str:
        """What measures it again."""
        words = [f"meshwright bench attention --grid {self.grid}"]
        for name, value in vars(self).items():
            if name == "grid" or (name in ("kv_heads", "matmul_size") and not value):
                continue
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else _shown(value)
            words.append(f"--{name.replace('_', '-')} {shown}")
        return " ".join(words)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


FLASH = Setting()
NAIVE = Setting(
    grid="naive",
    implementations=("naive", "naive-compiled", "naive-max-autotune", "flash"),
    head_dims=(16, 32, 64, 128),
    seqs=tuple(2**power for power in range(7, 17)),
    dtypes=("float32", "bf16"),
    batch=8,
    heads=1,
    causal=False,
    max_seconds=600.0,
)
GRIDS = {"flash": FLASH, "naive": NAIVE}
QUICK: dict[str, Any] = {
    "head_dims": (32, 64),
    "seqs": (128, 512),
    "dtypes": ("float32", "bf16"),
    "repeats": 10,
    "seconds": 0.03,
    "max_seconds": 15.0,
    "matmul_size": 512,
}
"""In place of a preset's own."""
QUICK_IMPLEMENTATIONS = {
    "cpu": ("naive", "sdpa-cpu", "flash", "flex"),
    "cuda": ("naive", "sdpa-flash", "sdpa-cudnn", "flash"),
}


def quick(kind: str, *, keep_grid: bool = False) -> dict[str, Any]:
    """What `--quick` sets on a device, unless the implementations and heads of a grid are to stay."""
    own = {} if keep_grid else {"heads": 4, "implementations": QUICK_IMPLEMENTATIONS[kind]}
    return QUICK | own | {"compile": kind != "cpu"}


Rows = list[dict[str, Any]]


def measure(
    setting: Setting, tell: Callable[[str], None], keep: Callable[[Rows], None] = lambda rows: None
) -> list[dict[str, Any]]:
    """Rows of the whole grid. Raises UserError, before anything is measured, for a bad setting.

    `keep` is given what there is after each cell, and says for the rest that it was not reached.
    """
    check(setting)
    kind = device_kind(setting)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(setting, kind, tell, keep)
    finally:
        torch.set_num_threads(threads)


def _measure(setting: Setting, kind: str, tell: Callable[[str], None], keep: Callable[[Rows], None]) -> Rows:
    device, meter = torch.device(kind), _meter(kind)
    known = known_device() if kind == "cuda" else None
    began = time.perf_counter()
    budget = Budget(
        seconds=setting.seconds,
        deadline=began + setting.max_seconds,
        least=min(LEAST_SAMPLES, setting.repeats),
        most=setting.repeats,
        compiles=setting.compile,
    )
    rows = [*matmul_rows(setting.dtypes, _matmul_size(setting, kind), meter, device, known)]
    if setting.tune:
        rows += launch_rows(_tuned_cells(setting), device, tell)
    rates = {row["dtype"]: row["flops_per_second"] for row in rows if "flops_per_second" in row}
    compile_seconds: dict[str, float] = {}
    last: CellResult | None = None
    left = [
        (cell, cell_rows(skipped_cell(cell, setting.implementations, "failed", NOT_REACHED), None, {}))
        for cell in setting.cells
    ]
    keep([*rows, *(row for _, own in left for row in own)])
    while left:
        cell, _ = left.pop(0)
        if (expected := _expected_seconds(cell, last)) > budget.left:
            reason = f"about {max(expected, 0):.0f} s needed, {max(budget.left, 0):.0f} s left: give more --max-seconds"
            result = skipped_cell(cell, setting.implementations, "no time", reason)
        else:
            result = _guarded_cell(cell, setting, meter, device, budget, compile_seconds)
            last = result
        rows += cell_rows(result, known, rates)
        keep([*rows, *(row for _, own in left for row in own)])
        tell(f"{time.perf_counter() - began:6.1f} s  {cell.dtype} d {cell.head_dim} seq {cell.seq}: {_summary(result)}")
    return rows


def device_kind(setting: Setting) -> str:
    """cpu or cuda."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if setting.device == "auto" else setting.device


def device_name(setting: Setting) -> str:
    """As a record wants it: empty for the CPU."""
    return torch.cuda.get_device_name() if device_kind(setting) == "cuda" else ""


def _matmul_size(setting: Setting, kind: str) -> int:
    return setting.matmul_size or (8192 if kind == "cuda" else 1024)


def _meter(kind: str) -> Meter:
    return CudaMeter() if kind == "cuda" else CpuMeter()


def _tuned_cells(setting: Setting) -> list[Cell]:
    """For each dtype and width that our kernels take, one length of the grid."""
    seq = max((seq for seq in setting.seqs if seq <= TUNED_SEQ), default=min(setting.seqs))
    return [cell for cell in setting.cells if cell.seq == seq and not not_available("flash", "cuda", cell)]


def _expected_seconds(cell: Cell, last: CellResult | None) -> float:
    """Of the next cell, from the turns of the last, if that differs by its length alone."""
    if last is None or (last.cell.dtype, last.cell.head_dim) != (cell.dtype, cell.head_dim):
        return 0.0
    return (LEAST_SAMPLES + TURNS_BESIDE_SAMPLES) * last.turn_seconds * cell.pairs / last.cell.pairs


def _guarded_cell(
    cell: Cell,
    setting: Setting,
    meter: Meter,
    device: torch.device,
    budget: Budget,
    compile_seconds: dict[str, float],
) -> CellResult:
    """A cell whose rows say so where even what surrounds its implementations breaks."""
    result = attempted(lambda: run_cell(cell, setting.implementations, meter, device, budget, compile_seconds))
    return skipped_cell(cell, setting.implementations, *result) if isinstance(result, Lost) else result


def _summary(result: CellResult) -> str:
    return ", ".join(
        f"{found.name} {f'× {_num_samples(found.samples)}' if found.status == 'measured' else found.status}"
        for found in result.found
    )


def _num_samples(samples: dict[Any, list[float]]) -> int:
    return len(next(iter(samples.values()), []))


# --- what can be measured ---------------------------------------------------------------------------------------------


def check(setting: Setting) -> None:
    """Raise UserError with a line for each mistake."""
    if mistakes := list(_mistakes(setting)):
        raise UserError("\n".join(mistakes))


def _mistakes(setting: Setting) -> Iterator[str]:
    for name in setting.implementations:
        if name not in IMPLEMENTATIONS:
            fix = nearest(name, IMPLEMENTATIONS) or f": use one of {', '.join(IMPLEMENTATIONS)}"
            yield f"--implementations has {name}, which is not an implementation{fix}"
    for dtype in setting.dtypes:
        if dtype not in ITEM_BYTES:
            yield f"--dtypes has {dtype}, which is not a dtype of this benchmark: use {' or '.join(ITEM_BYTES)}"
    for option, values, example in (("head-dims", setting.head_dims, "64,128"), ("seqs", setting.seqs, "1024,4096")):
        yield from (
            f"--{option} has {value}, which is not a whole number above 0: use such as {example}"
            for value in values
            if value < 1
        )
    for name in ("implementations", "dtypes", "head_dims", "seqs"):
        values = getattr(setting, name)
        if repeated := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
            yield f"--{name.replace('_', '-')} has {repeated[0]} more than once: give it once"
    for name, least in (("batch", 1), ("heads", 1), ("kv_heads", 0), ("repeats", 1), ("matmul_size", 0)):
        if getattr(setting, name) < least:
            yield f"--{name.replace('_', '-')} = {getattr(setting, name)} is not a whole number above 0"
    for name in ("seconds", "max_seconds"):
        if getattr(setting, name) <= 0:
            yield f"--{name.replace('_', '-')} = {getattr(setting, name):g} is not a number above 0"
    if setting.kv_heads > 0 and setting.heads > 0 and setting.heads % setting.kv_heads:
        yield (
            f"--kv-heads = {setting.kv_heads} does not divide --heads = {setting.heads} (each KV head serves as many "
            f"query heads): use {listed(divisors(max(setting.heads, 1))[-4:])}"
        )
    if setting.device not in DEVICES:
        yield f'--device = "{setting.device}" is not one of {", ".join(DEVICES)}'
    elif setting.device == "cuda" and not torch.cuda.is_available():
        yield "--device = cuda, but torch finds no GPU here: use --device cpu"
    else:
        if setting.tune and device_kind(setting) == "cpu":
            yield "--tune = true times launches on a GPU, and torch finds none here: use --tune false"
        yield from _matmul_mistakes(setting)


def _matmul_mistakes(setting: Setting) -> Iterator[str]:
    """What was not asked for and does not fit is no mistake: its row says so."""
    item_bytes = max((ITEM_BYTES[dtype] for dtype in setting.dtypes if dtype in ITEM_BYTES), default=0)
    needed, free = MATMUL_MATRICES * setting.matmul_size**2 * item_bytes, free_bytes(device_kind(setting))
    if setting.matmul_size > 0 and needed > free:
        most = math.isqrt(free // (MATMUL_MATRICES * item_bytes))
        yield (
            f"--matmul-size = {setting.matmul_size} needs {needed} bytes for {MATMUL_MATRICES} matrices, and "
            f"{format_bytes(free)} are free: use at most {most}"
        )

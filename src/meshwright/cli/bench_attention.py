"""Options of `bench attention`."""

from __future__ import annotations

import json as encoding
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from meshwright.cli.writable import tried_folder, writable
from meshwright.errors import UserError

if TYPE_CHECKING:
    from meshwright.bench import attention, record

_LISTS: dict[str, Callable[[str], Any]] = {"head_dims": int, "seqs": int, "dtypes": str, "implementations": str}


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention on one device: our flash kernels, naive attention, torch's kernels, by width, length and dtype."""

    quick: bool = False
    """A small grid and few samples, where others are not given: seconds, on a CPU too."""
    grid: Literal["naive", "flash"] | None = None
    """flash: batch 1, 16 heads, causal, bf16, fused ones. naive: batch 8, one head, full, both dtypes, naive ones."""
    head_dims: str | None = None
    """Widths of a head, between commas: 64,128, or 16,32,64,128 in the naive grid."""
    seqs: str | None = None
    """Lengths, between commas: 1024 to 65536, or 128 to 65536 in the naive grid, each twice the one before."""
    dtypes: str | None = None
    """Between commas: float32,bf16."""
    implementations: str | None = None
    """Between commas: naive, naive-compiled, naive-max-autotune, sdpa-flash, sdpa-efficient, sdpa-cudnn, sdpa-math,
    sdpa-cpu, flash, flex."""
    batch: int | None = None
    """Sequences: 1, or 8 in the naive grid."""
    heads: int | None = None
    """Query heads: 16, or 1 in the naive grid, 4 if quick."""
    kv_heads: int | None = None
    """Key and value heads; as many as query heads if not given."""
    causal: bool | None = None
    """Whether a query sees only what is before it: true, or false in the naive grid."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """auto: the GPU if there is one."""
    repeats: int | None = None
    """At most so many samples of each measure: 50, or 10 if quick."""
    seconds: float | None = None
    """For one measure of one implementation in a cell, as far as 5 samples allow: 0.25."""
    max_seconds: float | None = None
    """For the whole grid: 120, or 600 in the naive one, 15 if quick; what comes later is skipped, and says so."""
    matmul_size: int | None = None
    """Width of the square product whose rate is measured beside: 8192, or 1024 on a CPU, 512 if quick."""
    compile: bool | None = None
    """Whether to run what must be compiled: true, or false on a CPU if quick."""
    tune: bool | None = None
    """Whether to time every launch of our kernels first, and keep the fastest for later runs: false."""
    out: str | None = None
    """Also write the record into this folder, as attention/DEVICE-DATE.json, anew after each cell."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def show(self) -> int:
        """1 where something failed; what was not available, did not fit or had no time did not."""
        setting = self.setting()
        from meshwright.bench import attention, record

        attention.check(setting)
        command, device = setting.command(), attention.device_name(setting)
        tell: Callable[[str], None] = _silent if self.json else print
        if self.out is None:
            kept, rows = None, attention.measure(setting, tell)
        else:
            kept = record.Growing("attention", command, device, tried_folder("--out", self.out))
            rows = attention.measure(setting, tell, partial(_write, kept))
        if self.json:
            found = record.of("attention", command, rows, device)
            print(encoding.dumps({"records": [found]}, allow_nan=False))
        else:
            from meshwright.cli.show_attention import show_attention

            show_attention(rows)
            if kept:
                print(f"written: {kept.path}")
        return 1 if any("failed" in row for row in rows) else 0

    def setting(self) -> attention.Setting:
        """What these options ask for. Raises UserError for lists that are none."""
        from meshwright.bench import attention

        own = {name: value for name, value in vars(self).items() if name not in ("quick", "grid", "out", "json")}
        given = {name: value for name, value in own.items() if value is not None}
        for name in _LISTS:
            if name in given:
                given[name] = _between_commas(name, given[name], _LISTS[name])
        setting = replace(attention.GRIDS[self.grid or "flash"], device=given.get("device", "auto"))
        if self.quick:
            quick = attention.quick(attention.device_kind(setting), keep_grid=self.grid is not None)
            setting = replace(setting, **quick)
        return replace(setting, **given)


def _write(kept: record.Growing, rows: list[dict[str, Any]]) -> None:
    with writable("--out", kept.folder, "folder"):
        kept.write(rows)


def _silent(_: str) -> None:
    """Where stdout is for JSON."""


def _between_commas(name: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    option, words = name.replace("_", "-"), [word.strip() for word in text.split(",")]
    if kind is int:
        try:
            return tuple(int(word) for word in words)
        except ValueError:
            raise UserError(f'--{option} = "{text}" is not whole numbers between commas: use 64,128') from None
    if not all(words):
        raise UserError(f'--{option} = "{text}" is not names between commas')
    return tuple(words)

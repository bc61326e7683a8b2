"""The benchmarks: for each NAME one dataclass, which is its options and measures.

A new benchmark is a class here and a line in `BENCHES`. It is a page of `bench/`, imported when it is run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Literal, Protocol


class Measurement(Protocol):
    """Options of a benchmark."""

    def show(self) -> int:
        """Measure and print; the exit code."""
        ...


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Attention over a divided sequence on 1, 2 and 4 ranks here: ring in both orders, Ulysses, and both together."""

    quick: bool = False
    """Small sizes and few samples, where others are not given: a few seconds."""
    seq: int | None = None
    """Tokens in the whole sequence: 4096, or 512 if quick."""
    heads: int | None = None
    """Query heads: 8, or 4 if quick."""
    kv_heads: int | None = None
    """Key and value heads: 4, or 2 if quick."""
    head_dim: int | None = None
    """Width of a head: 64, or 32 if quick."""
    batch: int | None = None
    """Sequences: 1."""
    precision: Literal["float32", "bf16"] | None = None
    """Compute precision: float32."""
    samples: int | None = None
    """How often each layout is timed, in turns: 15, or 6 if quick."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def show(self) -> int:
        """1 where a layout failed, or differs from its formula."""
        from meshwright.bench import record, ring
        from meshwright.bench.context import Setting

        own = {name: value for name, value in vars(self).items() if name not in ("quick", "json")}
        given = {name: value for name, value in own.items() if value is not None}
        setting = replace(ring.QUICK if self.quick else Setting(), **given)
        rows = ring.measure(setting)
        if self.json:
            print(json.dumps({"records": [record.of("ring", setting.command(), rows)]}, allow_nan=False))
        else:
            from meshwright.cli.show import show_ring

            show_ring(rows)
        return 1 if any("failed" in row for row in rows) else 0


BENCHES: dict[str, type[Measurement]] = {"ring": Ring}

"""Records of `bench attention`: rows of its results.

    kind matmul    seconds of a square product in a dtype, and its rate: what the device reaches in this very run
    kind time      seconds of one measure of an implementation in a cell, its limit and per cent of it, and its kernel
    kind memory    bytes held for backward and at the peak: predicted, measured, and whether they are equal
    kind ratio     an implementation against another, of samples that are pairs
    kind account   what naive attention keeps for backward and a fused one does not: by tensor, predicted and measured

What was not measured is one row of kind time, with its `status`: `failed` where it broke, `skipped` where it could not
be had (not available, out of memory, predicted or not, no time).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from meshwright.bench import record
from meshwright.bench.attention_clock import Measured
from meshwright.bench.attention_cost import MEASURES, Cell, Measure, memory
from meshwright.bench.attention_run import CellResult, Found
from meshwright.bench.attention_subjects import COMPILED, OURS
from meshwright.bench.pairs import ratio_row
from meshwright.config.tree import Device

FUSED = ("flash", "sdpa-flash", "sdpa-cpu", "sdpa-efficient", "sdpa-cudnn")
"""With which all others are compared: the first of these that was measured."""


def matmul_row(dtype: str, size: int, seconds: Sequence[float], device: Device | None) -> dict[str, Any]:
    """A product of two matrices of `size` × `size`."""
    flops = 2 * size**3
    peak = device.peak_flops.get(dtype) if device else None
    row = record.row(
        kind="matmul",
        dtype=dtype,
        size=size,
        flops=flops,
        samples=seconds,
        unit="s",
        limit=flops / peak if peak else None,
        limit_kind="least",
    )
    return row | {"flops_per_second": flops / row["median"]}


def cell_rows(result: CellResult, device: Device | None, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """All rows of a cell; `rates` are FLOP/s of matrix products by dtype."""
    rows = [row for found in result.found for row in _time_rows(result, found, device, rates)]
    rows += [_memory_row(result.cell, found) for found in result.found if found.status == "measured"]
    rows += _ratio_rows(result)
    return [*rows, *_account_rows(result)]


def _time_rows(
    result: CellResult, found: Found, device: Device | None, rates: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    about = {"kind": "time", "implementation": found.name, **asdict(result.cell)}
    if found.status != "measured":
        why = "failed" if found.status == "failed" else "skipped"
        needed = memory(found.name, result.cell)
        yield record.row(
            **about,
            measure="all",
            status=found.status,
            predicted_peak_bytes=needed.peak,
            free_bytes=result.free_bytes,
        ) | {why: found.reason}
    for measure in MEASURES:
        if measure in found.missing:
            yield record.row(**about, measure=measure, status="not available", skipped=found.missing[measure])
        elif measure in found.samples:
            yield _time_row(result, found, measure, about, device, rates)


def _time_row(
    result: CellResult,
    found: Found,
    measure: Measure,
    about: Mapping[str, Any],
    device: Device | None,
    rates: Mapping[str, float],
) -> dict[str, Any]:
    cell, flops = result.cell, result.cell.flops(measure)
    limit = cell.limit(measure, device) if device else None
    row = record.row(
        **about,
        measure=measure,
        status="measured",
        flops=flops,
        moved_bytes=cell.moved_bytes(measure),
        samples=found.samples[measure],
        unit="s",
        limit=limit[0] if limit else None,
        limit_kind="least",
    )
    row["flops_per_second"] = rate = flops / row["median"]
    row["allocations_while_timed"] = result.allocations
    if limit:
        row["limit_by"] = limit[1]
    if cell.dtype in rates:
        row["percent_of_matmul"] = 100 * rate / rates[cell.dtype]
    if found.name in (*COMPILED, *OURS):
        row["compile_seconds"] = max(0.0, found.first_seconds - _steady(found))
    if measure in found.kernels:
        kernel = found.kernels[measure]
        row |= {"kernel": kernel.name, "kernel_share": kernel.share}
    elif measure != "both" and found.kernels_unknown:
        row["kernel_unknown"] = found.kernels_unknown
    return row


def _steady(found: Found) -> float:
    samples = found.samples.get("both") or found.samples.get("forward") or [0.0]
    return statistics.median(samples)


def _memory_row(cell: Cell, found: Found) -> dict[str, Any]:
    predicted = memory(found.name, cell)
    row: dict[str, Any] = {
        "kind": "memory",
        "implementation": found.name,
        **asdict(cell),
        "input_bytes": cell.input_bytes,
        "predicted_held_bytes": predicted.held_bytes,
        "predicted_held": predicted.held_certainty,
        "predicted_peak_bytes": predicted.peak,
        "predicted_peak": predicted.peak_certainty,
    }
    if not isinstance(found.measured, Measured):
        return row | {"not_measured": found.measured}
    held, peak = found.measured.held_bytes, found.measured.peak_bytes
    return row | {
        "held_bytes": held,
        "peak_bytes": peak,
        "counted_by": found.measured.counted_by,
        "held_equal": held == predicted.held_bytes if predicted.held_certainty == "exact" else None,
        "peak_equal": peak == predicted.peak if predicted.peak_certainty == "exact" else None,
    }


def _ratio_rows(result: CellResult) -> Iterator[dict[str, Any]]:
    """Each implementation against the first of `FUSED` that was measured, or else against the first of all."""
    timed = {found.name: found for found in result.found if found.samples}
    if len(timed) < 2:
        return
    baseline = next((name for name in FUSED if name in timed), next(iter(timed)))
    for name in timed:
        for measure in MEASURES:
            samples = {key: timed[key].samples.get(measure, []) for key in (name, baseline)}
            if name == baseline or not all(samples.values()):
                continue
            about = {"kind": "ratio", "implementation": name, "baseline": baseline, "measure": measure}
            yield ratio_row(name, baseline, samples, {}, **about, **asdict(result.cell))


def _account_rows(result: CellResult) -> Iterator[dict[str, Any]]:
    """Naive attention's tensors for backward, beside those of a fused one."""
    measured = {found.name: found.measured for found in result.found if isinstance(found.measured, Measured)}
    fused = next((name for name in FUSED if name in measured), None)
    if "naive" not in measured or fused is None:
        return
    cell, row = result.cell, dict[str, Any]()
    total = 0
    for name, sign in (("naive", 1), (fused, -1)):
        predicted = memory(name, cell)
        held = predicted.held or {}
        total += sign * sum(held.values())
        row[f"{'naive' if sign > 0 else 'fused'}_keeps"] = [*predicted.saved, *held]
        row[f"{'naive' if sign > 0 else 'fused'}_held_bytes"] = [0] * len(predicted.saved) + list(held.values())
    difference = measured["naive"].held_bytes - measured[fused].held_bytes
    yield {
        "kind": "account",
        "implementation": "naive",
        "fused": fused,
        **asdict(cell),
        **row,
        "predicted_difference_bytes": total,
        "measured_difference_bytes": difference,
        "equal": difference == total,
    }

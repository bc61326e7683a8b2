"""What commands print for people: tables, plain where stdout is not a terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from meshwright.account import StepAccount
from meshwright.config.attention import chosen_attention
from meshwright.config.tree import AXES, Job, Layout
from meshwright.planner.placement import Placement
from meshwright.planner.search import Candidate, Plan
from meshwright.schemes.fsdp import own_rows
from meshwright.schemes.params import ParamSpec
from meshwright.schemes.question import Question
from meshwright.schemes.table import NOTES, Row
from meshwright.units import format_bytes, format_count, format_flops, format_seconds

PLAIN_WIDTH = 200
SHOWN_RANKS = 16


def show_plan(plan: Plan) -> None:
    """A row a layout; then what was rejected, and what was assumed."""
    device = plan.job.cluster.device.name
    table = columns("layout", "fits", ">memory", ">step", ">MFU", ">exposed", "why")
    for candidate in plan.layouts:
        table.add_row(*_plan_cells(candidate))
    emit(f"{plan.job.name} on {device} ({plan.job.cluster.name}), {plan.job.training.precision}", table)
    if plan.rejected:
        table = columns("rejected by", ">layouts", "for instance", "fix")
        for group in plan.rejected:
            table.add_row(group.rule, str(group.count), group.example, group.fix)
        emit(table)
    chosen = f"{'of the first, ' if len(plan.layouts) > 1 else ''}{plan.layouts[0].overlap}"
    emit(*(f"note: {note}" for note in plan.notes), chosen)


def _plan_cells(candidate: Candidate) -> list[str]:
    seconds, mfu = candidate.step_seconds, candidate.mfu
    return [
        _degrees(candidate.job.layout),
        {True: "yes", False: "no", None: "?"}[candidate.fits],
        format_bytes(candidate.account.footprint.peak),
        seconds_text(seconds),
        "?" if mfu is None else f"{mfu:.1%}",
        "?" if seconds is None else format_seconds(sum(candidate.account.timeline.exposed_seconds.values())),
        candidate.why,
    ]


def show_account(account: StepAccount, job: Job) -> None:
    """Totals of the ledger by axis and phase, the footprint at its peak, FLOPs and time."""
    emit(f"{job.name}, rank {account.rank} of {account.world} ({_degrees(job.layout)}), {account.source}")
    attention = chosen_attention(job.model, job.training)
    if attention.asked == "auto":
        emit(f"training.attention = auto takes {attention}")
    if account.ledger.rows:
        emit(_ledger_table(account))
    footprint = account.footprint
    table = columns("memory at the peak", ">bytes", ">")
    for category, nbytes in footprint.bytes.items():
        if nbytes:
            table.add_row(category.replace("_", " "), f"{nbytes:,}", format_bytes(nbytes))
    table.add_row("peak", f"{footprint.peak:,}", format_bytes(footprint.peak))
    emit(table, f"peak in {footprint.peak_phase} at {footprint.peak_site or 'the model'}; {_room(footprint.peak, job)}")
    work = account.work.to_json()
    table = columns("FLOPs", ">", ">")
    for name in ("forward", "backward", "recompute", "optimiser"):
        if flops := work[f"{name}_flops"]:
            table.add_row(name, f"{flops:,}", _flops(flops))
    emit(table, f"step: {seconds_text(account.timeline.step_seconds)} (time model: {account.time_model})")


def _ledger_table(account: StepAccount) -> Table:
    totals: dict[tuple[str, int, str, str], list[int]] = {}
    for key, count in account.ledger.rows.items():
        total = totals.setdefault((key.axis, key.group_size, key.phase, key.operation), [0, 0, 0])
        for i, value in enumerate((count, count * key.payload_bytes, count * key.wire_bytes)):
            total[i] += value
    table = columns("axis", ">ranks", "phase", "operation", ">calls", ">payload", ">wire")
    for (axis, size, phase, operation), (count, payload, wire) in totals.items():
        table.add_row(axis, str(size), phase, operation, f"{count:,}", format_bytes(payload), format_bytes(wire))
    return table


def _room(peak: int, job: Job) -> str:
    device = job.cluster.device
    if not device.memory_bytes:
        return f"the memory of {device.name} is not known"
    if peak > device.memory_bytes:
        return f"{format_bytes(peak - device.memory_bytes)} more than {device.name} has"
    return f"fits into the {format_bytes(device.memory_bytes)} of {device.name}"


def show_placement(placement: Placement, rank: int) -> None:
    """Ranks, and the parts of one of them; the equal blocks of the model as one row."""
    layout = placement.job.layout
    axes = [axis for axis in AXES if layout.degree(axis) > 1]
    table = columns(">rank", ">host", *(f">{axis}" for axis in axes))
    for place in placement.places[:SHOWN_RANKS]:
        table.add_row(str(place.rank), str(place.host), *(str(place.coordinates[axis]) for axis in axes))
    hosts = placement.places[-1].host + 1
    emit(f"{placement.job.name}: {layout.world} ranks on {hosts} host{'s' * (hosts > 1)} ({_degrees(layout)})", table)
    if len(placement.places) > SHOWN_RANKS:
        emit(f"and {len(placement.places) - SHOWN_RANKS} more; --json has all")
    coordinates = layout.coordinates(rank)
    fully = layout.zero_stage >= 2
    table = columns(
        "parameter", "whole", f"on rank {rank}", "split", "part", *(["its rows of states"] if fully else [])
    )
    for name, copies, spec in _unrepeated(placement):
        split, part = "", "all"
        if spec.split is not None:
            start, end = spec.span(coordinates[spec.split.axis])
            split, part = f"dim {spec.split.dim} over {spec.split.axis}", f"{start}:{end}"
        whole, local = _shape(spec.shape), _shape(spec.local_shape)
        own = own_rows(spec, layout.state_group_size, layout.state_coordinate(rank)) if fully else ()
        rows = [f"{own[0]}:{own[1]}"] if own else []
        table.add_row(name if copies == 1 else f"{name}  × {copies}", whole, local, split, part, *rows)
    emit(table)
    if layout.state_axes:
        emit(f"zero {layout.zero_stage}: states are sharded over {layout.state_axis}, {layout.state_group_size} ranks")


def _unrepeated(placement: Placement) -> list[tuple[str, int, ParamSpec]]:
    """(name with * for the block's number, how many there are, the first of them)."""
    groups: dict[str, list[ParamSpec]] = {}
    for spec in placement.specs:
        groups.setdefault(re.sub(r"^layers\.\d+\.", "layers.*.", spec.name), []).append(spec)
    return [(name, len(specs), specs[0]) for name, specs in groups.items()]


def show_ring(rows: Sequence[dict[str, Any]]) -> None:
    """A row a case, then a row a comparison; numbers that differ among ranks as their range."""
    cases, comparisons = ([row for row in rows if key in row] for key in ("layout", "comparison"))
    first = cases[0]
    names = ("seq", "heads", "kv_heads", "head_dim", "batch", "precision")
    problem = ", ".join(f"{name.replace('_', ' ')} {first[name]}" for name in names)
    table = columns("layout", ">FLOPs fwd", ">FLOPs bwd", ">sent", ">peak", ">by formula", ">seconds", ">spread", "")
    for row in cases:
        flops = (_range(row[key], _flops) for key in ("forward_flops", "backward_flops"))
        sizes = (_range(row[key], format_bytes) for key in ("wire_bytes", "peak_bytes", "formula_peak_bytes"))
        seconds = (seconds_text(row.get(key)) for key in ("median", "spread"))
        table.add_row(row["layout"], *flops, *sizes, *seconds, row.get("failed", ""))
    emit(f"Forward and backward of attention, a rank: {problem}", table)
    table = columns("seconds of … / seconds of …", ">ratio", ">interval", ">confidence", ">limit", ">of that", "")
    for row in comparisons:
        table.add_row(row["comparison"], *_ratio_cells(row), row.get("failed", ""))
    emit(table, f"note: {first['note']}")


def _ratio_cells(row: dict[str, Any]) -> list[str]:
    if "median" not in row:
        return ["?", "", "", "", ""]
    low, high = row["interval"]
    limited = [f"{row['limit']:.2f}", f"{row['percent_of_limit']:.0f} %"] if "limit" in row else ["", ""]
    return [f"{row['median']:.2f}", f"{low:.2f} to {high:.2f}", f"{row['confidence']:.0%}", *limited]


def _range(values: Sequence[int], shown: Callable[[int], str]) -> str:
    """Of the numbers of all ranks."""
    if not values:
        return "?"
    least, most = min(values), max(values)
    return shown(least) if least == most else f"{shown(least)} to {shown(most)}"


def _flops(flops: int) -> str:
    return format_flops(flops).removesuffix("/s")


def show_schemes(rows: Sequence[Row], question: Question) -> None:
    """What each scheme does, then how much of it: two tables, as one is wider than a terminal."""
    kinds = columns("scheme", "splits", "operation", ">calls\nfwd", ">\nbwd", ">\nopt", "overlaps")
    for row in rows:
        calls = str(row.calls_forward), str(row.calls_backward), str(row.calls_optimiser)
        kinds.add_row(row.scheme, row.splits, row.operation, *calls, row.overlaps)
    grown = ">seq\n×2", ">degree\n×2", ">both\n×2"
    sizes = columns("scheme", ">elements\nfwd", ">sent\nbwd", ">\nopt", ">\nbytes", ">saved\nbytes", *grown)
    for row in rows:
        elements = map(_elements, (row.elements_forward, row.elements_backward, row.elements_optimiser))
        growth = (ratio or "-" for ratio in (row.when_seq_grows, row.when_degree_grows, row.when_both_grow))
        sizes.add_row(row.scheme, *elements, format_bytes(row.bytes), format_bytes(row.saved_bytes), *growth)
    sent = "Last columns: bytes sent, where the sequence, the degree or both double. --json has exact figures."
    emit(
        "   ".join(f"{name.replace('kv_', 'KV ')} {value}" for name, value in vars(question).items()),
        kinds,
        sizes,
        sent,
        *NOTES,
    )


def _elements(number: int) -> str:
    """A B beside bytes would be read as bytes."""
    return format_count(number).replace("B", "G")


# --- tables -----------------------------------------------------------------------------------------------------------


def columns(*columns: str) -> Table:
    """`>` before a heading aligns its column right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    return table


def emit(*parts: Table | str) -> None:
    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, width=None if terminal else PLAIN_WIDTH, highlight=False, markup=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def _degrees(layout: Layout) -> str:
    return " × ".join(f"{axis} {layout.degree(axis)}" for axis in AXES if layout.degree(axis) > 1) or "one rank"


def seconds_text(seconds: float | None) -> str:
    return "?" if seconds is None else format_seconds(seconds)


def _shape(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape))

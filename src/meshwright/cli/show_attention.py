"""What `bench attention` prints for people: a table a dtype, width and length, 120 columns wide at most."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from meshwright.cli.show import columns, emit
from meshwright.units import GIB, MIB, format_flops, format_seconds

_CELL = ("dtype", "head_dim", "seq", "batch", "heads", "kv_heads", "causal")
_KERNEL_WIDTH = 20
Rows = Sequence[dict[str, Any]]


def show_attention(rows: Rows) -> None:
    """Rates of matrix products, then all cells of a dtype in a table, what was skipped, ratios and accounts."""
    for row in (row for row in rows if row["kind"] == "matmul"):
        if "flops_per_second" not in row:
            emit(f"matmul {row['dtype']} {row['size']}³: {row['status']}: {row.get('failed') or row['skipped']}")
            continue
        of = f", {row['percent_of_limit']:.0f} % of the datasheet's" if "limit" in row else ""
        emit(f"matmul {row['dtype']} {row['size']}³: {format_flops(row['flops_per_second'])}{of}")
    for title, own in _grids(rows):
        emit("", title)
        if any(row["kind"] == "memory" for row in own):
            emit(_table(own), *_kernels(own))
        emit(*_skipped(own))
        if ratios := [row for row in own if row["kind"] == "ratio"]:
            emit(_ratios(ratios))
        if accounts := [row for row in own if row["kind"] == "account"]:
            emit(_accounts(accounts))
    emit(*_LEGEND)


_LEGEND = (
    "%: of the device's limit, max(useful FLOPs / peak, bytes / bandwidth), where known; in brackets of matmul's rate.",
    "held: bytes kept for backward alone, neither input nor output. peak: of forward and backward, beside the inputs.",
)


def _grids(rows: Rows) -> Iterator[tuple[str, Rows]]:
    """By dtype and everything but width and length."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] not in ("matmul", "launch"):
            groups.setdefault(tuple(row[key] for key in _CELL if key not in ("head_dim", "seq")), []).append(row)
    for (dtype, batch, heads, kv_heads, causal), own in groups.items():
        shared = f" ({kv_heads} of keys)" if heads != kv_heads else ""
        kind = "causal" if causal else "full"
        yield f"Attention in {dtype}: batch {batch}, {heads} head{'s' * (heads > 1)}{shared}, {kind}", own


def _table(rows: Rows) -> Any:
    unit, scale = _unit([row["flops_per_second"] for row in rows if "flops_per_second" in row], _RATES)
    memory_unit, memory_scale = _unit([row["peak_bytes"] for row in rows if "peak_bytes" in row], _SIZES)
    table = columns(
        ">d", ">seq", "implementation", ">ms\nfwd", ">\nbwd", f">{unit}\nfwd", ">\nbwd", ">%\nfwd", ">\nbwd",
        f">{memory_unit}\nheld", ">\npeak", ">compile", "kernel",
    )  # fmt: skip
    table.padding, table.collapse_padding = (0, 1, 0, 0), True
    last = None
    for row in sorted((row for row in rows if row["kind"] == "memory"), key=lambda row: (row["head_dim"], row["seq"])):
        here = row["head_dim"], row["seq"]
        times = {r["measure"]: r for r in rows if r["kind"] == "time" and _same(r, row) and "median" in r}
        where = (str(here[0]), str(here[1])) if last != here else ("", "")
        memory = [_number(row.get(key), memory_scale) for key in ("held_bytes", "peak_bytes")]
        table.add_row(*where, row["implementation"], *_time_cells(times, scale), *memory, *_kernel_cells(times))
        last = here
    return table


_RATES = (("TFLOP/s", 1e12), ("GFLOP/s", 1e9))
_SIZES = (("GiB", float(GIB)), ("MiB", float(MIB)))


def _unit(values: Sequence[float], units: Sequence[tuple[str, float]]) -> tuple[str, float]:
    """The first unit unless all values are small in it."""
    return units[0] if max(values, default=0.0) >= 0.1 * units[0][1] else units[1]


def _number(value: float | None, scale: float) -> str:
    """Three digits, without an exponent where that is short."""
    if value is None:
        return "?"
    scaled = value / scale
    return f"{scaled:.0f}" if scaled >= 1000 else f"{scaled:.3g}" if scaled >= 0.001 or not scaled else "<0.001"


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[key] == b[key] for key in (*_CELL, "implementation"))


def _time_cells(times: dict[str, dict[str, Any]], scale: float) -> list[str]:
    found = [times.get(measure, {}) for measure in ("forward", "backward")]
    seconds = [_number(row.get("median"), 1e-3) if row else "" for row in found]
    rates = [_number(row.get("flops_per_second"), scale) if row else "" for row in found]
    return [*seconds, *rates, *(_percent(row) for row in found)]


def _percent(row: dict[str, Any]) -> str:
    limit = f"{row['percent_of_limit']:.0f}" if "percent_of_limit" in row else ""
    return f"{limit} ({row['percent_of_matmul']:.0f})" if "percent_of_matmul" in row else limit


def _kernel_cells(times: dict[str, dict[str, Any]]) -> list[str]:
    forward = times.get("forward", {})
    compiling = format_seconds(forward["compile_seconds"]) if "compile_seconds" in forward else ""
    name = short_name(forward.get("kernel", ""))
    return [compiling, name if len(name) <= _KERNEL_WIDTH else f"{name[: _KERNEL_WIDTH - 1]}…"]


def short_name(kernel: str) -> str:
    """A kernel without its namespaces, templates and arguments."""
    if kernel.startswith("aten::"):
        return kernel
    return re.sub(r"[<(].*", "", kernel.removeprefix("void ")).rpartition("::")[2]


def _kernels(rows: Rows) -> Iterator[str]:
    """For each implementation, the names of all kernels that took most of a forward or of a backward."""
    names: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row["kind"] == "time" and "kernel" in row:
            known = names.setdefault(row["implementation"], {}).setdefault(row["measure"], [])
            if (name := short_name(row["kernel"])) not in known:
                known.append(name)
    for implementation, measures in names.items():
        told = "; ".join(f"{measure} {', '.join(found)}" for measure, found in measures.items())
        yield f"kernels of {implementation}: {told}"


def _skipped(rows: Rows) -> Iterator[str]:
    """A line for all cells of an implementation that were skipped for the same reason, figures aside."""
    cells: dict[tuple[str, str, str], list[str]] = {}
    reasons: dict[tuple[str, str, str], str] = {}
    for row in rows:
        reason = row.get("failed") or row.get("skipped")
        if row["kind"] == "time" and reason:
            key = row["implementation"], row["status"], re.sub(r"[\d.]+", "#", reason)
            place = f"d {row['head_dim']} seq {row['seq']}"
            reasons.setdefault(key, reason)
            if place not in cells.setdefault(key, []):
                cells[key].append(place)
    for key, places in cells.items():
        some = places[0] if len(places) == 1 else f"{len(places)} cells, first {places[0]}"
        yield f"{key[0]}: {key[1]}: {reasons[key]} ({some})"


def _ratios(rows: Rows) -> Any:
    table = columns(
        ">d", ">seq", "seconds of … / seconds of …", ">fwd", ">interval", ">bwd", ">interval", ">both", ">interval"
    )
    cells: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["head_dim"], row["seq"], row["comparison"]), {})[row["measure"]] = row
    for (head_dim, seq, comparison), found in cells.items():
        shown = []
        for measure in ("forward", "backward", "both"):
            ratio = found.get(measure)
            shown += [f"{ratio['median']:.2f}", "{:.2f} to {:.2f}".format(*ratio["interval"])] if ratio else ["", ""]
        table.add_row(str(head_dim), str(seq), comparison, *shown)
    return table


def _accounts(rows: Rows) -> Any:
    table = columns(">d", ">seq", "naive keeps", "fused keeps", ">naive − fused: by formula", ">measured", "equal")
    for row in rows:
        table.add_row(
            str(row["head_dim"]),
            str(row["seq"]),
            ", ".join(row["naive_keeps"]),
            f"{', '.join(row['fused_keeps'])} ({row['fused']})",
            f"{row['predicted_difference_bytes']:,}",
            f"{row['measured_difference_bytes']:,}",
            "yes" if row["equal"] else "NO",
        )
    return table

"""What `bench collectives` and `bench calibrate` print for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from meshwright.cli.show import columns, emit, seconds_text
from meshwright.units import format_bandwidth, format_bytes, format_flops

_PLACE = ("where", "backend", "ranks", "hosts", "ranks_per_host")


def show_collectives(rows: Sequence[dict[str, Any]]) -> None:
    """For each place a row a case and a row a fit; sizes that were not run as a line each."""
    for place, found in _by_place(rows):
        emit(place)
        cases, fits = ([row for row in found if row.get("kind") == kind] for kind in ("case", "fit"))
        if cases:
            table = columns(
                "tier", "operation", ">payload", ">seconds", ">spread", ">algorithm", ">bus", ">link", ">of limit"
            )
            for row in (row for row in cases if "median" in row):
                table.add_row(*_case_cells(row))
            emit(table, *_skipped(cases))
        if fits:
            table = columns("fit", "tier", ">latency", ">bandwidth", ">link's rate", ">worst residual", "")
            for row in fits:
                table.add_row(*_fit_cells(row))
            emit(table)
        emit(*(f"failed: {row['failed']}" for row in found if "failed" in row and "kind" not in row))
    if rows:
        emit(f"note: {rows[0]['note']}")


def _by_place(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    places: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        places.setdefault(tuple(row[key] for key in _PLACE), []).append(row)
    for (where, backend, ranks, hosts, ranks_per_host), found in places.items():
        spread = f"{hosts} hosts × {ranks_per_host}" if hosts > 1 else "one host"
        yield f"Collectives of {ranks} {backend} ranks, {spread}, {where}: seconds of a call on the slowest rank", found


def _case_cells(row: dict[str, Any]) -> list[str]:
    bandwidths = (format_bandwidth(row[f"{name}_bandwidth"]) for name in ("algorithm", "bus", "link"))
    limited = f"{row['percent_of_limit']:.0f} %" if "limit" in row else ""
    seconds = (seconds_text(row[key]) for key in ("median", "spread"))
    return [row["tier"], row["operation"], format_bytes(row["payload_bytes"]), *seconds, *bandwidths, limited]


def _skipped(cases: Sequence[dict[str, Any]]) -> list[str]:
    """A line for all operations that were skipped for the same reason."""
    names: dict[tuple[str, int, str], list[str]] = {}
    for row in cases:
        if "skipped" in row:
            names.setdefault((row["tier"], row["payload_bytes"], row["skipped"]), []).append(row["operation"])
    return [
        f"skipped: {tier} {format_bytes(size)} ({', '.join(operations)}): {reason}"
        for (tier, size, reason), operations in names.items()
    ]


def _fit_cells(row: dict[str, Any]) -> list[str]:
    if "failed" in row or "skipped" in row:
        return [row["operation"], row["tier"], "?", "?", "", "", row.get("failed") or row["skipped"]]
    rate = format_bandwidth(row["link_rate"]) if row["link_rate"] else ""
    constants = seconds_text(row["latency_seconds"]), format_bandwidth(row["bandwidth"])
    return [row["operation"], row["tier"], *constants, rate, f"{row['worst_residual']:.0%}", ""]


def show_calibration(rows: Sequence[dict[str, Any]], out: str) -> None:
    """What the ranks compute, what they send, and where that was written."""
    rates = [row for row in rows if row["kind"] == "rate"]
    table = columns("all ranks at once", ">size", ">seconds", ">spread", ">rate of a rank")
    for row in rates:
        copies = row["name"] == "copy"
        size = format_bytes(row["size"]) if copies else f"{row['size']}³"
        rate = (format_bandwidth if copies else format_flops)(row["per_second"])
        name = "copy" if copies else f"matmul {row['name']}"
        table.add_row(name, size, seconds_text(row["median"]), seconds_text(row["spread"]), rate)
    emit(table)
    show_collectives([row for row in rows if row["kind"] != "rate"])
    emit(f"written: {out} (meshwright plan JOB --cluster {out})")

"""What `bench gradients` prints for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meshwright.cli.show import columns, emit, seconds_text


def show_gradients(rows: Sequence[dict[str, Any]]) -> None:
    """For each rate: compute alone, every subject beside its limit, and the comparisons."""
    for label in dict.fromkeys(row["rate"] for row in rows):
        own = [row for row in rows if row["rate"] == label]
        meaning = label if label == own[0]["link"] else f"communication / backward = {label}, {own[0]['link']}"
        emit(f"Gradients of 2 hosts at {meaning}")
        parts = [row for row in own if row.get("part", "").startswith("alone")]
        emit(", ".join(f"{row['part'].removeprefix('alone: ')} {seconds_text(row['median'])}" for row in parts))
        emit(_subjects([row for row in own if "subject" in row]), _comparisons([r for r in own if "comparison" in r]))
        emit(*(f"failed: {row['failed']}" for row in own if "failed" in row))
    if rows:
        emit(f"note: {rows[0]['note']}")


def _subjects(rows: Sequence[dict[str, Any]]) -> Any:
    table = columns("measured for", "sums", ">bucket", ">buckets", ">seconds", ">spread", ">limit", ">of limit")
    for row in rows:
        bucket = f"{row['bucket_mib']:.3g} MiB" if "bucket_mib" in row else ""
        limit = (seconds_text(row["limit"]), f"{row['percent_of_limit']:.0f} %") if "limit" in row else ("", "")
        times = seconds_text(row["median"]), seconds_text(row["spread"])
        table.add_row(row["part"], row["subject"], bucket, str(row.get("buckets", "")), *times, *limit)
    return table


def _comparisons(rows: Sequence[dict[str, Any]]) -> Any:
    table = columns("ratio of seconds", "of", ">median", ">interval", ">confidence")
    for row in rows:
        low, high = row["interval"]
        subjects = " / ".join(row["subjects"])
        interval = f"{low:.3f} to {high:.3f}"
        table.add_row(row["comparison"], subjects, f"{row['median']:.3f}", interval, f"{row['confidence']:.0%}")
    return table

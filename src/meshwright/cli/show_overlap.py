"""What `bench matmul` prints for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meshwright.cli.show import columns, emit, seconds_text


def show_overlap(rows: Sequence[dict[str, Any]]) -> None:
    """For each setting every subject beside its limit, and what the timeline would choose; then sums by tiers."""
    settings = dict.fromkeys(_setting(row) for row in rows if "ratio" in row)
    for setting in settings:
        problem, hosts, ratio, link = setting
        own = [row for row in rows if "ratio" in row and _setting(row) == setting]
        emit(f"{problem} on {hosts} hosts at communication / computation = {ratio:g}, {link}")
        alone = [row for row in own if "alone" in row]
        emit(", ".join(f"{row['alone']} alone {seconds_text(row['median'])}" for row in alone))
        ratios = {row["comparison"]: row for row in own if "comparison" in row}
        emit(_subjects([row for row in own if "subject" in row], ratios))
        emit(*(_choice(row) for row in own if "choice" in row))
    if by_tiers := [row for row in rows if row.get("part") == "hierarchical"]:
        emit("Sums of hosts of several ranks", _tiers(by_tiers))
    emit(*(_figure(row) for row in rows if "figure" in row))
    emit(*(f"failed: {row['failed']}" for row in rows if "failed" in row))
    if rows:
        emit(f"note: {rows[0]['note']}")


def _setting(row: dict[str, Any]) -> tuple[str, int, float, str]:
    return row["problem"], row["hosts"], row["ratio"], row["link"]


def _subjects(rows: Sequence[dict[str, Any]], ratios: dict[str, dict[str, Any]]) -> Any:
    table = columns(
        "subject", ">seconds", ">spread", ">predicted", ">exposed", ">predicted", ">hidden", ">limit", ">of limit",
        ">unsplit / it", ">interval",
    )  # fmt: skip
    for row in rows:
        times = (seconds_text(row[key]) for key in ("median", "spread", "predicted_seconds"))
        exposed = (seconds_text(row[key]) for key in ("exposed_seconds", "predicted_exposed_seconds"))
        hidden = f"{row['hidden_of_hideable']:.0%}" if "hidden_of_hideable" in row else ""
        limit = (seconds_text(row["limit"]), f"{row['percent_of_limit']:.0f} %") if "limit" in row else ("", "")
        ratio = ratios.get(f"unsplit / {row['subject']}")
        compared = (f"{ratio['median']:.3f}", _interval(ratio)) if ratio else ("", "")
        table.add_row(row["subject"], *times, *exposed, hidden, *limit, *compared)
    return table


def _tiers(rows: Sequence[dict[str, Any]]) -> Any:
    table = columns("hosts × ranks", "sum", ">median", ">spread", ">interval", ">limit")
    for row in rows:
        place = f"{row['hosts']} × {row['ranks_per_host']}"
        if "subject" in row:
            whole = f"{row['subject']}, {row['segments']} segment{'s' * (row['segments'] > 1)}"
            table.add_row(place, whole, seconds_text(row["median"]), seconds_text(row["spread"]))
        elif "comparison" in row:
            figures = f"{row['median']:.3f}", f"{row['spread']:.3f}", _interval(row), f"{row['limit']:g}"
            table.add_row(place, row["comparison"], *figures)
    return table


def _interval(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{low:.3f} to {high:.3f}"


def _choice(row: dict[str, Any]) -> str:
    return f"the timeline would choose {row['choice']}; the best was {row['best']}: regret {row['regret']:.1%}"


def _figure(row: dict[str, Any]) -> str:
    met = "met" if row["met"] else "missed"
    return f"{row['figure']}: {row['value']:.1%}, at most {row['target']:.0%} wanted: {met}"

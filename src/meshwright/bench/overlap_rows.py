"""The rows of `bench matmul`: what could be hidden, what was, and how right the timeline is. Pure functions of samples.

hideable   min(compute, communication), both alone; of gradients compute is backward, for forward cannot hide them
hidden     unsplit - overlapped
limit      forward + max(compute, communication) + one chunk: the first of communication has nothing to run under,
           or the last of computation; of a ring of T with k pieces a hop that is 1/(T·k) of the shorter of the two
regret     what the timeline would choose / the best candidate - 1, by pairs of samples
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from meshwright.bench import record
from meshwright.bench.pairs import ratio_row
from meshwright.planner.overlap import LEAST_GAIN

NOTE = "all hosts share the cores of this machine, a thread each"
UNSPLIT = "unsplit"
MOST_PADDING = 1e-3
"""By which bytes on the wire may differ: each call's are rounded up."""
LEAST_EXPOSED = 0.01
"""Of a step: less is no wait that anybody would hide."""
TARGETS = {"median regret": 0.05, "worst regret": 0.08, "median error of exposed seconds": 0.15}


class Measured(NamedTuple):
    """Samples of a subject, and what was known of it beforehand."""

    seconds: Sequence[float]
    exposed: Sequence[float]
    predicted_seconds: float
    predicted_exposed: float
    wire_bytes: int
    error: float
    """Of its results, relative to those of `unsplit`."""


@dataclass(frozen=True)
class Alone:
    """Medians of the two parts of a setting, each without the other."""

    compute: float
    """What can hide communication."""
    communication: float
    forward: float = 0.0
    """What cannot."""

    @property
    def hideable(self) -> float:
        """At most so many seconds overlap can save."""
        return min(self.compute, self.communication)

    def limit(self, chunk: float) -> float:
        """The least that a step takes; `chunk` is a fraction of the hideable."""
        return self.forward + max(self.compute, self.communication) + chunk * self.hideable


def subject_rows(
    measured: Mapping[str, Measured],
    chunks: Mapping[str, float],
    alone: Alone,
    most_error: float,
    about: dict[str, Any],
) -> list[dict[str, Any]]:
    """A row for each subject of a setting, and for each that overlaps its ratio to `unsplit`.

    `chunks`: of those that overlap, the part of the hideable that they must leave.
    """
    rows = []
    unsplit = statistics.median(measured[UNSPLIT].seconds)
    common = {
        "compute_seconds": alone.compute,
        "communication_seconds": alone.communication,
        "forward_seconds": alone.forward,
        "hideable_seconds": alone.hideable,
    }
    for name, found in measured.items():
        exposed = statistics.median(found.exposed)
        settings = {
            "subject": name,
            **common,
            "exposed_seconds": exposed,
            "exposed_samples": list(found.exposed),
            "predicted_seconds": found.predicted_seconds,
            "predicted_exposed_seconds": found.predicted_exposed,
            "wire_bytes": found.wire_bytes,
            "result_error": found.error,
        }
        limit = None
        if name in chunks:
            limit = alone.limit(chunks[name])
            hidden = unsplit - statistics.median(found.seconds)
            settings |= {"hidden_seconds": hidden, "hidden_of_hideable": hidden / alone.hideable}
        failed = _difference(found, measured[UNSPLIT], most_error)
        rows.append(
            record.row(
                samples=found.seconds, unit="s", limit=limit, limit_kind="least", failed=failed, **about, **settings
            )
        )
    seconds = {name: found.seconds for name, found in measured.items()}
    rows += [ratio_row(UNSPLIT, name, seconds, {}, **about) for name in chunks]
    return rows


def _difference(found: Measured, unsplit: Measured, most_error: float) -> str:
    """What is wrong with a subject, if anything: results beyond rounding, bytes beyond padding."""
    if found.error > most_error:
        return f"results differ from those of {UNSPLIT} by {found.error:.1e}, more than {most_error:.1e}"
    if abs(found.wire_bytes - unsplit.wire_bytes) > MOST_PADDING * unsplit.wire_bytes:
        return f"sends {found.wire_bytes} bytes, {UNSPLIT} {unsplit.wire_bytes}"
    return ""


def alone_row(name: str, samples: Sequence[float], about: dict[str, Any]) -> dict[str, Any]:
    """Compute, or communication, without the other."""
    return record.row(alone=name, samples=samples, unit="s", **about)


# --- the timeline against the clock -----------------------------------------------------------------------------------

_SETTING = ("part", "problem", "hosts", "ratio", "link", "note")


def timeline_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """From the rows of subjects: a row for each setting with order, choice and regret, and one over all of them."""
    settings: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if "predicted_seconds" in row:
            settings.setdefault(tuple(row[key] for key in _SETTING), []).append(row)
    found = [_setting_row(dict(zip(_SETTING, key, strict=True)), own) for key, own in settings.items()]
    return [*found, *_summary(found)] if found else []


def _setting_row(about: dict[str, Any], candidates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by_prediction = sorted(candidates, key=lambda row: row["predicted_seconds"])
    by_clock = sorted(_runnable(candidates), key=lambda row: row["median"])
    chosen, best = _chosen(_runnable(candidates)), by_clock[0]
    regrets = [a / b - 1 for a, b in zip(chosen["samples"], best["samples"], strict=True)]
    return record.row(
        samples=regrets,
        unit="ratio",
        choice=chosen["subject"],
        best=best["subject"],
        regret=max(0.0, statistics.median(regrets)),
        predicted_order=[row["subject"] for row in by_prediction],
        measured_order=[row["subject"] for row in by_clock],
        predicted_seconds=[row["predicted_seconds"] for row in by_prediction],
        measured_seconds=[row["median"] for row in by_prediction],
        predicted_exposed_seconds=[row["predicted_exposed_seconds"] for row in by_prediction],
        measured_exposed_seconds=[row["exposed_seconds"] for row in by_prediction],
        exposed_errors=[_exposed_error(row) for row in by_prediction],
        **about,
    )


def _runnable(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What a job could be: not `unsplit` where there is `none`, which is what its layout runs."""
    has_none = any(row["subject"] == "none" for row in rows)
    return [row for row in rows if not (has_none and row["subject"] == UNSPLIT)]


def _chosen(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Rows begin with the simplest, as they were measured."""
    asked = [row for row in rows if row["subject"] == row.get("auto")]
    if asked:  # else it chose what was not measured, as a quick run measures few
        return asked[0]
    enough = min(row["predicted_seconds"] for row in rows) * (1 + LEAST_GAIN)
    return next(row for row in rows if row["predicted_seconds"] <= enough)


def _exposed_error(row: Mapping[str, Any]) -> float:
    least = LEAST_EXPOSED * row["median"]
    predicted, measured = (max(least, row[key]) for key in ("predicted_exposed_seconds", "exposed_seconds"))
    return float(abs(predicted - measured) / measured)


def _summary(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    regrets = [row["regret"] for row in settings]
    errors = [error for row in settings for error in row["exposed_errors"]]
    found = {
        "median regret": statistics.median(regrets),
        "worst regret": max(regrets),
        "median error of exposed seconds": statistics.median(errors),
    }
    return [
        record.row(
            part="summary", figure=name, value=value, target=TARGETS[name], met=value <= TARGETS[name], note=NOTE
        )
        for name, value in found.items()
    ]

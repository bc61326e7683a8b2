"""Timelines as a Chrome trace, for chrome://tracing or https://ui.perfetto.dev.

A process for each timeline, a thread for each of its lanes, and a complete event for each span, in microseconds. Events
on one thread must nest in this format: spans of one lane do not overlap, so each lane has a thread of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.account import COMPUTE_LANE, Timeline

MICROSECONDS = 1e6


def chrome_trace(timelines: Mapping[str, Timeline]) -> dict[str, Any]:
    """The trace as plain data; `timelines` by the name of their process, such as their source."""
    events = [
        event
        for process, (name, timeline) in enumerate(timelines.items())
        for event in _process(process, name, timeline)
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _process(process: int, name: str, timeline: Timeline) -> Iterator[dict[str, Any]]:
    yield _name("process_name", process, 0, name)
    threads = {lane: thread for thread, lane in enumerate(_lanes(timeline))}
    for lane, thread in threads.items():
        yield _name("thread_name", process, thread, lane)
        yield {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": thread, "args": {"sort_index": thread}}
    for span in timeline.spans:
        yield {
            "ph": "X",
            "name": f"{span.name} {span.site}".rstrip(),
            "cat": span.phase,
            "pid": process,
            "tid": threads[span.lane],
            "ts": span.start_seconds * MICROSECONDS,
            "dur": (span.end_seconds - span.start_seconds) * MICROSECONDS,
            "args": {"phase": span.phase, "site": span.site},
        }


def _lanes(timeline: Timeline) -> list[str]:
    """Compute on top."""
    return sorted({span.lane for span in timeline.spans}, key=lambda lane: (lane != COMPUTE_LANE, lane))


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}

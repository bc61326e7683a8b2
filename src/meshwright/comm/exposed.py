"""Exposed communication, measured: how long the compute lane of a step waits for collectives, and how long it does not.

    with WaitClock(device) as clock:
        step(...)
    clock.reading()          # on CUDA once the step is over: here somebody waits for its events

The compute lane is the program's own thread on a CPU. On CUDA it is the stream that is current when the clock starts:
events are recorded around each wait, and read only afterwards, so nothing is synchronised with the host. A collective
that is waited for as soon as it is issued is exposed as a whole; one that ended before it was waited for, not at all.

Waits and the intervals between them are added up apart: that both fill the step is a check, which waits that overlap,
or that another thread counts, would fail.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from meshwright.account import COMPUTE_LANE, Span
from meshwright.comm import torch_private
from meshwright.comm.failure import Call
from meshwright.comm.scope import clocked, current

WAIT = "wait"
"""Name of a span of the compute lane in which it waits."""


@dataclass(frozen=True)
class Reading:
    """How the compute lane spent the time between entering and leaving a clock."""

    compute_seconds: float
    """What lies between the waits."""
    exposed: Mapping[tuple[str, str], float]
    """Waits by the collective's axis, and the phase in which it is waited for."""
    spans: tuple[Span, ...]
    """From the clock's start: the compute lane whole, and each collective on a lane of its axis: from when it was
    issued (on CUDA: waited for), but after the one before it, to when its result was known to be there."""

    @property
    def exposed_seconds(self) -> float:
        """Over all axes and phases."""
        return sum(self.exposed.values())


class _Wait(NamedTuple):
    """One wait of the compute lane; moments are seconds, or events of its stream."""

    call: Call
    phase: str
    """Of the wait: the collective may have been issued in another."""
    began: Any
    ended: Any


class WaitClock:
    """Times the waits of one step; a context manager, and a `comm.scope.Clock`."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._waits: list[_Wait] = []
        self._begun: list[Any] = []
        self._aside = False
        self._stack = ExitStack()

    def __enter__(self) -> WaitClock:
        self.started_seconds = time.perf_counter()
        self._start = self._now()
        self._stack.enter_context(clocked(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        self._end = self._now()

    def begin(self, call: Call | None) -> None:
        """As `comm.scope.Clock` says."""
        self._begun.append(self._now() if call is not None and self._is_on_lane() else None)

    def end(self, call: Call | None) -> None:
        """As `comm.scope.Clock` says."""
        began = self._begun.pop()
        if call is not None and began is not None:
            phase = current().phase or ("backward" if torch_private.in_backward() else "forward")
            self._waits.append(_Wait(call, phase, began, self._now()))

    def _is_on_lane(self) -> bool:
        """Another stream that waits, as those of `fully_shard` do, does not stop the one that computes: when that one
        in turn waits for the other is not seen here."""
        if self._stream is None or torch.cuda.current_stream(self._stream.device) == self._stream:
            return True
        self._aside = True
        return False

    def _now(self) -> Any:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def reading(self) -> Reading | None:
        """The sums; None where streams beside the compute lane waited: what of that is exposed is not known."""
        return None if self._aside else _reading(self._waits, self._start, self._end, self.started_seconds)


def _reading(waits: list[_Wait], start: Any, end: Any, started_seconds: float) -> Reading:
    exposed: dict[tuple[str, str], float] = defaultdict(float)
    spans: list[Span] = []
    lane_ends: dict[str, float] = defaultdict(float)
    computed, before, now = 0.0, start, 0.0
    for call, phase, began, ended in waits:
        # An interval that would be negative is one that overlaps a wait: it must not hide that.
        between, waited = max(0.0, _seconds(before, began)), _seconds(began, ended)
        computed += between
        exposed[call.axis, phase] += waited
        spans.append(Span(COMPUTE_LANE, "compute", phase, "", now, now + between))
        spans.append(Span(COMPUTE_LANE, WAIT, phase, call.site, now + between, now + between + waited))
        before, now = ended, now + between + waited
        issued = call.issued_seconds - started_seconds if isinstance(start, float) else now - waited
        issued = min(now, max(issued, lane_ends[call.axis]))
        spans.append(Span(call.axis, call.operation, call.phase, call.site, issued, now))
        lane_ends[call.axis] = now
    rest = max(0.0, _seconds(before, end))
    spans.append(Span(COMPUTE_LANE, "compute", "optimiser", "", now, now + rest))
    return Reading(computed + rest, dict(exposed), tuple(spans))


def _seconds(before: Any, after: Any) -> float:
    if isinstance(before, float):
        return float(after - before)
    return float(before.elapsed_time(after)) / 1000

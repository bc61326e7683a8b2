"""When everything of a step happens: a discrete-event simulation of a trace, planned or recorded.

Lanes are `compute`, and for each mesh axis one a tier, `AXIS:intra` and `AXIS:inter`. The program runs in order:

    Compute    occupies the compute lane
    Issue      puts a collective on its lane; it starts when its link is free, and the program goes on
    Wait       holds the compute lane up until that collective is done: exposed communication, of the collective's axis
               and the phase of the wait

Lanes of one tier share the rank's link of that tier. The link is a queue: one collective at a time has it whole, in the
order of issue. That keeps the sum within its bandwidth, and is when the last of several finishes under any fair
sharing, too; a small collective behind a large one waits longer here than on a link that divides itself.

The k-th wait for a ticket ends the k-th collective issued under it, so that a loop may wait for what an earlier
iteration has put on the wire. What nobody waits for, and outlasts the step, is exposed at its end, in the phase of its
issue. A wait that comes before its collective is for that of the step before, such as ZeRO-1's gathers of parameters:
then two steps are simulated and the second is reported, and what the next step will wait for may outlast it.

Time is counted in whole ticks of 2⁻⁴⁰ s, 0.9 ps: sums of floats in ticks are exact (up to 8192 s), so that compute and
exposed communication add up to the step, and two iterations of a loop that are alike are equal. A `Repeat` is
simulated until the lanes, relative to now, are as they were some iterations before; the rest is the same again, but
for the last iteration. Spans are of the first two iterations and the last one, totals of all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from meshwright.account import COMPUTE_LANE, Compute, Event, Issue, Repeat, Span, Timeline, Trace, Wait, spelt

TICK_SECONDS = 2.0**-40


class Transfer(NamedTuple):
    """One collective alone: the lane that shows it, the link that carries it, and for how long."""

    lane: str
    link: str
    seconds: float


class Costs(Protocol):
    """How long things take."""

    def compute_seconds(self, event: Compute) -> float:
        """One operation on the device."""
        ...

    def transfer(self, event: Issue) -> Transfer:
        """One collective of more than one rank."""
        ...


def simulate(trace: Trace, costs: Costs, *, with_spans: bool = True) -> Timeline:
    """The timeline of one step. Groups of one rank and the control phase take no time."""
    compiler = _Compiler(costs)
    operations = compiler.compiled(trace.events)
    step = _Step(compiler.awaited, with_spans)
    step.run(operations)
    step.end()
    if step.for_next_step:
        step.begin_another()
        step.run(operations)
        step.end()
    return step.timeline()


# --- the program, in ticks --------------------------------------------------------------------------------------------


class _Busy(NamedTuple):
    """Consecutive computations; `pieces` are their spans: name, phase, site, ticks."""

    ticks: int
    pieces: tuple[tuple[str, str, str, int], ...]


class _Send(NamedTuple):
    ticks: int
    lane: str
    link: str
    issue: Issue


class _Loop(NamedTuple):
    times: int
    operations: tuple[_Operation, ...]
    first: int
    step: int


_Operation = _Busy | _Send | Wait | _Loop


class _Compiler:
    """Events to operations: memory left out, neighbouring computations merged, shared events compiled once."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self.awaited: set[int] = set()
        """Tickets that somebody waits for."""
        self._loops: dict[int, tuple[_Operation, ...]] = {}
        self._transfers: dict[tuple[str, str, int, str, int], Transfer] = {}

    def compiled(self, events: Iterable[Event]) -> tuple[_Operation, ...]:
        operations: list[_Operation] = []
        pieces: list[tuple[str, str, str, int]] = []
        for event in events:
            if isinstance(event, Compute):
                if ticks := _ticks(self._costs.compute_seconds(event)):
                    _append_piece(pieces, event, ticks)
                continue
            operation = self._operation(event)
            if operation is not None:
                _flush(pieces, operations)
                operations.append(operation)
        _flush(pieces, operations)
        return tuple(operations)

    def _operation(self, event: Event) -> _Operation | None:
        if isinstance(event, Wait):
            self.awaited.add(event.ticket)
            return event
        if isinstance(event, Issue):
            return self._send(event) if event.group_size > 1 and event.phase != "control" else None
        if isinstance(event, Repeat) and event.times > 0:
            key = id(event.events)  # alive as long as the trace is
            if key not in self._loops:
                self._loops[key] = self.compiled(event.events)
            return _Loop(event.times, self._loops[key], event.first, event.step) if self._loops[key] else None
        return None

    def _send(self, event: Issue) -> _Send:
        key = event[:5]
        if key not in self._transfers:
            self._transfers[key] = self._costs.transfer(event)
        lane, link, seconds = self._transfers[key]
        return _Send(_ticks(seconds), lane, link, event)


def _ticks(seconds: float) -> int:
    return round(seconds / TICK_SECONDS)


def _append_piece(pieces: list[tuple[str, str, str, int]], event: Compute, ticks: int) -> None:
    """One span for neighbours of the same kind, phase and site."""
    what = event.kind, event.phase, event.site
    if pieces and pieces[-1][:3] == what:
        ticks += pieces.pop()[3]
    pieces.append((*what, ticks))


def _flush(pieces: list[tuple[str, str, str, int]], operations: list[_Operation]) -> None:
    if pieces:
        operations.append(_Busy(sum(piece[3] for piece in pieces), tuple(pieces)))
        pieces.clear()


# --- the simulation ---------------------------------------------------------------------------------------------------


class _Moment(NamedTuple):
    """Totals at the border of two iterations."""

    iteration: int
    now: int
    computed: int
    exposed: dict[tuple[str, str], int]


class _Pending(NamedTuple):
    end: int
    axis: str
    phase: str


class _Step:
    """The lanes while a program runs."""

    def __init__(self, awaited: set[int], with_spans: bool) -> None:
        self._awaited = awaited
        self._now = self._began = self._computed = 0
        self._free: dict[str, int] = {}
        self._pending: dict[int, deque[_Pending]] = {}
        self._num_pending = 0
        self._unclaimed: list[_Pending] = []
        """What nobody waits for."""
        self._exposed: dict[tuple[str, str], int] = {}
        self._spans: list[tuple[str, str, str, str, int, int]] = []
        self._keeps_spans = with_spans
        self.for_next_step: set[int] = set()
        """Tickets that were waited for before they were issued."""

    def begin_another(self) -> None:
        """The next step, after what this one has left on the wire."""
        self._began, self._computed, self._exposed = self._now, 0, {}
        self._spans = [span for span in self._spans if span[5] > self._began]

    def run(self, operations: Iterable[_Operation], index: int | None = None) -> None:
        """`index` stands for the star in sites, inside of loops."""
        for operation in operations:
            if isinstance(operation, _Busy):
                self._compute(operation, index)
            elif isinstance(operation, _Send):
                self._issue(operation, index)
            elif isinstance(operation, Wait):
                self._wait(operation)
            else:
                self._loop(operation)

    def _compute(self, busy: _Busy, index: int | None) -> None:
        if self._keeps_spans:
            start = self._now
            for name, phase, site, ticks in busy.pieces:
                self._spans.append((COMPUTE_LANE, name, phase, _site(site, index), start, start + ticks))
                start += ticks
        self._now += busy.ticks
        self._computed += busy.ticks

    def _issue(self, send: _Send, index: int | None) -> None:
        issue = send.issue
        start = max(self._now, self._free.get(send.link, 0))
        end = self._free[send.link] = start + send.ticks
        pending = _Pending(end, issue.axis, issue.phase)
        if issue.ticket in self._awaited:
            self._pending.setdefault(issue.ticket, deque()).append(pending)
            self._num_pending += 1
        else:
            self._unclaimed.append(pending)
        if self._keeps_spans:
            self._spans.append((send.lane, issue.operation, issue.phase, _site(issue.site, index), start, end))

    def _wait(self, wait: Wait) -> None:
        queue = self._pending.get(wait.ticket)
        if not queue:
            self.for_next_step.add(wait.ticket)
            return
        self._num_pending -= 1
        end, axis, _ = queue.popleft()
        self._expose(end, axis, wait.phase)

    def _expose(self, until: int, axis: str, phase: str) -> None:
        if until > self._now:
            self._exposed[axis, phase] = self._exposed.get((axis, phase), 0) + until - self._now
            self._now = until

    def end(self) -> None:
        """Hold the step up for what is on the wire, but for what the next one waits for."""
        left = [p for ticket, queue in self._pending.items() if ticket not in self.for_next_step for p in queue]
        for end, axis, phase in sorted(left + self._unclaimed):
            self._expose(end, axis, phase)
        self._unclaimed = []
        self._pending = {t: queue for t, queue in self._pending.items() if t in self.for_next_step}
        self._num_pending = sum(map(len, self._pending.values()))

    def timeline(self) -> Timeline:
        """Of the step that has ended; spans are cut where it begins and ends."""
        spans = []
        for lane, name, phase, site, start, end in self._spans:
            first, last = max(start, self._began) - self._began, min(end, self._now) - self._began
            if first < last:
                spans.append(Span(lane, name, phase, site, first * TICK_SECONDS, last * TICK_SECONDS))
        return Timeline(
            (self._now - self._began) * TICK_SECONDS,
            {place: ticks * TICK_SECONDS for place, ticks in sorted(self._exposed.items())},
            self._computed * TICK_SECONDS,
            tuple(spans),
        )

    # --- loops ---

    def _loop(self, loop: _Loop) -> None:
        """Until what comes is known to be the same again; the last iteration is always run."""
        if loop.times == 1:
            self.run(loop.operations, loop.first)
            return
        seen: dict[object, _Moment] | None = {}
        iteration, fewest, keeps = 0, self._num_pending, self._keeps_spans
        while iteration < loop.times:
            # What grows from one iteration to the next cannot be as it was before: not even looked at.
            if seen is not None and loop.times - iteration > 1 and self._num_pending <= fewest:
                here = _Moment(iteration, self._now, self._computed, dict(self._exposed))
                before = seen.setdefault(self._relative(), here)
                if before is not here and (iteration >= 2 or not keeps):
                    iteration += self._jump(before, here, loop.times)
                    seen = None
            fewest = self._num_pending
            self._keeps_spans = keeps and (iteration < 2 or iteration == loop.times - 1)
            self.run(loop.operations, loop.first + iteration * loop.step)
            iteration += 1
        self._keeps_spans = keeps

    def _relative(self) -> object:
        """Everything that the future depends on, seen from now."""
        self._unclaimed = [pending for pending in self._unclaimed if pending.end > self._now]
        unclaimed = tuple((end - self._now, axis, phase) for end, axis, phase in self._unclaimed)
        links = tuple(sorted((link, end - self._now) for link, end in self._free.items() if end > self._now))
        pending = tuple(
            (ticket, tuple((max(0, end - self._now), axis, phase) for end, axis, phase in queue))
            for ticket, queue in sorted(self._pending.items())
            if queue
        )
        return links, pending, unclaimed

    def _jump(self, before: _Moment, here: _Moment, times: int) -> int:
        """Add rounds like that from `before` to `here`, all but the last iteration; how many iterations that are."""
        round_length = here.iteration - before.iteration
        rounds = (times - here.iteration - 1) // round_length
        later = rounds * (here.now - before.now)
        self._now += later
        self._computed += rounds * (here.computed - before.computed)
        for place, ticks in here.exposed.items():
            self._exposed[place] += rounds * (ticks - before.exposed.get(place, 0))
        self._free = {link: end + later for link, end in self._free.items()}
        self._unclaimed = _later(self._unclaimed, later)
        self._pending = {ticket: deque(_later(queue, later)) for ticket, queue in self._pending.items()}
        return rounds * round_length


def _later(pending: Iterable[_Pending], ticks: int) -> list[_Pending]:
    return [_Pending(end + ticks, axis, phase) for end, axis, phase in pending]


def _site(site: str, index: int | None) -> str:
    return site if index is None else spelt(site, index)

"""The account of one training step on one rank: a trace, and four folds over it.

Formula, rehearsal and run all produce a `Trace`, the ordered events of a step. Everything else is a fold:

    Ledger      what was communicated: (operation, axis, group size, phase, site, dtype, payload) -> count
    Work        FLOPs and bytes touched, by phase and by kind of operation
    Footprint   bytes by category at the moment of the peak
    Timeline    spans on lanes, and the seconds of communication that nothing hides

`StepAccount` is the four together with their source; `diff` lists what differs between two of them.
Nothing here knows torch, a scheme or a model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

Phase = Literal["forward", "recompute", "backward", "optimiser", "control"]
"""control (barriers, object collectives, checkpoint planning) is recorded but never compared."""

Operation = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "shift", "broadcast", "scatter", "gather", "reduce"
]
"""The last three are never used by our schemes; other programs' are recorded too."""

Source = Literal["formula", "rehearsed", "run"]

CATEGORIES = (
    "parameters",
    "gradients",
    "optimiser_states",
    "cast_weights",
    "saved_activations",
    "gathered_parameters",
    "communication_buffers",
    "logits",
    "temporaries",
)
"""What holds a byte: the module, the optimiser, autograd's saved tensors, the loss, a pending collective, or nobody."""

EXACT_CATEGORIES = ("parameters", "gradients", "optimiser_states", "cast_weights", "saved_activations")
"""Categories that must be equal to the byte among sources; the peak may differ by `PEAK_TOLERANCE`."""

PEAK_TOLERANCE = 0.02

EXACT_KINDS = ("matmul", "attention")
"""Kinds of operation whose FLOPs must be equal among sources."""

UNKNOWN_AXIS = "?"
"""Axis of a collective on a group that no mesh names."""

_STAR = re.compile(r"\*([+-]\d+)?")

WORLD_AXIS = "world"
"""Axis of a collective on the default group, where no mesh axis is known to be it."""


# --- events -----------------------------------------------------------------------------------------------------------


class Compute(NamedTuple):
    """One operation on this rank's device. `bytes` are those of its inputs and outputs."""

    kind: str
    flops: int
    bytes: int
    phase: str
    site: str


class Issue(NamedTuple):
    """One collective put on the wire; `ticket` is unique in its trace and names the `Wait` that ends it."""

    operation: str
    axis: str
    group_size: int
    dtype: str
    payload_bytes: int
    phase: str
    site: str
    ticket: int = 0


class Wait(NamedTuple):
    """The program needs the result of the collective with this ticket."""

    ticket: int
    phase: str
    site: str


class Memory(NamedTuple):
    """A storage of `category` appeared (positive) or was freed (negative)."""

    category: str
    delta_bytes: int
    phase: str
    site: str


class Repeat(NamedTuple):
    """`times` copies of `events`, in whose sites `*` stands for `first`, `first + step`, `first + 2·step` …

    `*+2` and `*-2` stand for as many more or less.
    """

    times: int
    events: tuple[Event, ...]
    first: int = 0
    step: int = 1

    def indices(self) -> range:
        """The numbers that replace `*`, in order."""
        return range(self.first, self.first + self.times * self.step, self.step)


Event = Compute | Issue | Wait | Memory | Repeat


@dataclass(frozen=True)
class Trace:
    """The ordered events of one step. A planner may write the blocks of a model as one `Repeat`."""

    events: tuple[Event, ...]

    def expanded(self) -> Iterator[Compute | Issue | Wait | Memory]:
        """The events one by one, repeats unrolled and sites spelled out."""
        return _expand(self.events)


def _expand(events: Iterable[Event]) -> Iterator[Compute | Issue | Wait | Memory]:
    for event in events:
        if isinstance(event, Repeat):
            for index in event.indices():
                for inner in _expand(event.events):
                    yield inner._replace(site=spelt(inner.site, index))
        else:
            yield event


def spelt(site: str, index: int) -> str:
    """`layers.*` with a number in place of the star."""
    if "*" not in site:
        return site
    return _STAR.sub(lambda found: str(index + int(found[1] or 0)), site)


# --- ledger -----------------------------------------------------------------------------------------------------------


class LedgerKey(NamedTuple):
    """What makes two collective calls one row. `payload_bytes` is that of one call: the full tensor on this rank."""

    operation: str
    axis: str
    group_size: int
    phase: str
    site: str
    dtype: str
    payload_bytes: int

    @property
    def wire_bytes(self) -> int:
        """Bytes that one call sends from this rank under the ring algorithm."""
        return wire_bytes(self.operation, self.group_size, self.payload_bytes)


def wire_bytes(operation: str, group_size: int, payload_bytes: int) -> int:
    """Bytes one rank sends in one call under the ring algorithm: a convention, not a measurement.

    all_reduce 2(n-1)/n of the payload; shift all of it; every other operation (n-1)/n.
    Rounded up per call. Raises ValueError for an unknown operation.
    """
    if operation == "shift":
        return payload_bytes
    if operation not in get_args(Operation):
        raise ValueError(f"unknown collective {operation!r}")
    passes = 2 if operation == "all_reduce" else 1
    return -(-passes * (group_size - 1) * payload_bytes // group_size)


@dataclass(frozen=True)
class Ledger:
    """Collective calls of a step, counted by row."""

    rows: Mapping[LedgerKey, int]

    @classmethod
    def of(cls, trace: Trace) -> Ledger:
        """Count the collectives of a trace; groups of one rank and the control phase make no row."""
        rows: Counter[LedgerKey] = Counter()
        _count_issues(trace.events, rows, {})
        return cls(dict(sorted(rows.items())))

    @classmethod
    def from_json(cls, rows: Iterable[Mapping[str, Any]]) -> Ledger:
        """The inverse of `to_json`."""
        return cls({LedgerKey(*(row[name] for name in LedgerKey._fields)): row["count"] for row in rows})

    def wire_bytes(self, axis: str | None = None) -> int:
        """Bytes this rank sends in the step, over one axis or all."""
        return sum(key.wire_bytes * n for key, n in self.rows.items() if axis in (None, key.axis))

    def axes(self) -> tuple[str, ...]:
        """Axes that carry traffic."""
        return tuple(sorted({key.axis for key in self.rows}))

    def to_json(self) -> list[dict[str, Any]]:
        """One object a row."""
        return [key._asdict() | {"count": n, "wire_bytes": key.wire_bytes} for key, n in self.rows.items()]


def _count_issues(events: Iterable[Event], rows: Counter[LedgerKey], counted: dict[int, Counter[LedgerKey]]) -> None:
    """`counted`: the rows of events that several repeats share, by identity."""
    for event in events:
        if isinstance(event, Issue):
            if event.group_size > 1 and event.phase != "control":
                operation, axis, size, dtype, payload, phase, site, _ = event
                rows[LedgerKey(operation, axis, size, phase, site, dtype, payload)] += 1
        elif isinstance(event, Repeat):
            if id(event.events) not in counted:
                inner = counted[id(event.events)] = Counter()
                _count_issues(event.events, inner, counted)
            for key, count in counted[id(event.events)].items():
                for index in event.indices():
                    rows[key._replace(site=spelt(key.site, index))] += count


# --- work -------------------------------------------------------------------------------------------------------------


class WorkKey(NamedTuple):
    """Operations are counted by phase and kind."""

    phase: str
    kind: str


class Amount(NamedTuple):
    """How much was computed."""

    calls: int = 0
    flops: int = 0
    bytes: int = 0

    def plus(self, other: Amount, times: int = 1) -> Amount:
        """Sum, `other` taken `times` times."""
        return Amount(*(a + times * b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes touched. A multiply-add is two FLOPs; attention counts its full score matrix, masked or not."""

    amounts: Mapping[WorkKey, Amount]

    @classmethod
    def of(cls, trace: Trace) -> Work:
        """Add up the computations of a trace."""
        amounts: dict[WorkKey, Amount] = {}
        _add_work(trace.events, amounts, {})
        return cls(dict(sorted(amounts.items())))

    def flops(self, *, phase: str | None = None, kind: str | None = None) -> int:
        """FLOPs of one phase, one kind, or all."""
        return sum(
            a.flops for key, a in self.amounts.items() if phase in (None, key.phase) and kind in (None, key.kind)
        )

    def bytes(self, *, phase: str | None = None, kind: str | None = None) -> int:
        """Bytes touched in one phase, by one kind, or in all."""
        return sum(
            a.bytes for key, a in self.amounts.items() if phase in (None, key.phase) and kind in (None, key.kind)
        )

    def to_json(self) -> dict[str, Any]:
        """FLOPs by phase, and everything by kind."""
        by_kind: dict[str, Amount] = {}
        for key, amount in self.amounts.items():
            by_kind[key.kind] = by_kind.get(key.kind, Amount()).plus(amount)
        phases = ("forward", "backward", "recompute", "optimiser")
        return {f"{phase}_flops": self.flops(phase=phase) for phase in phases} | {
            "by_kind": {kind: amount._asdict() for kind, amount in by_kind.items()}
        }


def _add_work(events: Iterable[Event], amounts: dict[WorkKey, Amount], added: dict[int, dict[WorkKey, Amount]]) -> None:
    """`added`: the amounts of events that several repeats share, by identity."""
    for event in events:
        if isinstance(event, Compute):
            key = WorkKey(event.phase, event.kind)
            amounts[key] = amounts.get(key, Amount()).plus(Amount(1, event.flops, event.bytes))
        elif isinstance(event, Repeat):
            if id(event.events) not in added:
                inner = added[id(event.events)] = {}
                _add_work(event.events, inner, added)
            for key, amount in added[id(event.events)].items():
                amounts[key] = amounts.get(key, Amount()).plus(amount, event.times)


# --- footprint --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """Bytes by category at the first moment at which their sum is largest, and where that was."""

    bytes: Mapping[str, int]
    peak_phase: str = ""
    peak_site: str = ""

    @classmethod
    def of(cls, trace: Trace) -> Footprint:
        """Follow the storages of a trace and keep the peak."""
        summit = _summit(trace.events, {})
        return cls(dict(zip(CATEGORIES, summit.at_peak, strict=True)), summit.phase, summit.site)

    @property
    def peak(self) -> int:
        """Bytes alive at the peak."""
        return sum(self.bytes.values())

    def to_json(self) -> dict[str, Any]:
        """One number a category, and the peak."""
        return {**self.bytes, "peak": self.peak, "peak_phase": self.peak_phase, "peak_site": self.peak_site}


class _Summit(NamedTuple):
    """Relative to the start of a run of events: the net change, and the highest point, by category."""

    net: tuple[int, ...]
    at_peak: tuple[int, ...]
    phase: str
    site: str


def _summit(events: Iterable[Event], found: dict[int, _Summit]) -> _Summit:
    """`found`: the summits of events that several repeats share, by identity."""
    index = {category: i for i, category in enumerate(CATEGORIES)}
    now = [0] * len(CATEGORIES)
    total = highest = 0
    at_peak, phase, site = tuple(now), "", ""
    for event in events:
        if isinstance(event, Memory):
            now[index[event.category]] += event.delta_bytes
            total += event.delta_bytes
            if total > highest:
                highest, at_peak, phase, site = total, tuple(now), event.phase, event.site
        elif isinstance(event, Repeat) and event.times:
            if id(event.events) not in found:
                found[id(event.events)] = _summit(event.events, found)
            body = found[id(event.events)]
            # Each round moves the level by the same amount: the peak is in the last if it climbs, else in the first.
            rounds_before = event.times - 1 if sum(body.net) > 0 else 0
            level = [a + rounds_before * b + c for a, b, c in zip(now, body.net, body.at_peak, strict=True)]
            if sum(level) > highest:
                where = event.indices()[rounds_before]
                highest, at_peak, phase, site = sum(level), tuple(level), body.phase, spelt(body.site, where)
            now = [a + event.times * b for a, b in zip(now, body.net, strict=True)]
            total = sum(now)
    return _Summit(tuple(now), at_peak, phase, site)


# --- timeline ---------------------------------------------------------------------------------------------------------


COMPUTE_LANE = "compute"
"""The lane of the program itself: it computes, or waits."""


class Span(NamedTuple):
    """Something that occupied a lane for a while: `compute`, or an axis on a tier such as `tensor:intra`."""

    lane: str
    name: str
    phase: str
    site: str
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Timeline:
    """Spans on lanes, and how the compute lane spends the step: it computes, waits for communication, or idles."""

    step_seconds: float | None = None
    exposed: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Seconds in which the compute lane waits for a collective, by its axis and phase."""
    compute_seconds: float | None = None
    """Seconds in which it computes."""
    spans: tuple[Span, ...] = ()

    @property
    def exposed_seconds(self) -> dict[str, float]:
        """Exposed communication by axis."""
        by_axis: dict[str, float] = {}
        for (axis, _), seconds in self.exposed.items():
            by_axis[axis] = by_axis.get(axis, 0.0) + seconds
        return by_axis

    @property
    def idle_seconds(self) -> float | None:
        """What is neither computing nor waiting for communication; None where a part is not known."""
        if self.step_seconds is None or self.compute_seconds is None:
            return None
        return self.step_seconds - self.compute_seconds - sum(self.exposed.values())

    def to_json(self) -> dict[str, Any]:
        """As in the account's JSON."""
        return {
            "step_seconds": self.step_seconds,
            "compute_seconds": self.compute_seconds,
            "exposed_seconds": self.exposed_seconds,
            "exposed_by_phase": [
                {"axis": axis, "phase": phase, "seconds": seconds} for (axis, phase), seconds in self.exposed.items()
            ],
            "idle_seconds": self.idle_seconds,
            "spans": [span._asdict() for span in self.spans],
        }


# --- the account ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepAccount:
    """One training step on one rank, from one source."""

    source: Source
    rank: int
    world: int
    trace: Trace
    ledger: Ledger
    work: Work
    footprint: Footprint
    timeline: Timeline = Timeline()
    job: str = ""
    status: str = "executable"
    time_model: Literal["timeline", "measured", "none"] = "none"
    overlap: Mapping[str, Any] = field(default_factory=dict)
    """What was cut so that communication runs under computation, and the candidates it was chosen from with their
    prices (`planner.overlap`); empty where nobody chose."""

    @classmethod
    def of(cls, trace: Trace, *, source: Source, rank: int, world: int, job: str = "") -> StepAccount:
        """Fold a trace into an account."""
        folds = Ledger.of(trace), Work.of(trace), Footprint.of(trace)
        return cls(source, rank, world, trace, *folds, job=job)

    def to_json(self) -> dict[str, Any]:
        """The account as plain data; the trace itself is left out."""
        return {
            "source": self.source,
            "rank": self.rank,
            "world": self.world,
            "job": self.job,
            "status": self.status,
            "time_model": self.time_model,
            "ledger": self.ledger.to_json(),
            "work": self.work.to_json(),
            "footprint": self.footprint.to_json(),
            "timeline": self.timeline.to_json(),
            "overlap": dict(self.overlap),
        }


class Difference(NamedTuple):
    """One row that two accounts do not share: `first` and `second` are its counts, FLOPs or bytes."""

    part: Literal["ledger", "work", "footprint"]
    row: Mapping[str, Any]
    first: int
    second: int

    @property
    def site(self) -> str:
        """The module the row belongs to, where it has one."""
        return str(self.row.get("site", ""))

    def to_json(self) -> dict[str, Any]:
        """One flat object."""
        return {"part": self.part, **self.row, "first": self.first, "second": self.second}


def diff_ledgers(a: Ledger, b: Ledger) -> list[Difference]:
    """Rows whose counts differ."""
    keys = sorted(a.rows.keys() | b.rows.keys())
    pairs = ((key, a.rows.get(key, 0), b.rows.get(key, 0)) for key in keys)
    return [Difference("ledger", key._asdict(), first, second) for key, first, second in pairs if first != second]


def diff(a: StepAccount, b: StepAccount) -> list[Difference]:
    """Everything in which two accounts of the same step disagree.

    Ledger rows, FLOPs of matmul and attention by phase, and the exact categories must be equal; the peak within 2 %.
    """
    differences = diff_ledgers(a.ledger, b.ledger)
    exact = {key for key in a.work.amounts.keys() | b.work.amounts.keys() if key.kind in EXACT_KINDS}
    for key in sorted(exact):
        first, second = (w.amounts.get(key, Amount()).flops for w in (a.work, b.work))
        if first != second:
            differences.append(Difference("work", key._asdict(), first, second))
    for category in EXACT_CATEGORIES:
        first, second = a.footprint.bytes.get(category, 0), b.footprint.bytes.get(category, 0)
        if first != second:
            differences.append(Difference("footprint", {"category": category}, first, second))
    if abs(a.footprint.peak - b.footprint.peak) > PEAK_TOLERANCE * max(a.footprint.peak, b.footprint.peak):
        differences.append(Difference("footprint", {"category": "peak"}, a.footprint.peak, b.footprint.peak))
    return differences

"""One cell of `bench attention`: all implementations on the same inputs, in turns; what fails or does not fit is told.

An implementation is predicted first and not tried where it would not fit. It is then called for the first time (which
compiles it), once for its memory and once under the profiler; these and one timed round that is thrown away are its
warm-up. Then all that are left take turns, forwards and backwards, so that samples with one index are pairs.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from meshwright.bench.attention_clock import Kernel, Measured, Meter, free_bytes, kernels
from meshwright.bench.attention_cost import MEASURES, Cell, Measure, memory
from meshwright.bench.attention_subjects import (
    COMPILED,
    Inputs,
    Subject,
    build,
    naive_mask,
    not_available,
    not_measured,
)
from meshwright.units import format_bytes

Status = Literal[
    "measured", "not available", "out of memory (predicted)", "out of memory", "no time", "not compiled", "failed"
]
_LONGEST_REASON = 300

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How often, and until when."""

    seconds: float
    """For one measure of one implementation, as far as `least` and `most` allow."""
    deadline: float
    """On `time.perf_counter`."""
    least: int = 5
    most: int = 50
    compiles: bool = True
    """Whether to compile anything at all."""

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.perf_counter()


@dataclass
class Found:
    """What came of one implementation in a cell."""

    name: str
    status: Status = "measured"
    reason: str = ""
    first_seconds: float = 0.0
    """Of the first forward and backward, compilation included."""
    measured: Measured | str = "not measured"
    kernels: dict[str, Kernel] = field(default_factory=dict)
    kernels_unknown: str = ""
    samples: dict[Measure, list[float]] = field(default_factory=dict)
    missing: dict[Measure, str] = field(default_factory=dict)
    """Measures that it lacks, and why."""

    def lost(self, status: Status, reason: str) -> None:
        """It goes no further."""
        self.status, self.reason, self.samples = status, reason, {}


@dataclass(frozen=True)
class CellResult:
    """A cell, and what came of each implementation."""

    cell: Cell
    found: list[Found]
    free_bytes: int
    turn_seconds: float = 0.0
    """One turn of all that were timed, by medians."""
    allocations: int = 0
    """Calls for device memory while it was timed: above 0, times may contain them."""


def run_cell(
    cell: Cell,
    names: Sequence[str],
    meter: Meter,
    device: torch.device,
    budget: Budget,
    compile_seconds: dict[str, float],
) -> CellResult:
    """Everything of one cell. `compile_seconds`, by implementation, is what compiling took last; it is kept up here."""
    meter.tidy()
    free = free_bytes(meter.kind)
    result = CellResult(cell, [Found(name) for name in names], free)
    wanted = [found for found in result.found if _admit(found, cell, meter, budget, free, compile_seconds)]
    ready: list[tuple[Found, Subject]] = []
    try:
        if wanted:
            made = _guarded(wanted, lambda: _inputs(cell, device, wanted))
            if made is not None:
                ready = [pair for found in wanted if (pair := _prepare(found, cell, *made, meter, budget))]
                compile_seconds |= {found.name: found.first_seconds for found, _ in ready}
            del made
        return _time(result, ready, meter, budget)
    finally:
        ready.clear()
        if any(found.name in COMPILED for found in wanted):
            torch._dynamo.reset()
        gc.collect()


def skipped_cell(cell: Cell, names: Sequence[str], status: Status, reason: str) -> CellResult:
    """A cell that is not run at all."""
    return CellResult(cell, [Found(name, status, reason) for name in names], 0)


# --- before it runs ---------------------------------------------------------------------------------------------------


def _admit(
    found: Found, cell: Cell, meter: Meter, budget: Budget, free: int, compile_seconds: dict[str, float]
) -> bool:
    """Whether to try an implementation; it is told why not."""
    found.missing = not_measured(found.name, meter.kind)
    needed = cell.input_bytes
    predicted = memory(found.name, cell)
    needed += predicted.extra_input_bytes + predicted.peak
    if reason := not_available(found.name, meter.kind, cell):
        found.lost("not available", reason)
    elif needed > free:
        about = {"exact": "", "at least": "at least ", "at most": "at most ", "estimate": "about "}
        found.lost(
            "out of memory (predicted)",
            f"needs {about[predicted.peak_certainty]}{format_bytes(needed)} ({needed} bytes), inputs included, and "
            f"{format_bytes(free)} are free: not tried",
        )
    elif found.name in COMPILED and not budget.compiles:
        found.lost("not compiled", "--compile false (compiling takes longer than all the rest of --quick on a CPU)")
    elif found.name in COMPILED and budget.left < compile_seconds.get(found.name, 0.0):
        found.lost("no time", f"compiling took {compile_seconds[found.name]:.0f} s last time: give more --max-seconds")
    return found.status == "measured"


def _inputs(cell: Cell, device: torch.device, wanted: Sequence[Found]) -> tuple[Inputs, torch.Tensor | None]:
    mask = naive_mask(cell, device) if any(found.name.startswith("naive") for found in wanted) else None
    return Inputs.of(cell, device), mask


def _prepare(
    found: Found, cell: Cell, inputs: Inputs, mask: torch.Tensor | None, meter: Meter, budget: Budget
) -> tuple[Found, Subject] | None:
    """Compile, warm up, measure memory, name kernels; None where it failed."""
    if budget.left < 0:
        found.lost("no time", "those before it took all: give more --max-seconds")
        return None
    subject = _guarded([found], lambda: _first_call(found, cell, inputs, mask, meter))
    if subject is None:
        return None
    measured = _guarded([found], lambda: meter.memory(subject))
    if measured is None:
        return None
    found.measured = measured
    try:
        found.kernels = kernels(subject, meter.kind)
        found.kernels_unknown = "" if found.kernels else "the profiler saw none"
    except Exception as error:
        found.kernels_unknown = _line(error)
    return found, subject


def _first_call(found: Found, cell: Cell, inputs: Inputs, mask: torch.Tensor | None, meter: Meter) -> Subject:
    began = time.perf_counter()
    subject = build(found.name, cell, inputs, mask)
    out = meter.seconds(subject.forward)[0]
    if subject.differentiable:
        meter.seconds(lambda: subject.backward(out))
    else:
        subject.gradient(out)
    found.first_seconds = time.perf_counter() - began
    return subject


# --- in turns ---------------------------------------------------------------------------------------------------------


def _time(result: CellResult, ready: list[tuple[Found, Subject]], meter: Meter, budget: Budget) -> CellResult:
    began = time.perf_counter()
    ready = [pair for pair in ready if _guarded([pair[0]], partial(_turn, pair[1], meter)) is not None]
    round_seconds = time.perf_counter() - began
    if not ready:
        return result
    asked = int(len(MEASURES) * len(ready) * budget.seconds / round_seconds)
    repeats = min(max(asked, budget.least), budget.most)
    before = meter.num_allocations()
    for index in range(repeats):
        if index and budget.left < 0:
            break
        for pair in ready[::-1] if index % 2 else ready[:]:
            found, subject = pair
            seconds = _guarded([found], partial(_turn, subject, meter))
            if seconds is None:
                ready.remove(pair)
                continue
            for measure, value in seconds.items():
                found.samples.setdefault(measure, []).append(value)
    turn = sum(statistics.median(samples) for found, _ in ready for samples in found.samples.values())
    return replace(result, turn_seconds=turn, allocations=meter.num_allocations() - before)


def _turn(subject: Subject, meter: Meter) -> dict[Measure, float]:
    """Seconds of forward, of its backward, and of another pair of them in one go."""
    if not subject.differentiable:
        return {"forward": meter.seconds(subject.forward)[1]}
    forward, backward = _apart(subject, meter)
    both = meter.seconds(lambda: subject.backward(subject.forward()))[1]
    return {"forward": forward, "backward": backward, "both": both}


def _apart(subject: Subject, meter: Meter) -> tuple[float, float]:
    out, forward = meter.seconds(subject.forward)
    backward = meter.seconds(lambda: subject.backward(out))[1]
    return forward, backward


# --- what goes wrong --------------------------------------------------------------------------------------------------


class Lost(NamedTuple):
    """Why there is no result."""

    status: Status
    reason: str

    def row(self) -> dict[str, Any]:
        """As a record has it: what broke has failed, what could not be had was skipped."""
        return {"status": self.status, "failed" if self.status == "failed" else "skipped": self.reason}


def attempted(work: Callable[[], T]) -> T | Lost:
    """The result, or why there is none."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            return work()
        except Exception as error:
            lost = _why(error, [str(warning.message) for warning in warned])
    gc.collect()
    return lost


def _guarded(founds: Sequence[Found], work: Callable[[], T]) -> T | None:
    """The result; None where it raised, which all of `founds` are told."""
    result = attempted(work)
    if not isinstance(result, Lost):
        return result
    for found in founds:
        found.lost(*result)
    return None


def _why(error: Exception, warned: Sequence[str]) -> Lost:
    """Where torch refuses a kernel, its reasons are warnings."""
    text = str(error)
    if "No available kernel" in text:
        reasons = [" ".join(line.split()).partition(" (Triggered internally")[0] for line in warned]
        reasons = [reason for reason in reasons if not _EMPTY_REASON.search(reason)]
        return Lost("not available", f"torch: {' '.join(dict.fromkeys(reasons)) or text}"[:_LONGEST_REASON])
    no_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text
    return Lost("out of memory" if no_memory else "failed", _line(error))


_EMPTY_REASON = re.compile("runtime disabled|not used because:?$")
"""What torch says of the backends that were not asked for, and before each reason."""


def _line(error: Exception) -> str:
    """Its kind and first words, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {'; '.join(lines[:3])}"[:_LONGEST_REASON]

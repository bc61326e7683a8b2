"""How `bench attention` reads a device: seconds of a call, bytes it holds and needs, and the names of its kernels.

CUDA    seconds between two events of the stream, after the L2 cache was written over: so long that all launches are
        queued before the device gets to them. Bytes are those that were asked of torch's allocator, before it rounds.
CPU     seconds of the wall clock, on one thread. Bytes are counted by the recorder (`audit.recorder`): every storage,
        exactly.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from meshwright.account import Footprint, Memory
from meshwright.audit.recorder import Recorder
from meshwright.bench.attention_subjects import COMPILED, Subject
from meshwright.comm.ranks import available_memory

FLUSHED_BYTES = 256 * 2**20
FLUSHES = 4

T = TypeVar("T")


class Measured(NamedTuple):
    """Bytes above the inputs and the gradient of the output."""

    held_bytes: int
    """After forward, without the output: there for backward only."""
    peak_bytes: int
    """Of forward and then backward, output and gradients included; of forward where there is no backward."""
    counted_by: str


def free_bytes(kind: str) -> int:
    """What can still be allocated: on a GPU what the driver has, and what torch's allocator has cached."""
    if kind == "cpu":
        return available_memory()
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


class Meter(Protocol):
    """A device, as it is measured."""

    kind: str

    def seconds(self, work: Callable[[], T]) -> tuple[T, float]:
        """The result of some work, and its seconds."""
        ...

    def memory(self, subject: Subject) -> Measured | str:
        """Of one forward and backward that is not the first, or why it cannot be measured."""
        ...

    def tidy(self) -> None:
        """Give back what is cached."""
        ...

    def num_allocations(self) -> int:
        """How often the device was asked for memory so far."""
        ...


# --- CUDA -------------------------------------------------------------------------------------------------------------


class CudaMeter:
    """The current GPU."""

    kind = "cuda"

    def __init__(self) -> None:
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")

    def seconds(self, work: Callable[[], T]) -> tuple[T, float]:
        """Between two events, after a flush."""
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FLUSHES):
            self._flushed.zero_()
        began.record()
        result = work()
        ended.record()
        ended.synchronize()
        return result, began.elapsed_time(ended) / 1e3

    def memory(self, subject: Subject) -> Measured | str:
        """By the allocator's statistics of what was requested."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = _requested("current")
        out = subject.forward()
        held = _requested("current") - before - _num_bytes(out)
        if subject.differentiable:
            gradients = subject.backward(out)
            del gradients
        torch.cuda.synchronize()
        return Measured(held, _requested("peak") - before, "allocator, before rounding")

    def tidy(self) -> None:
        """Empty the allocator's cache."""
        torch.cuda.empty_cache()

    def num_allocations(self) -> int:
        """Calls of cudaMalloc."""
        return int(torch.cuda.memory_stats().get("num_device_alloc", 0))


def _requested(which: str) -> int:
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{which}"])


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


# --- CPU --------------------------------------------------------------------------------------------------------------


class CpuMeter:
    """The CPU."""

    kind = "cpu"

    def seconds(self, work: Callable[[], T]) -> tuple[T, float]:
        """By the wall clock."""
        began = time.perf_counter()
        result = work()
        return result, time.perf_counter() - began

    def memory(self, subject: Subject) -> Measured | str:
        """By the recorder, which does not see into compiled code."""
        if subject.name in COMPILED:
            return "the recorder does not see into compiled code"
        assert subject.dout is not None
        recorder = Recorder()
        with recorder:
            for tensor in (*subject.inputs, *subject.extras, subject.dout):
                tensor.detach()  # shows it to the recorder
            recorder.restart()
            before = _alive(recorder)
            out = subject.forward()
            held = _alive(recorder) - before - _num_bytes(out)
            if subject.differentiable:
                gradients = subject.backward(out)
                del gradients
        peak = Footprint.of(recorder.trace()).peak
        return Measured(held, peak - before, "recorder, exactly")

    def tidy(self) -> None:
        """Nothing is cached."""

    def num_allocations(self) -> int:
        """Not known."""
        return 0


def _alive(recorder: Recorder) -> int:
    return sum(event.delta_bytes for event in recorder.trace().events if isinstance(event, Memory))


# --- kernels ----------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """What took most of a measure's time on the device."""

    name: str
    share: float
    """Of the time of all kernels."""


def kernels(subject: Subject, kind: str) -> dict[str, Kernel]:
    """For forward and backward: the kernel with most time, by torch's profiler; on a CPU the operator."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if kind == "cuda" else [])]
    with warnings.catch_warnings(), _quiet_profiler():
        warnings.simplefilter("ignore")
        with profile(activities=activities, acc_events=True) as profiled:
            out = _marked("forward", kind, subject.forward)
            if subject.differentiable:
                _marked("backward", kind, lambda: subject.backward(out))
        events = list(profiled.events() or ())
    found = {}
    for measure in ("forward", "backward"):
        if kernel := _longest(events, _MARK + measure, kind):
            found[measure] = kernel
    return found


_MARK = "bench attention: "


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """It would tell stderr of each start and stop, and is told otherwise by a variable of the environment alone."""
    name, level = "KINETO_LOG_LEVEL", os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if level is None:
            del os.environ[name]


def _marked(measure: str, kind: str, work: Callable[[], T]) -> T:
    with record_function(_MARK + measure):
        result = work()
        if kind == "cuda":
            torch.cuda.synchronize()
    return result


def _longest(events: list[Any], mark: str, kind: str) -> Kernel | None:
    """Of the events of the device within the marked time."""
    spans = [e.time_range for e in events if e.name == mark and e.device_type.name == "CPU"]
    if not spans:
        return None
    microseconds: dict[str, float] = {}
    for event in events:
        annotated = event.name.startswith(_MARK) or getattr(event, "is_user_annotation", False)
        if annotated or not spans[0].start <= event.time_range.start <= spans[0].end:
            continue
        if event.device_type.name != kind.upper() or (kind == "cpu" and not event.name.startswith("aten::")):
            continue
        spent = event.self_cpu_time_total if kind == "cpu" else event.time_range.elapsed_us()
        microseconds[event.name] = microseconds.get(event.name, 0.0) + float(spent)
    if not microseconds:
        return None
    name = max(microseconds, key=lambda known: microseconds[known])
    return Kernel(name, microseconds[name] / (sum(microseconds.values()) or 1.0))

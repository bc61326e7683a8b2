"""What a rank does for `bench matmul`: make and check subjects, and time them.

Before each sample ranks meet in a barrier. What a subject computes is compared once with what `unsplit` computes, and
recorded: its trace is what the timeline prices, its ledger what it sends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from meshwright.account import Issue, Ledger, Trace
from meshwright.audit.recorder import Recorder
from meshwright.bench.overlap_subjects import CPU, SITE, Gradients, Problem, Subject, Work, make
from meshwright.comm.collectives import Axis, Pending
from meshwright.comm.exposed import WaitClock
from meshwright.comm.mesh import World


class Sample(NamedTuple):
    """Seconds from the barrier on; those of them in which the program waited for collectives; those of forward, where
    only backward can hide communication (else 0)."""

    seconds: float
    exposed: float
    forward: float = 0.0


class Checked(NamedTuple):
    """How far a subject's results are from those of `unsplit`, what it sent, and (of rank 0) its trace."""

    error: float
    ledger: Ledger
    trace: Trace | None


_made: dict[tuple[Problem, Subject], Work] = {}
_expected: dict[Problem, list[torch.Tensor]] = {}


def prepare(problem: Problem, subject: Subject) -> Checked:
    """Make a subject, run and check it, and record it once; `unsplit` comes first. Collective."""
    work = _made[problem, subject] = make(problem, subject)
    work.run()
    found = [tensor.clone() for tensor in work.results()]
    if subject.kind == "unsplit":
        _expected[problem] = found
    error = _distance(found, _expected[problem]) if subject.kind != "compute" else 0.0
    work.reset()
    with Recorder() as recorder:
        work.run()
    trace = recorder.trace()
    return Checked(error, Ledger.of(trace), trace if dist.get_rank() == 0 else None)


def _distance(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest |found - expected| / |expected| of a tensor; numbers that are all zero must be found so."""
    assert len(found) == len(expected)
    pairs = zip(found, expected, strict=True)
    errors = [float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-30)) for a, b in pairs]
    return max(errors)


def sample(problem: Problem, subject: Subject) -> Sample:
    """Time a subject that was prepared. Collective."""
    work = _made[problem, subject]
    work.reset()
    dist.barrier()
    with WaitClock(CPU) as clock:
        began = time.perf_counter()
        work.run()
        seconds = time.perf_counter() - began
    reading = clock.reading()
    assert reading is not None
    if isinstance(work, Gradients):  # it has a barrier of its own
        assert work.times is not None
        return Sample(work.times.end, reading.exposed_seconds, work.times.forward)
    return Sample(seconds, reading.exposed_seconds)


def communicate(problem: Problem, subject: Subject, calls: Sequence[Issue]) -> float:
    """Seconds of a trace's collectives one after the other, without computation. Collective."""
    job = problem.job(subject, dist.get_world_size())
    world = World.create(job.layout, CPU)
    todo = [_call(world.axes[call.axis], call) for call in calls if call.group_size > 1]
    dist.barrier()
    began = time.perf_counter()
    for issue in todo:
        issue().wait()
    return time.perf_counter() - began


def send_once(operation: str, axis: str, payload_bytes: int, problem: Problem, subject: Subject) -> float:
    """Seconds of one call. Collective."""
    world = World.create(problem.job(subject, dist.get_world_size()).layout, CPU)
    one = _call(world.axes[axis], Issue(operation, axis, 0, "float32", payload_bytes, "forward", SITE))
    dist.barrier()
    began = time.perf_counter()
    one().wait()
    return time.perf_counter() - began


def _call(axis: Axis, call: Issue) -> Callable[[], Pending]:
    numel = max(1, call.payload_bytes // 4)
    if call.operation == "shift":
        sent, received = torch.zeros(numel), torch.zeros(numel)
        neighbours: dict[str, Any] = {
            "send_to": (axis.rank + 1) % axis.size,
            "receive_from": (axis.rank - 1) % axis.size,
        }
        return lambda: axis.shift(sent, into=received, site=SITE, **neighbours)
    assert call.operation == "all_reduce", call
    tensor = torch.zeros(numel)
    return lambda: axis.all_reduce(tensor, site=SITE)


def copy(nbytes: int) -> float:
    """Seconds to copy so many bytes, all ranks at once. Collective."""
    source = torch.ones(nbytes // 4)
    target = torch.ones_like(source)
    dist.barrier()
    began = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - began


def forget() -> None:
    """Let go of all subjects."""
    from meshwright.bench import gradients_rank

    gradients_rank.forget()
    _made.clear()
    _expected.clear()

"""The agreement matrix: formula = rehearsal = run, on every rank, over models, layouts, precisions and accumulation.

`check` is the whole claim for one case: ledgers equal row for row, FLOPs of matmul and attention equal, categories of
the footprint equal to the byte, and the peak of the run witnessed by torch's own profiler.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from meshwright.account import PEAK_TOLERANCE, Difference, StepAccount, diff
from meshwright.comm import scope
from meshwright.comm.mesh import World
from meshwright.comm.ranks import Ranks
from meshwright.config.tree import Job, Layout, Model, Training
from meshwright.planner.step import formula
from meshwright.rehearsal.rehearse import rehearse_job
from meshwright.training.shard import shard_batch
from meshwright.training.step import Batch, State, audited_step, step
from meshwright.verify.observe import global_batch

# Narrow models have four layers: the few kilobytes in which oneDNN reorders a bf16 operand, seen by the profiler alone,
# must be small beside the model.
MODELS = {
    "grouped_query": Model(layers=2, d_model=64, d_ff=96, heads=8, kv_heads=4, head_dim=8, vocab_size=64),
    "kv_heads_below_tensor": Model(layers=4, d_model=32, d_ff=64, heads=4, kv_heads=1, head_dim=8, vocab_size=48),
    "tied": Model(layers=4, d_model=32, d_ff=96, heads=4, kv_heads=4, head_dim=8, vocab_size=64, tied=True),
    "layernorm_bias_learned": Model(
        layers=4,
        d_model=32,
        d_ff=128,
        heads=4,
        kv_heads=4,
        head_dim=8,
        vocab_size=64,
        norm="layernorm",
        bias=True,
        positions="learned",
        mlp="gelu",
    ),
    "odd_vocabulary": Model(layers=4, d_model=32, d_ff=64, heads=4, kv_heads=2, head_dim=8, vocab_size=61),
}

LAYOUTS = {
    "1": Layout(),
    "replicate 2": Layout(replicate=2),
    "tensor 2": Layout(tensor=2),
    "replicate 2 × tensor 2": Layout(replicate=2, tensor=2),
    "tensor 4": Layout(tensor=4),
    "replicate 4": Layout(replicate=4),
}

PROFILED_STEPS = 3
"""The profiler sees only this thread's frees: what gloo's thread frees stays in its sum. So its error has one sign,
and the lowest of several steps is the best witness."""

Precision = Literal["float32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bf16")
ACCUMULATIONS = (1, 2)


class Case(NamedTuple):
    """One cell of the matrix, by the names of its options."""

    model: str
    layout: str
    precision: Precision
    accumulation: int

    @property
    def job(self) -> Job:
        """The job it stands for."""
        training = Training(batch=8, seq_len=16, precision=self.precision, accumulation=self.accumulation, device="cpu")
        return Job(name=str(self), model=MODELS[self.model], layout=LAYOUTS[self.layout], training=training)

    def __str__(self) -> str:
        return f"{self.model}, {self.layout}, {self.precision}, accumulation {self.accumulation}"


def all_cases() -> list[Case]:
    """The whole matrix."""
    return [Case(*options) for options in itertools.product(MODELS, LAYOUTS, PRECISIONS, ACCUMULATIONS)]


def covering_cases(at_least: int = 0) -> list[Case]:
    """A fixed selection in which every pair of option values occurs; greedy, then filled up to a number of cases."""
    cases, chosen = all_cases(), []
    missing = {pair for case in cases for pair in _pairs(case)}
    while missing:
        best = max(cases, key=lambda case: len(missing & _pairs(case)))
        chosen.append(best)
        missing -= _pairs(best)
    others = [case for case in cases if case not in chosen]
    wanted = max(0, at_least - len(chosen))
    return chosen + others[:: max(1, len(others) // wanted)][:wanted] if wanted else chosen


def _pairs(case: Case) -> set[tuple[tuple[str, object], ...]]:
    return set(itertools.combinations(zip(Case._fields, case, strict=True), 2))


@dataclass(frozen=True)
class Agreement:
    """What a case showed. Differences carry the rank and which two sources differ."""

    case: Case
    ledger_rows: int
    peak_bytes: int
    differences: tuple[tuple[int, str, Difference], ...]
    profiler_peaks: tuple[int, ...]
    run_peaks: tuple[int, ...]

    @property
    def witnessed(self) -> bool:
        """Whether the profiler saw the run's peak, within the tolerance, on every rank."""
        pairs = zip(self.profiler_peaks, self.run_peaks, strict=True)
        return all(abs(seen - counted) <= PEAK_TOLERANCE * seen for seen, counted in pairs)

    @property
    def agrees(self) -> bool:
        """The claim."""
        return not self.differences and self.witnessed and (self.ledger_rows > 0 or self.case.job.layout.world == 1)

    def to_json(self) -> dict[str, Any]:
        """A row of the benchmark record."""
        return {
            **self.case._asdict(),
            "agrees": self.agrees,
            "ledger_rows": self.ledger_rows,
            "peak_bytes": self.peak_bytes,
            "profiler_peak_bytes": list(self.profiler_peaks),
            "differences": [f"rank {rank}, {sources}: {d.to_json()}" for rank, sources, d in self.differences],
        }


def check(case: Case, ranks: Ranks) -> Agreement:
    """Plan, rehearse and run a case, on every rank."""
    job = case.job
    planned = formula(job)
    runs, witnessed = zip(*ranks.run(run_case, job), strict=True)
    differences = []
    for rank, run in enumerate(runs):
        rehearsed = rehearse_job(job, rank)
        differences += [(rank, "formula, rehearsal", d) for d in differences_of(planned, rehearsed)]
        differences += [(rank, "rehearsal, run", d) for d in differences_of(rehearsed, run)]
    peaks = tuple(run.footprint.peak for run in runs)
    return Agreement(case, len(planned.ledger.rows), planned.footprint.peak, tuple(differences), witnessed, peaks)


def differences_of(a: StepAccount, b: StepAccount) -> Iterator[Difference]:
    """`account.diff`, and every other category too: on a CPU nothing excuses a byte."""
    yield from diff(a, b)
    for category in a.footprint.bytes.keys() - {"parameters"}:
        first, second = a.footprint.bytes[category], b.footprint.bytes[category]
        if first != second:
            yield Difference("footprint", {"category": category, "exact": True}, first, second)


def run_case(job: Job) -> tuple[StepAccount, int]:
    """On each rank: the account of a second step, and the peak that torch's profiler saw in later ones."""
    world = World.create(job.layout, torch.device("cpu"))
    state = State.create(job, world)
    batch = shard_batch(*global_batch(job), job, job.layout.coordinates(world.rank))
    step(state, batch, world)
    _, account = audited_step(state, batch, world)
    return account, min(profiled_peak(state, batch, world) for _ in range(PROFILED_STEPS))


def profiled_peak(state: State, batch: Batch, world: World) -> int:
    """Peak bytes of one step by torch.profiler's memory events, on top of what is there before it."""
    before = sum(t.untyped_storage().nbytes() for t in (*batch, *_persistent(state)))
    with scope.observe(_Onlooker()), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(state, batch, world)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    level = peak = 0
    for event in memory:
        level += event["args"]["Bytes"]
        peak = max(peak, level)
    return before + peak


class _Onlooker:
    """Makes collectives let go of their tensors on this thread, the only one whose frees the profiler sees."""

    def waited(self, pending: Any) -> None:
        """Nothing to note."""


def _persistent(state: State) -> Iterator[torch.Tensor]:
    for parameter in state.model.parameters():
        assert parameter.grad is not None
        yield parameter
        yield parameter.grad
        yield from state.optimiser.state[parameter].values()

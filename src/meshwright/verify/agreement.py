"""The agreement matrix: formula = rehearsal = run, on every rank, over models, layouts, precisions and options.

`check` is the whole claim for one case: ledgers equal row for row, FLOPs of matmul and attention equal, categories of
the footprint equal to the byte, and the peak of the run witnessed by torch's own profiler.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from meshwright.account import PEAK_TOLERANCE, Difference, StepAccount, diff
from meshwright.comm import scope, torch_private
from meshwright.comm.mesh import World
from meshwright.comm.ranks import Ranks
from meshwright.config.tree import Job
from meshwright.planner.step import formula
from meshwright.rehearsal.rehearse import rehearse_job
from meshwright.training.step import Batch, State, audited_step, step
from meshwright.verify.matrix import AnyCase
from meshwright.verify.observe import own_batch, own_device

PROFILED_STEPS = 4
"""The profiler sees only this thread's frees: what gloo's thread frees stays in its sum. So the best witness is among
the lowest of several steps: the second, since now and then one is seen to take less than it holds."""


@dataclass(frozen=True)
class Agreement:
    """What a case showed. Differences carry the rank and which two sources differ."""

    case: AnyCase
    ledger_rows: int
    peak_bytes: int
    differences: tuple[tuple[int, str, Difference], ...]
    profiler_peaks: tuple[int | None, ...]
    """None where the profiler was not asked."""
    run_peaks: tuple[int, ...]

    @property
    def witnessed(self) -> bool:
        """Whether the profiler saw the run's peak, within the tolerance, on every rank."""
        pairs = zip(self.profiler_peaks, self.run_peaks, strict=True)
        return all(seen is None or abs(seen - counted) <= PEAK_TOLERANCE * seen for seen, counted in pairs)

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


def check(case: AnyCase, ranks: Ranks, *, thorough: bool = True) -> Agreement:
    """Plan, rehearse and run a case. Formula and run are compared on every rank.

    `thorough` rehearses every rank, not only the last, and lets the profiler witness the peaks; not those of ranks on
    GPUs, where what a kernel takes for itself is not small beside a tiny model (see `bench.footprint`).
    """
    job = case.job
    if ranks.on_gpus:
        job, thorough = replace(job, training=replace(job.training, device="cuda")), False
    runs, witnessed = zip(*ranks.run(run_case, job, thorough), strict=True)
    differences = []
    for rank, run in enumerate(runs):
        planned = formula(job, rank)
        differences += [(rank, "formula, run", d) for d in differences_of(planned, run)]
        if thorough or rank == len(runs) - 1:
            rehearsed = rehearse_job(job, rank)
            differences += [(rank, "formula, rehearsal", d) for d in differences_of(planned, rehearsed)]
    peaks = tuple(run.footprint.peak for run in runs)
    return Agreement(case, len(planned.ledger.rows), planned.footprint.peak, tuple(differences), witnessed, peaks)


def differences_of(a: StepAccount, b: StepAccount) -> Iterator[Difference]:
    """`account.diff`, and every other category too: on a CPU nothing excuses a byte."""
    yield from diff(a, b)
    for category in a.footprint.bytes.keys() - {"parameters"}:
        first, second = a.footprint.bytes[category], b.footprint.bytes[category]
        if first != second:
            yield Difference("footprint", {"category": category, "exact": True}, first, second)


def run_case(job: Job, profiled: bool) -> tuple[StepAccount, int | None]:
    """On each rank: the account of a second step, and the peak that torch's profiler saw in later ones, if asked."""
    world = World.create(job.layout, own_device(job))
    state = State.create(job, world)
    batch = own_batch(job, world.rank, world.device)
    step(state, batch, world)
    _, account = audited_step(state, batch, world)
    if not profiled:
        return account, None
    return account, sorted(profiled_peak(state, batch, world) for _ in range(PROFILED_STEPS))[1]


def profiled_peak(state: State, batch: Batch, world: World) -> int:
    """Peak bytes of one step by torch.profiler's memory events, on top of what is there before it."""
    storages = (tensor.untyped_storage() for tensor in (*batch, *_persistent(state)) if tensor is not None)
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    lean = mock.patch.multiple(torch_private, all_gather_into=_gather_in_place, reduce_scatter_into=_scatter_in_place)
    lean_too = mock.patch.object(torch_private.fsdp_collectives, "foreach_reduce_scatter_copy_in", _copy_in)
    observed = scope.observe(_Onlooker())
    with lean, lean_too, observed, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(state, batch, world)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    level = peak = sum(held.values())
    for event in _beside_scratch(events):
        address, amount = event["args"]["Addr"], event["args"]["Bytes"]
        if amount > 0:
            level -= held.get(address, 0)  # freed, unseen
            held[address] = amount
        elif held.pop(address, None) is None:
            continue  # a buffer of the step before, which gloo's thread let go of late
        level += amount
        peak = max(peak, level)
    return peak


WITH_SCRATCH = {
    f"aten::{name}{in_place}"
    for name in ("mm", "addmm", "bmm", "baddbmm", "add", "sub", "mul", "div")
    for in_place in ("", "_")
}
"""Operators that take memory for themselves on a CPU. Of bf16 matrices oneDNN makes reordered copies, on some
processors; operands of two precisions are first brought to one. Neither is a tensor, nor small beside tiny models."""


def _beside_scratch(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Allocations and frees in order of time, but for what an operator `WITH_SCRATCH` takes and gives back itself."""
    events = sorted((e for e in events if "ts" in e), key=lambda e: e["ts"])
    memory = [event for event in events if event["name"] == "[memory]"]
    operators: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["name"] in WITH_SCRATCH:
            operators[event["tid"]].append(event)
    taken: dict[tuple[float, int], int] = {}
    scratch: set[int] = set()
    for i, event in enumerate(memory):
        before = operators[event["tid"]]
        last = bisect_right(before, event["ts"], key=lambda operator: operator["ts"]) - 1
        if last < 0 or event["ts"] > before[last]["ts"] + before[last]["dur"]:
            continue
        place = before[last]["ts"], event["args"]["Addr"]
        if event["args"]["Bytes"] > 0:
            taken[place] = i
        elif place in taken:
            scratch |= {taken.pop(place), i}
    return [event for i, event in enumerate(memory) if i not in scratch]


def _gather_in_place(gathered: torch.Tensor, part: torch.Tensor, group: Any, async_op: bool) -> dist.Work:
    """An all-gather without the copies that gloo makes of whole tensors, which the profiler would see."""
    for rank, share in enumerate(gathered.chunk(group.size())):
        if rank != group.rank():
            share.zero_()
        elif share.data_ptr() != part.data_ptr():
            share.copy_(part)
    return _summed(gathered, group)


def _scatter_in_place(part: torch.Tensor, parts: torch.Tensor, group: Any, async_op: bool) -> dist.Work:
    """A reduce-scatter without the copies that gloo makes of whole tensors."""
    work = _summed(parts, group)
    own = parts.chunk(group.size())[group.rank()]
    if own.data_ptr() != part.data_ptr():
        part.copy_(own)
    return work


def _copy_in(gradients: Sequence[torch.Tensor], wire: torch.Tensor, ranks: int) -> None:
    """What `fully_shard` sends, without the padded copies that the CPU's kernel makes of it."""
    start = 0
    for gradient in gradients:
        part = -(-gradient.shape[0] // ranks) * gradient[0].numel()
        for rank, row in enumerate(wire.view(ranks, -1)):
            own = gradient.flatten()[rank * part : (rank + 1) * part]
            row[start : start + own.numel()].copy_(own)
            row[start + own.numel() : start + part].zero_()
        start += part


def _summed(tensor: torch.Tensor, group: Any) -> dist.Work:
    work = dist.all_reduce(tensor, group=group, async_op=True)
    assert work is not None
    work.wait()
    return work


class _Onlooker:
    """Makes collectives let go of their tensors on this thread, the only one whose frees the profiler sees."""

    def waited(self, pending: Any) -> None:
        """Nothing to note."""


def _persistent(state: State) -> Iterator[torch.Tensor]:
    """One tensor for each storage that outlives a step."""
    found: dict[int, torch.Tensor] = {}
    parameters = [*state.model.parameters(), *(parameter for _, parameter in state.states.owned)]
    for parameter in parameters:
        if torch_private.is_traceable_wrapper_subclass(parameter):
            continue  # its own storage is nothing; what it wraps is owned
        for tensor in (parameter, parameter.grad, *state.optimiser.state[parameter].values()):
            if tensor is not None:
                found.setdefault(torch_private.storage_key(tensor.untyped_storage()), tensor)
    yield from found.values()

"""The memory of a step on a GPU: what was planned, rehearsed and recorded, beside what CUDA's allocator says.

The account counts the bytes of storages. The caching allocator gives each a block:

    requested   what was asked for: the account's own bytes, and what kernels and libraries take unseen by it
    rounded     each up to a multiple of 512 bytes; of a trace it is known beforehand (`rounded_footprint`)
    allocated   blocks as they are: what is left over of a large one is split off only from 1 MiB on

Workspaces are what was alive before the step and is none of the job's tensors, cuBLAS's above all: they stay, so they
are taken off the peak. What an earlier job has left behind would pass for workspaces too. So each job is made twice,
and the peak fails if there are more workspaces the second time. The account also counts two int64 a call that torch's
kernel for float32 keeps on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from meshwright.account import PEAK_TOLERANCE, Event, Footprint, Memory, Repeat, StepAccount, Trace
from meshwright.bench import record

if TYPE_CHECKING:
    from meshwright.config.tree import Job
    from meshwright.training.step import Batch, State

BLOCK_BYTES = 512
"""The allocator's least block, and what it rounds every size up to."""

PERSISTENT = ("parameters", "gradients", "optimiser_states")


class Block(NamedTuple):
    """A storage that outlives the step, and the block that it has."""

    storage_bytes: int
    requested_bytes: int
    allocated_bytes: int


class Level(NamedTuple):
    """Of the allocator, at one moment or at most."""

    requested_bytes: int
    allocated_bytes: int


@dataclass(frozen=True)
class Measured:
    """What the allocator said of the second step."""

    blocks: Mapping[str, tuple[Block, ...]]
    """By persistent category, and the batch."""
    before: Level
    peak: Level
    device_context_bytes: int
    """What is in use on the device and not the allocator's: CUDA's context, modules, other programs."""
    workspaces_once: Level
    """The workspaces when the same job was made before, and dropped."""

    @property
    def workspaces(self) -> Level:
        """Alive before the step, and no tensor of the job's."""
        return outside(self.blocks, self.before)

    @property
    def left_bytes(self) -> int:
        """Of the job made before, still alive."""
        return self.workspaces.requested_bytes - self.workspaces_once.requested_bytes

    @property
    def own_peak(self) -> Level:
        """The most in the step, without the workspaces."""
        return Level(*(peak - aside for peak, aside in zip(self.peak, self.workspaces, strict=True)))


def outside(blocks: Mapping[str, tuple[Block, ...]], level: Level) -> Level:
    """What of a level is in none of the blocks."""
    own = [block for members in blocks.values() for block in members]
    return Level(
        level.requested_bytes - sum(block.requested_bytes for block in own),
        level.allocated_bytes - sum(block.allocated_bytes for block in own),
    )


def rounded(nbytes: int) -> int:
    """As the allocator rounds."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


def rounded_footprint(trace: Trace) -> Footprint:
    """The footprint of a trace in which every storage is an event of its own (not a formula's), each rounded."""
    return Footprint.of(Trace(tuple(_rounded_events(trace.events))))


def _rounded_events(events: Iterable[Event]) -> Iterator[Event]:
    for event in events:
        if isinstance(event, Memory):
            sign = 1 if event.delta_bytes > 0 else -1
            yield event._replace(delta_bytes=sign * rounded(abs(event.delta_bytes)))
        elif isinstance(event, Repeat):
            yield event._replace(events=tuple(_rounded_events(event.events)))
        else:
            yield event


def rows(
    about: Mapping[str, Any], formula: StepAccount, rehearsed: StepAccount, run: StepAccount, measured: Measured
) -> list[dict[str, Any]]:
    """A row of the record for each persistent category, and one for the peak; `about` says of what."""
    found = [_category_row(about, category, formula, rehearsed, run, measured) for category in PERSISTENT]
    return [*found, _peak_row(about, formula, rehearsed, run, measured)]


def _category_row(
    about: Mapping[str, Any],
    category: str,
    formula: StepAccount,
    rehearsed: StepAccount,
    run: StepAccount,
    measured: Measured,
) -> dict[str, Any]:
    blocks = measured.blocks[category]
    counted: dict[str, Any] = {
        source: account.footprint.bytes[category] for source, account in _by_source(formula, rehearsed, run)
    }
    requested, allocated = sum(b.requested_bytes for b in blocks), sum(b.allocated_bytes for b in blocks)
    in_blocks = sum(rounded(b.storage_bytes) for b in blocks)
    return record.row(
        **about,
        category=category,
        **counted,
        storages=len(blocks),
        requested_bytes=requested,
        rounded_bytes=in_blocks,
        rounding_bytes=in_blocks - requested,
        allocated_bytes=allocated,
        unsplit_bytes=allocated - in_blocks,
        failed="" if {*counted.values()} == {requested} else "the allocator was asked for other bytes than are counted",
    )


def _peak_row(
    about: Mapping[str, Any], formula: StepAccount, rehearsed: StepAccount, run: StepAccount, measured: Measured
) -> dict[str, Any]:
    counted: dict[str, Any] = {
        source: account.footprint.peak for source, account in _by_source(formula, rehearsed, run)
    }
    own, aside, predicted = measured.own_peak, measured.workspaces, rounded_footprint(rehearsed.trace).peak
    error = rehearsed.footprint.peak / own.allocated_bytes - 1
    return record.row(
        **about,
        category="peak",
        **counted,
        peak_phase=rehearsed.footprint.peak_phase,
        peak_site=rehearsed.footprint.peak_site,
        run_peak_phase=run.footprint.peak_phase,
        run_peak_site=run.footprint.peak_site,
        rehearsed_rounded_bytes=predicted,
        requested_bytes=own.requested_bytes,
        unseen_bytes=own.requested_bytes - run.footprint.peak,
        allocated_bytes=own.allocated_bytes,
        relative_error=error,
        rounded_relative_error=predicted / own.allocated_bytes - 1,
        workspaces_bytes=aside.allocated_bytes,
        left_bytes=measured.left_bytes,
        device_context_bytes=measured.device_context_bytes,
        failed="; ".join(_peak_failures(error, measured.left_bytes)),
    )


def _peak_failures(error: float, left_bytes: int) -> Iterator[str]:
    if abs(error) > PEAK_TOLERANCE:
        yield f"more than {PEAK_TOLERANCE:.0%} off the allocator's peak"
    if left_bytes > 0:
        yield f"{left_bytes} bytes of a job that was dropped are still alive"


def _by_source(*accounts: StepAccount) -> list[tuple[str, StepAccount]]:
    return [(f"{account.source}_bytes", account) for account in accounts]


# --- on the device ----------------------------------------------------------------------------------------------------


def compare(name: str, job: Job) -> list[dict[str, Any]]:
    """Rows of a job of one rank, planned, rehearsed and run on this process's GPU. Raises OutOfMemoryError."""
    from meshwright.planner.step import formula
    from meshwright.rehearsal.rehearse import rehearse_job

    job = replace(job, training=replace(job.training, device="cuda", compile=False))
    assert job.layout.world == 1, job.layout
    training = job.training
    about = {
        "job": name,
        "precision": training.precision,
        "batch": training.batch,
        "seq_len": training.seq_len,
        "attention": training.attention,
        "recompute": job.layout.recompute,
        "loss_chunk": training.loss_chunk,
    }
    rehearsed = rehearse_job(job)
    run, measured = measure(job)
    return rows(about, formula(job), rehearsed, run, measured)


def measure(job: Job) -> tuple[StepAccount, Measured]:
    """The account of the second step on this process's GPU, and what the allocator said of it."""
    _, once = _measured(job, Level(0, 0))
    return _measured(job, once.workspaces)


def _measured(job: Job, workspaces_once: Level) -> tuple[StepAccount, Measured]:
    """The same of a job that is made here and dropped."""
    import gc

    import torch

    from meshwright.comm.mesh import World
    from meshwright.training.step import State, audited_step, step
    from meshwright.verify.observe import own_batch, own_device

    gc.collect()
    world = World.single(own_device(job))
    state, batch = State.create(job, world), own_batch(job, 0, world.device)
    step(state, batch, world)
    gc.collect()
    torch.cuda.synchronize()
    blocks, before = _blocks(state, batch), _level("current")
    torch.cuda.reset_peak_memory_stats()
    _, account = audited_step(state, batch, world)
    torch.cuda.synchronize()
    peak = _level("peak")
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    return account, Measured(blocks, before, peak, context, workspaces_once)


def _level(when: str) -> Level:
    import torch

    found = torch.cuda.memory_stats()
    return Level(found[f"requested_bytes.all.{when}"], found[f"allocated_bytes.all.{when}"])


def _blocks(state: State, batch: Batch) -> dict[str, tuple[Block, ...]]:
    """Of every storage that outlives a step, its block, by category."""
    import torch

    parameters = [*state.model.parameters(), *(parameter for _, parameter in state.states.owned)]
    tensors: dict[str, list[Any]] = {
        "parameters": parameters,
        "gradients": [parameter.grad for parameter in parameters],
        "optimiser_states": [value for states in state.optimiser.state.values() for value in states.values()],
        "batch": list(batch),
    }
    at = {}
    for segment in torch.cuda.memory_snapshot():
        address = segment["address"]
        for block in segment["blocks"]:
            at[address] = block
            address += block["size"]
    found = {}
    for category, members in tensors.items():
        storages = {m.untyped_storage().data_ptr(): m.untyped_storage().nbytes() for m in members if m is not None}
        found[category] = tuple(
            Block(nbytes, at[address]["requested_size"], at[address]["size"])
            for address, nbytes in storages.items()
            if nbytes
        )
    return found

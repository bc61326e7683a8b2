"""`meshwright verify`: run a layout on real ranks here, rehearse and plan it, and compare all three with one device."""

from __future__ import annotations

from dataclasses import replace

from meshwright.comm.ranks import BYTES_OF_A_RANK, Ranks, available_memory
from meshwright.config.legality import check_processes, require_legal
from meshwright.config.tree import Job
from meshwright.errors import UserError
from meshwright.planner.overlap import resolve
from meshwright.planner.step import formula, heaviest
from meshwright.rehearsal.rehearse import rehearse_job
from meshwright.training.device import resolve_device
from meshwright.units import format_bytes
from meshwright.verify.compare import References, compare, reference_job
from meshwright.verify.observe import Instrument, observe_rank, observe_reference
from meshwright.verify.report import VerifyReport
from meshwright.verify.shrink import shrink_job


def verify(job: Job, processes: int | None = None, *, shrink: bool = False, ranks: Ranks | None = None) -> VerifyReport:
    """Verify a job on gloo ranks of this machine.

    `shrink` verifies a smaller model of the same divisibility; `ranks` is a pool to use instead of a new one. Raises
    UserError for an illegal layout, processes unequal to its world, or a model too large for this machine's memory.
    """
    if processes is not None:
        check_processes(job.layout, processes)
    require_legal(job)
    # The overlap is the one that the whole job would run with, where it would run.
    job = replace(job, layout=resolve(resolve_device(job, planning=True)).layout)
    job = shrink_job(job) if shrink else job
    job = replace(job, training=replace(job.training, device="cpu", compile=False))
    check_memory(job, available_memory())
    if ranks is not None:
        return verify_on(job, ranks)
    with Ranks(job.layout.world, timeout_seconds=job.training.timeout_seconds) as own:
        return verify_on(job, own)


def verify_on(job: Job, ranks: Ranks, instrument: Instrument | None = None) -> VerifyReport:
    """Verify a legal CPU job on a pool of ranks; `instrument` changes run and rehearsal, not the references."""
    runs = ranks.run(observe_rank, job, instrument)
    rehearsals = [rehearse_job(job, rank, instrument) for rank in range(job.layout.world)]
    single = reference_job(job)
    references = References(observe_reference(single, float64=True), observe_reference(single, float64=False))
    return compare(job, runs, references, formula(job), rehearsals)


def needed_memory(job: Job) -> int:
    """Predicted bytes: all ranks at their peak, and the float64 and same-precision references, whose probes stay."""
    ranks = (2 * heaviest(job).footprint.peak + BYTES_OF_A_RANK) * job.layout.world
    return ranks + 4 * formula(reference_job(job)).footprint.peak


def check_memory(job: Job, available: int) -> None:
    """Raise UserError if a verification would not fit into so many bytes."""
    needed = needed_memory(job)
    if needed > available:
        raise UserError(
            f"verifying this model needs about {format_bytes(needed)} ({needed} bytes) and {format_bytes(available)} "
            "are free (ranks and two reference runs live on this machine): "
            "verify with --shrink, or set a smaller model.layers"
        )

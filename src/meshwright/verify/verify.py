"""`meshwright verify`: run a layout on real ranks here, rehearse and plan it, and compare all three with one device."""

from __future__ import annotations

from dataclasses import replace

from meshwright.comm.ranks import BYTES_OF_A_RANK, Ranks, available_gpu_memory, available_memory
from meshwright.config.legality import check_processes, require_legal
from meshwright.config.tree import Job
from meshwright.errors import UserError
from meshwright.planner.overlap import resolve
from meshwright.planner.step import formula, heaviest
from meshwright.rehearsal.rehearse import rehearse_job
from meshwright.training.device import check_attention, check_machine, resolve_device
from meshwright.units import format_bytes
from meshwright.verify.compare import References, compare, reference_job
from meshwright.verify.observe import Instrument, observe_rank, observe_reference
from meshwright.verify.report import VerifyReport
from meshwright.verify.shrink import shrink_job


def verify(job: Job, processes: int | None = None, *, shrink: bool = False, ranks: Ranks | None = None) -> VerifyReport:
    """Verify a job on ranks of this machine, with a GPU each if that is asked for, or if it has so many and may choose.

    `shrink` verifies a smaller model of the same divisibility; `ranks` is a pool to use instead of a new one. Raises
    UserError for a job that is illegal where it would run or here, processes unequal to its world, what this machine
    cannot run, or a model too large for its memory.
    """
    if processes is not None:
        check_processes(job.layout, processes)
    planned = resolve_device(job, planning=True)
    require_legal(planned)
    # The overlap is the one that the whole job would run with, where it would run.
    job = replace(job, layout=resolve(planned).layout)
    job = shrink_job(job) if shrink else job
    on_gpus = _is_for_gpus(job) if ranks is None else ranks.on_gpus
    job = replace(job, training=replace(job.training, device="cuda" if on_gpus else "cpu", compile=False))
    require_legal(job)
    check_machine(job) if ranks is None else check_attention(job)
    check_memory(job, available_gpu_memory() if on_gpus else available_memory())
    if ranks is not None:
        return verify_on(job, ranks)
    with Ranks(job.layout.world, timeout_seconds=job.training.timeout_seconds, on_gpus=on_gpus) as own:
        return verify_on(job, own)


def _is_for_gpus(job: Job) -> bool:
    """Whether GPUs are asked for; where the device is open, whether each rank has one, which takes the job's mask."""
    if job.training.device == "auto" and job.training.documents == "separate":
        return False
    return resolve_device(job, planning=False).training.device == "cuda"


def verify_on(job: Job, ranks: Ranks, instrument: Instrument | None = None) -> VerifyReport:
    """Verify a legal job, of the pool's kind of device, on a pool of ranks.

    `instrument` changes run and rehearsal, not the references.
    """
    runs = ranks.run(observe_rank, job, instrument)
    rehearsals = [rehearse_job(job, rank, instrument) for rank in range(job.layout.world)]
    single = reference_job(job)
    references = References(observe_reference(single, float64=True), observe_reference(single, float64=False))
    return compare(job, runs, references, formula(job), rehearsals)


def needed_memory(job: Job) -> int:
    """Predicted bytes: all ranks at their peak, and the float64 and same-precision references, whose probes stay.

    Of GPUs, those of the first: a rank and the references share it.
    """
    world = 1 if job.training.device == "cuda" else job.layout.world
    ranks = (2 * heaviest(job).footprint.peak + BYTES_OF_A_RANK) * world
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

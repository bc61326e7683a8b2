"""Start a training job: check it, prepare its folder, and run its ranks under torch's own launcher.

`meshwright train` calls `train`, which prepares in this process and starts ranks that find everything in the folder.
`torchrun -m meshwright.training` starts ranks first, and rank 0 calls `prepare`. Either way plan.json and
rehearsal.json are written before any rank trains, so that the run can be held against them.
"""

from __future__ import annotations

import logging
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from meshwright.account import StepAccount
from meshwright.config.attention import chosen_attention
from meshwright.config.legality import check_processes, require_decoder, require_legal
from meshwright.config.tree import AXES, Job
from meshwright.planner.estimate import estimate
from meshwright.planner.overlap import decide, summary
from meshwright.planner.step import formula
from meshwright.training.data import Text
from meshwright.training.device import check_machine, resolve_device
from meshwright.training.run_folder import RunFolder
from meshwright.training.trial import reason_against, skipped_line
from meshwright.units import format_bytes, format_seconds

SHUTDOWN_SECONDS = 5
"""What a rank that was asked to leave has for it; then it is killed."""
MONITOR_SECONDS = 0.1


def train(job: Job, processes: int | None, runs: Path) -> int:
    """Train a job on this machine; returns the exit code, as a shell counts it (130 after Ctrl-C, 143 after SIGTERM).

    Raises UserError, before anything is started or written, for whatever is wrong with the job.
    """
    with _signals_as_exceptions():
        try:
            job = checked(job, processes)
            return _run_ranks(job, prepare(job, runs))
        except _Interrupted as interrupted:
            return 128 + interrupted.number


def checked(job: Job, processes: int | None = None, *, local_ranks: int | None = None) -> Job:
    """The job with its device resolved. Raises UserError if it cannot run, or not with this number of processes."""
    require_decoder(job, "train")
    if (
        local_ranks is not None and job.layout.world > local_ranks
    ):  # the hosts are as they are, not as they were planned
        job = replace(job, cluster=replace(job.cluster, devices_per_host=local_ranks))
    job = resolve_device(job, planning=False, local_ranks=local_ranks)
    require_legal(job)
    if processes is not None:
        check_processes(job.layout, processes)
    check_machine(job, local_ranks=local_ranks)
    return job


def prepare(job: Job, runs: Path) -> RunFolder:
    """Open the data, claim a run folder, and write what is predicted. Needs a process without a process group.

    Where ranks will try what was cut against nothing cut, the same is predicted of that: once ranks have joined, nobody
    can rehearse any more.
    """
    text = Text.open(job)
    decision = decide(job)
    job = decision.chosen.job
    folder = RunFolder.create(runs, job)
    lines, overlap = [summary(decision)], decision.to_json()
    if job.layout != decision.unsplit.job.layout:
        if reason := reason_against(job.training):
            lines.append(skipped_line(reason))
            overlap["trial"] = {"skipped": reason}
        else:
            folder.fallback.write_job(decision.unsplit.job)
            _predict(decision.unsplit.job, replace(decision, chosen=decision.unsplit).to_json(), folder.fallback)
    plan, rehearsal = _predict(job, overlap, folder)
    print(_summary(job, text, folder, plan, rehearsal), *lines, sep="\n", flush=True)
    return folder


def _predict(job: Job, overlap: dict[str, Any], folder: RunFolder) -> tuple[StepAccount, StepAccount]:
    """Write plan and rehearsal of a resolved job."""
    from meshwright.rehearsal.rehearse import rehearse_job  # imports torch: seconds

    plan = replace(estimate(formula(job), job), overlap=overlap)
    folder.write_account("plan", plan)
    rehearsal = rehearse_job(job)
    folder.write_account("rehearsal", rehearsal)
    return plan, rehearsal


def _summary(job: Job, text: Text, folder: RunFolder, plan: StepAccount, rehearsal: StepAccount) -> str:
    degrees = " × ".join(f"{axis} {job.layout.degree(axis)}" for axis in AXES if job.layout.degree(axis) > 1)
    seconds, chosen = plan.timeline.step_seconds, chosen_attention(job.model, job.training)
    lines = {
        "run": str(folder.path),
        "layout": f"{degrees or 'one rank'} on {job.training.device}",
        **({"attention": f"auto takes {chosen}"} if chosen.asked == "auto" else {}),
        "data": f"{text.corpus.name}: {text.corpus.num_bytes:,} bytes, {len(text.corpus.heldout):,} of them held out",
        "plan": f"peak {format_bytes(plan.footprint.peak)}, {len(plan.ledger.rows)} ledger rows"
        + (f", {format_seconds(seconds)} a step" if seconds is not None else ""),
        "rehearsal": f"peak {format_bytes(rehearsal.footprint.peak)}, {len(rehearsal.ledger.rows)} ledger rows",
    }
    return "\n".join(f"{name:<10} {line}" for name, line in lines.items())


# --- ranks ------------------------------------------------------------------------------------------------------------


def _run_ranks(job: Job, folder: RunFolder) -> int:
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from meshwright.comm.torch_private import ending_ranks_within, shutdown_timeout

    _silence("torch.distributed.elastic")
    with tempfile.TemporaryDirectory(prefix="meshwright-") as logs, ending_ranks_within(SHUTDOWN_SECONDS):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=job.layout.world,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",  # any free port
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=MONITOR_SECONDS,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            **shutdown_timeout(SHUTDOWN_SECONDS),
        )
        command = ("-m", "meshwright.training", str(folder.job_file), "--run-folder", str(folder.path))
        try:
            elastic_launch(config, sys.executable)(*command)
        except SignalException as error:
            raise _Interrupted(error.sigval) from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            print(failure_line(rank, failure.exitcode, job.layout.world), file=sys.stderr)
            return exit_code(failure.exitcode)
    return 0


def _silence(package: str) -> None:
    """Mute the loggers of a package, each of which has a level of its own: one line of ours says what happened."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(package):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def failure_line(rank: int, code: int, world: int) -> str:
    """How a rank ended, on one line; `code` is negative for a signal, as `subprocess` has it."""
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    elif code > 128 and code - 128 in (signal.SIGTERM, signal.SIGINT):
        how = f"was ended by {signal.Signals(code - 128).name}"
    else:
        how = f"failed with exit code {code} (its message is above)"
    others = f"; the other {world - 1} ranks were ended" if world > 1 else ""
    return f"rank {rank} {how}{others}"


def exit_code(code: int) -> int:
    """A rank's exit code as a shell counts it."""
    return 128 - code if code < 0 else code


class _Interrupted(BaseException):
    """This process was asked to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = int(number)


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """SIGINT and SIGTERM raise `_Interrupted` inside; torch's launcher puts its own handlers while ranks run."""

    def interrupt(number: int, frame: Any) -> None:
        raise _Interrupted(number)

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    others = {s: signal.getsignal(s) for s in (signal.SIGHUP, signal.SIGQUIT)}
    try:
        yield
    finally:
        for number, handler in (before | others).items():
            signal.signal(number, handler)

"""What each command does: options in, output on stdout, exit code out. Heavy imports stand inside the commands."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.cli import options
from meshwright.cli.benches import Measurement
from meshwright.cli.worksheets import Sheet
from meshwright.cli.writable import writable
from meshwright.config.attention import chosen_attention
from meshwright.config.files import load_job
from meshwright.config.legality import complete_world, require_decoder, require_legal
from meshwright.config.ranges import world_mistakes
from meshwright.config.tree import Job
from meshwright.errors import UserError

if TYPE_CHECKING:
    from meshwright.planner.search import Candidate


def plan(given: options.Plan) -> int:
    """Layouts, ranked."""
    from meshwright.planner import search

    found = search.plan(_planned(_job(given)), given.devices, given.typed, given.top)
    if given.trace is not None:
        _write_trace(found.layouts[0], Path(given.trace))
    if given.json:
        return _print_json(found.to_json())
    from meshwright.cli.show import show_plan

    show_plan(found)
    return 0


def rehearse(given: options.Rehearse) -> int:
    """The account of one rank, timed by the planner's estimate."""
    from meshwright.planner.overlap import decide

    decision = decide(_of_world(_planned(_executable(_job(given), "rehearse")), given.world, given.typed))
    job = decision.chosen.job
    _check_rank(given.rank, job)
    folder = Path(given.out) if given.out is not None else None
    if folder is not None:
        with writable("--out", folder, "folder"):
            folder.mkdir(parents=True, exist_ok=True)
    from meshwright.planner.estimate import estimate
    from meshwright.rehearsal.rehearse import rehearse_job

    account = replace(estimate(rehearse_job(job, given.rank), job), overlap=decision.to_json())
    found = {**account.to_json(), "attention": chosen_attention(job.model, job.training).to_json()}
    if folder is not None:
        with writable("--out", folder, "folder"):
            (folder / "rehearsal.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    if given.json:
        return _print_json(found)
    from meshwright.cli.show import show_account

    show_account(account, job)
    return 0


def layout(given: options.Layout) -> int:
    """Ranks and parts."""
    job = _of_world(_executable(_job(given), "layout"), given.world, given.typed)
    _check_rank(given.rank, job)
    from meshwright.planner.placement import Placement

    placement = Placement.of(job)
    if given.json:
        return _print_json(placement.to_json())
    from meshwright.cli.show import show_placement

    show_placement(placement, given.rank)
    return 0


def verify(given: options.Verify) -> int:
    """1 where they do not agree."""
    job = _executable(_job(given), "verify")
    require_legal(_planned(job))
    from meshwright.verify.verify import verify as run

    report = run(job, given.processes, shrink=given.shrink)
    if given.json:
        _print_json(report.to_json())
    else:
        print(report.text())
    return 0 if report.agree else 1


def train(given: options.Train) -> int:
    """The exit code of the run."""
    job = _executable(_job(given), "train")
    from meshwright.launch import train as run

    return run(job, given.processes, Path(given.runs))


def schemes(given: options.Schemes) -> int:
    """A row for each scheme."""
    from meshwright.schemes.question import Question
    from meshwright.schemes.table import NOTES, rows

    question = Question.of(given.seq, given.hidden, given.degree, given.batch, given.heads, given.kv_heads)
    if given.json:
        found = [asdict(row) for row in rows(question)]
        return _print_json({"inputs": asdict(question), "schemes": found, "notes": NOTES})
    from meshwright.cli.show import show_schemes

    show_schemes(rows(question), question)
    return 0


def worksheet(given: Sheet) -> int:
    """1 where a run does not agree with its formula."""
    return given.show()


def bench(given: Measurement) -> int:
    """1 where something failed."""
    return given.show()


def lab(given: options.Lab) -> int:
    """The exit code of its command."""
    from meshwright.lab import program

    if given.clean and given.command:
        raise UserError("--clean runs nothing, and a COMMAND was given: leave out one of them")
    if given.clean:
        return program.remove_abandoned()
    return program.run(
        given.command,
        hosts=given.hosts,
        ranks=given.ranks,
        rate=given.rate,
        intra_rate=given.intra_rate,
        bare=given.bare,
    )


# --- jobs -------------------------------------------------------------------------------------------------------------


def _job(given: options.OfJob) -> Job:
    return load_job(given.job, given.overrides)


def _executable(job: Job, command: str) -> Job:
    """The job, if there is a step to execute."""
    require_decoder(job, command)
    return job


def _of_world(job: Job, world: int | None, typed: set[str]) -> Job:
    """The legal job on `world` ranks, or on the product of its degrees."""
    if world is not None:
        job = replace(job, layout=complete_world(job.layout, world, typed))
        if mistakes := world_mistakes(job.layout):
            raise UserError("\n".join(mistakes))
    require_legal(job)
    return job


def _planned(job: Job) -> Job:
    from meshwright.training.device import resolve_device  # does not import torch for planning

    return resolve_device(job, planning=True)


def _check_rank(rank: int, job: Job) -> None:
    world = job.layout.world
    if not 0 <= rank < world:
        raise UserError(f"--rank {rank} is not in a world of {world} (ranks count from 0): use 0 to {world - 1}")


# --- output -----------------------------------------------------------------------------------------------------------


def _write_trace(best: Candidate, file: Path) -> None:
    """The timeline of its step, by formula."""
    from meshwright.planner.chrome import chrome_trace
    from meshwright.planner.estimate import estimate

    if best.step_seconds is None:
        raise UserError(
            f"--trace has nothing to show ({best.why}): give a --cluster whose figures are known, such as one of "
            "meshwright bench calibrate"
        )
    account = estimate(best.account, best.job)
    with writable("--trace", file, "file"):
        file.write_text(json.dumps(chrome_trace({account.source: account.timeline})), encoding="utf-8")


def _print_json(value: dict[str, Any]) -> int:
    print(json.dumps(value, allow_nan=False))
    return 0

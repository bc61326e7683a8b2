"""`torchrun --nproc-per-node N -m meshwright.training JOB [--section.field value ...]`: one rank of a training job.

JOB is a TOML file or a catalog name. `meshwright train` starts ranks with `--run-folder DIR`, where everything is
prepared; without it rank 0 prepares, in `runs/` or the folder that `--runs` names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from meshwright.config.files import load_job
from meshwright.config.tree import Job
from meshwright.errors import UserError
from meshwright.training import process
from meshwright.training.run_folder import RunFolder

USAGE = """\
usage: torchrun --nproc-per-node N -m meshwright.training JOB [--runs DIR] [--section.field value ...]

One rank of a training job. JOB is a TOML file or a catalog name; N is the product of the degrees of its layout.
The run's folder is made in DIR (runs, if none is named). meshwright train starts the ranks by itself;
meshwright train --help lists the fields."""


def main(arguments: Sequence[str]) -> int:
    """Run this rank to its end; returns its exit code."""
    process.end_on_signals()
    place = process.Place.of(os.environ)
    try:
        return _run(arguments, place)
    except process.Ended as ended:
        return ended.exit_code


def _run(arguments: Sequence[str], place: process.Place) -> int:
    if {"-h", "--help"} & set(arguments):
        if place.rank == 0:
            print(USAGE)
        return 0
    try:
        source, options, overrides = _parse(arguments)
        return _train(load_job(source, overrides), options, place)
    except UserError as error:
        if place.rank == 0:
            print(error, file=sys.stderr)
        else:
            process.wait_to_be_ended()  # by what rank 0 found, mostly the same
            print(f"rank {place.rank}: {error}", file=sys.stderr)
        return 2


def _train(job: Job, options: dict[str, str], place: process.Place) -> int:
    from meshwright import launch
    from meshwright.training import loop, lost  # seconds of importing torch, once the words are known to be right

    job = launch.checked(job, place.world, local_ranks=place.local_world)
    folder = RunFolder(Path(options["run_folder"])) if "run_folder" in options else None
    try:
        if folder is None and place.rank == 0:
            folder = launch.prepare(job, Path(options.get("runs", "runs")))
        loop.run(job, place, folder)
    except lost.LostPeer as error:
        if error.patient:
            process.wait_to_be_ended()
        print(f"rank {place.rank}: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str]) -> tuple[str, dict[str, str], list[tuple[str, str]]]:
    """JOB, this module's own options, and overrides as (path, text)."""
    positional, pairs, rest = [], [], iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            positional.append(argument)
            continue
        name, equals, text = argument.removeprefix("--").partition("=")
        value = text if equals else next(rest, None)
        if value is None:
            raise UserError(f"--{name} has no value (options are --name value): give it one")
        pairs.append((name.replace("-", "_"), value))
    if len(positional) != 1:
        raise UserError(
            f"{len(positional)} jobs were named (one is trained at a time): give one TOML file or catalog name"
        )
    own = {name: value for name, value in pairs if name in ("run_folder", "runs")}
    return positional[0], own, [(name, value) for name, value in pairs if name not in own]


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: after a failure, interpreter shutdown would wait for threads of a process group whose peers are gone.
    os._exit(code)

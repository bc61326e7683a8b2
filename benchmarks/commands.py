"""`make bench`: measure what the project claims of itself and write the records.

    agreement     every case of the agreement matrix: formula = rehearsal = run, and the profiler's witness
    rehearsal     `meshwright rehearse llama3-405b --layout.tensor 8 --world 1024`: seconds and resident memory
    planning      `meshwright plan llama3-8b --devices 64 --json`: seconds, with start-up
    attention     `meshwright bench attention`, both grids, on a GPU (10 minutes); `--quick` where there is none
    attention-context
                  `meshwright bench ring`: attention over a divided sequence, ring contiguous and zigzag, Ulysses, both
    collectives   `meshwright bench collectives`: 2 and 4 ranks here, and in the lab 2 hosts of 1 and of 2 ranks
    gradients-two-hosts
                  `meshwright bench gradients`: strategies and DDP in the lab, over buckets and rates; 20 minutes
    overlap-matmul, overlap-block, overlap-step, overlap-buckets, overlap-hierarchical
                  `meshwright bench matmul`, a part each: communication under computation in the lab; 25 minutes
    overlap-timeline
                  what the timeline says of these, beside what was measured
    flash-compile `python -m meshwright.bench.flash_compile`: every configuration of the flash kernels compiled for GPUs
                  that need not be here: registers, spills, shared memory, instruction; needs Triton

`python benchmarks/commands.py [NAME ...]` runs some of them. Limits are the project's own targets.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from meshwright.bench import attention as bench_attention
from meshwright.bench import collectives as bench_collectives
from meshwright.bench import flash_compile as bench_flash_compile
from meshwright.bench import gradients as bench_gradients
from meshwright.bench import overlap, record, ring
from meshwright.bench.context import Setting
from meshwright.bench.overlap_rows import timeline_rows
from meshwright.comm.ranks import Ranks
from meshwright.errors import UserError
from meshwright.verify.agreement import check
from meshwright.verify.matrix import every_case

PROGRAM = str(Path(sys.executable).with_name("meshwright"))
GIB = 2**30


def agreement() -> list[dict[str, Any]]:
    """A row for each case."""
    rows = []
    for world in (1, 2, 3, 4, 8):
        with Ranks(world) as ranks:
            for case in (case for case in every_case() if case.job.layout.world == world):
                found = check(case, ranks)
                rows.append(record.row(**found.to_json(), failed=None if found.agrees else "does not agree"))
                print(f"{'agrees' if found.agrees else 'DIFFERS'}  {case}", flush=True)
    return rows


def rehearsal() -> list[dict[str, Any]]:
    """Seconds and peak resident memory of the rehearsal of one of 1024 ranks."""
    command = [PROGRAM, "rehearse", "llama3-405b", "--layout.tensor", "8", "--world", "1024", "--json"]
    runs = [_timed(command) for _ in range(3)]
    account = json.loads(runs[0][2])
    about = {"command": "rehearse llama3-405b --layout.tensor 8 --world 1024", "ledger_rows": len(account["ledger"])}
    return [
        record.row(**about, samples=[run[0] for run in runs], unit="s", limit=15.0, limit_kind="least"),
        record.row(**about, samples=[run[1] / GIB for run in runs], unit="GiB", limit=1.0, limit_kind="least"),
    ]


def planning() -> list[dict[str, Any]]:
    """Seconds of pricing every tensor × replicate layout of 64 devices, interpreter included."""
    command = [PROGRAM, "plan", "llama3-8b", "--devices", "64", "--json"]
    runs = [_timed(command) for _ in range(9)]
    layouts = len(json.loads(runs[0][2])["layouts"])
    about = {"command": "plan llama3-8b --devices 64 --json", "layouts": layouts}
    return [record.row(**about, samples=[run[0] for run in runs], unit="s", limit=0.5, limit_kind="least")]


def attention() -> list[dict[str, Any]]:
    """A row for each measure of each implementation in each cell, and more; see `bench.attention_rows`."""
    settings = [bench_attention.FLASH, bench_attention.NAIVE]
    if bench_attention.device_kind(bench_attention.FLASH) == "cpu":
        settings = [replace(bench_attention.FLASH, **bench_attention.quick("cpu"))]
    return [
        row for setting in settings for row in bench_attention.measure(setting, functools.partial(print, flush=True))
    ]


def attention_context() -> list[dict[str, Any]]:
    """A row for each layout, and for each comparison."""
    return ring.measure(Setting())


def collectives() -> list[dict[str, Any]]:
    """A row for each case and fit; one for each lab that this machine cannot have."""
    settings = [bench_collectives.Setting(max_seconds=80.0)]
    settings += [bench_collectives.Setting(lab_hosts=2, lab_ranks=ranks, max_seconds=50.0) for ranks in (1, 2)]
    rows = []
    for setting in settings:
        try:
            rows += bench_collectives.measure(setting)
        except UserError as error:
            rows.append(record.row(where=setting.command(), failed=str(error)))
    return rows


def gradients_two_hosts() -> list[dict[str, Any]]:
    """At each rate, a row for each subject and for each comparison; needs a machine that can have a lab."""
    return bench_gradients.measure(bench_gradients.Setting(), lambda line: print(line, flush=True))


@functools.cache
def overlap_part(part: str) -> list[dict[str, Any]]:
    """At each setting, a row for each subject and comparison; measured once, for the timeline's record, too."""
    return overlap.measure_parts(overlap.Setting(parts=(part,)), lambda line: print(line, flush=True))


def overlap_timeline() -> list[dict[str, Any]]:
    """At each setting of all parts: predicted order, choice and regret; and the figures over all of them."""
    return timeline_rows([row for part in overlap.PARTS for row in overlap_part(part)])


def flash_compile() -> list[dict[str, Any]]:
    """A row for each configuration and compute capability."""
    rows = []
    for compiled in bench_flash_compile.compile_all():
        rows.append(compiled.row())
        print(compiled, flush=True)
    return rows


def _timed(command: list[str]) -> tuple[float, int, str]:
    """Seconds, peak resident bytes and output of a program that must succeed."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{command} exited {process.returncode}"
    return seconds, usage.ru_maxrss * 1024, output


ON_DEVICE = {"attention": lambda: bench_attention.device_name(bench_attention.FLASH)}
"""Those that run on a GPU where there is one, and its name."""

BENCHMARKS = {
    "agreement": agreement,
    "rehearsal": rehearsal,
    "planning": planning,
    "attention": attention,
    "attention-context": attention_context,
    "collectives": collectives,
    "gradients-two-hosts": gradients_two_hosts,
    **{f"overlap-{part}": functools.partial(overlap_part, part) for part in overlap.PARTS},
    "overlap-timeline": overlap_timeline,
    "flash-compile": flash_compile,
}


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}: there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    for name in names or BENCHMARKS:
        rows, device = BENCHMARKS[name](), ON_DEVICE.get(name, str)()
        print(record.write(name, f"python benchmarks/commands.py {name}", rows, device))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

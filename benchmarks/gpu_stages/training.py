"""Programs that train: losses by attention and compilation, `verify`, and a world of one over NCCL."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_stages.programs import MESHWRIGHT, ROOT, Failed, first_line, options, printed

CURVES: dict[tuple[str, str, int], tuple[tuple[str, bool], ...]] = {
    ("quickstart", "float32", 20): (("sdpa", False), ("sdpa", True), ("flash", False)),
    ("quickstart", "bf16", 20): (("sdpa", False), ("flash", False), ("flash", True)),
    ("small", "bf16", 6): (("sdpa", False), ("flash", False)),
}
"""Job, precision and steps; and the runs of it, by attention and whether compiled: all are compared with the first."""

VERIFIED = (("sdpa", "float32"), ("sdpa", "bf16"), ("flash", "float32"), ("flash", "bf16"))
"""Attention and precision."""

AT_ONCE = 4
"""Programs of the stage `training` that share the GPU: nothing is timed there."""

LOSS_TOLERANCE = {"float32": 2e-6, "bf16": 2.0**-9}
"""Relative, between losses of the same step."""


def training(out: Path) -> str:
    """Loss curves and `verify`; whatever fails is named, the rest runs."""
    runs = [(*job, *kind) for job, kinds in CURVES.items() for kind in kinds]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        metrics = dict(zip(runs, pool.map(lambda run: _trained(*run), runs), strict=True))
        reports = dict(zip(VERIFIED, pool.map(lambda kind: _verified(*kind), VERIFIED), strict=True))
    wrong = []
    for job, kinds in CURVES.items():
        first = metrics[*job, *kinds[0]]
        for kind in kinds:
            problem = _curve_problem(job[1], metrics[*job, *kind], first)
            name = f"{job[0]} {job[1]} {kind[0]}{', compiled' if kind[1] else ''}"
            print(f"  {name}: {problem or 'as the first'}; {_summary(metrics[*job, *kind])}")
            wrong += [f"{name}: {problem}"] if problem else []
    for (attention, precision), report in reports.items():
        print(f"  verify {attention} {precision}: {json.dumps(report)}")
        if not (isinstance(report, dict) and report["agree"]):
            difference = report["first_difference"] if isinstance(report, dict) else report
            wrong.append(f"verify {attention} {precision}: {difference}")
    if wrong:
        raise Failed("; ".join(wrong))
    return "losses of every attention, eager and compiled, are those of sdpa; verify agrees"


def _curve_problem(precision: str, metrics: list[dict[str, Any]] | str, first: list[dict[str, Any]] | str) -> str:
    """Empty if the losses are those of the first run."""
    if isinstance(metrics, str):
        return metrics
    if isinstance(first, str):
        return "nothing to compare with"
    losses, others = ([math.nan if line["loss"] is None else line["loss"] for line in of] for of in (metrics, first))
    errors = [abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True)]
    off = math.nan if any(map(math.isnan, errors)) else max(errors)
    print(f"  {off:.2e} off, of {LOSS_TOLERANCE[precision]:.2e}")
    return "" if off <= LOSS_TOLERANCE[precision] else f"losses are {off:.1e} off"


def _summary(metrics: list[dict[str, Any]] | str) -> str:
    if isinstance(metrics, str):
        return "no losses"
    losses = [line["loss"] for line in metrics]
    return (
        f"loss {losses[0]:.6f} to {losses[-1]:.6f} in {len(losses)} steps, memory {metrics[-1]['memory_bytes']} bytes"
    )


def _verified(attention: str, precision: str) -> dict[str, Any] | str:
    """The report of `meshwright verify`, or why there is none."""
    fields = {"training.attention": attention, "training.precision": precision, "training.batch": "4"}
    command = [*MESHWRIGHT, "verify", "quickstart", "--json", *options({**fields, "training.device": "cuda"})]
    try:
        return json.loads(printed(command, codes=(0, 1)).strip().splitlines()[-1])
    except (Failed, ValueError, IndexError) as error:
        return first_line(error)


def _trained(source: str, precision: str, steps: int, attention: str, compiled: bool) -> list[dict[str, Any]] | str:
    """The metrics of a run, a table a step; or why there are none."""
    fields = {
        "training.attention": attention,
        "training.precision": precision,
        "training.steps": str(steps),
        "training.compile": "true" if compiled else "false",
        "training.device": "cuda",
    }
    try:
        with tempfile.TemporaryDirectory() as runs:
            printed([*MESHWRIGHT, "train", source, "--runs", runs, *options(fields)])
            (metrics,) = Path(runs).glob("*/metrics.jsonl")
            return [json.loads(line) for line in metrics.read_text().splitlines()]
    except Failed as error:
        return first_line(error)


NCCL_PROGRAM = """
import os, torch, torch.distributed as dist
torch.cuda.set_device(0)
dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
x = torch.ones(4, device="cuda")
dist.all_reduce(x)
print("all_reduce", x.tolist(), "in a world of", dist.get_world_size())
dist.destroy_process_group()
"""


def nccl(out: Path) -> str:
    """A world of one, its end and its interruption."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "world_of_one.py"
        program.write_text(NCCL_PROGRAM)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        for what, command in {
            "a collective": [*torchrun, str(program)],
            "5 steps": [
                *(*MESHWRIGHT, "train", "quickstart", "--runs", folder),
                *options({"training.steps": "5", "training.device": "cuda"}),
            ],
            "5 steps by torchrun": [
                *(*torchrun, "-m", "meshwright.training", "quickstart", "--runs", folder),
                *options({"training.steps": "5", "training.device": "cuda"}),
            ],
        }.items():
            try:
                printed(command)
            except Failed as error:
                wrong.append(f"{what}: {first_line(error)}")
            wrong += _left_behind(what)
        wrong += _interrupted(folder)
    if wrong:
        raise Failed("; ".join(wrong))
    return "a collective, 5 steps and Ctrl-C in a world of one end as they should, and leave no process"


def _interrupted(folder: str) -> list[str]:
    fields = {"training.steps": "1000000", "training.device": "cuda"}
    command = [*MESHWRIGHT, "train", "quickstart", "--runs", folder, *options(fields)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step") and len([x for x in lines if x.startswith("step")]) == 5:
            break
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    began = time.monotonic()
    try:
        process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return ["Ctrl-C: did not end within 30 s", *_left_behind("Ctrl-C")]
    seconds = time.monotonic() - began
    print(f"Ctrl-C after {len(lines)} lines: exit code {process.returncode} after {seconds:.1f} s")
    wrong = [] if process.returncode == 130 else [f"Ctrl-C: exit code {process.returncode}, not 130: {lines[-1:]}"]
    return wrong + _left_behind("Ctrl-C")


def _left_behind(what: str) -> list[str]:
    """Ranks that still run."""
    time.sleep(0.5)
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if b"meshwright.training" in words and int(entry.parent.name) != os.getpid():
                found.append(entry.parent.name)
    return [f"{what}: processes {', '.join(found)} are left"] if found else []

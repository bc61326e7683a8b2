"""All that needs a GPU, checked by one script: `python benchmarks/gpu.py [--only NAME ...] [--out DIR] [--seconds N]`.

    environment   versions, the device, and its rate in a large bf16 product
    numerics      tests of the kernels, on tensors of the GPU
    footprint     planned, rehearsed and recorded bytes beside the allocator's; writes OUT/footprint/DEVICE-DATE.json
    agreement     the cases of one device: formula = rehearsal = run; writes OUT/agreement/DEVICE-DATE.json
    flex          tests of FlexAttention behind our operators
    training      losses over 20 steps by attention and compilation, and what `meshwright verify` says
    attention     `meshwright bench attention`: fused kernels
    naive         the same: naive attention, compiled and not
    nccl          a world of one: that it starts, trains, ends, and leaves no process; Ctrl-C exits 130

Stages are processes of their own, one after the other, each with a limit; one that fails stops no other. All they print
goes to OUT/gpu.log; OUT/gpu.json holds how each ended. Records are written anew after each of their parts, so that what
is cut off leaves a true one. It runs from a checkout (`PYTHONPATH=src python3 benchmarks/gpu.py`), without an installed
package. Exit code 1 if a stage failed. The stages themselves are pages of `gpu_stages`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu_stages import kernels, memory, training
from gpu_stages.programs import ROOT, Failed

STAGES: dict[str, tuple[Callable[[Path], str], float]] = {
    "environment": (kernels.environment, 60.0),
    "footprint": (memory.footprint, 120.0),
    "agreement": (memory.agreement, 120.0),
    "numerics": (kernels.numerics, 180.0),
    "flex": (kernels.flex, 60.0),
    "training": (training.training, 180.0),
    "nccl": (training.nccl, 120.0),
    "attention": (kernels.attention, 200.0),
    "naive": (kernels.naive, 120.0),
}
"""In the order in which they run, each with its limit in seconds."""

NOT_REACHED = "the script was cut off before this stage ended"


@dataclass(frozen=True)
class Ended:
    """How a stage ended."""

    stage: str
    status: str
    """ok, failed, timeout or skipped."""
    seconds: float
    last_line: str

    def __str__(self) -> str:
        return f"{self.status:<8} {self.stage:<12} {self.seconds:6.1f} s  {self.last_line}"


def run_stage(name: str, out: Path, seconds: float, log: Path) -> Ended:
    """One stage as a process of its own, all that it starts ended with it."""
    words = [sys.executable, str(Path(__file__).resolve()), "--stage", name, "--out", str(out)]
    began = time.monotonic()
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"\n===== {name} =====\n")
        stream.flush()
        before = stream.tell()
        process = subprocess.Popen(
            words, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, env=_environment(), start_new_session=True
        )
        with _ending(process):
            try:
                status = "failed" if process.wait(timeout=max(1.0, seconds)) else "ok"
            except subprocess.TimeoutExpired:
                status = "timeout"
    said = log.read_bytes()[before:].decode(errors="replace").strip().splitlines()
    return Ended(name, status, time.monotonic() - began, said[-1] if said else "")


@contextmanager
def _ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave nothing of its session behind, also if this program is interrupted."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def main(arguments: list[str]) -> int:
    """0 if every stage that ran is ok."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=re.sub(r"\n\n.*", "", __doc__, flags=re.DOTALL))
    parser.add_argument(
        "--only", nargs="+", choices=[*STAGES], default=[*STAGES], metavar="NAME", help=", ".join(STAGES)
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of logs and records (runs/gpu)")
    parser.add_argument("--seconds", type=float, default=900.0, help="for all stages together (900)")
    parser.add_argument("--stage", choices=[*STAGES], help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.stage:
        return _be_stage(given.stage, given.out)
    given.out = given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    log, deadline, ended = given.out / "gpu.log", time.monotonic() + given.seconds, []
    names = [name for name in STAGES if name in given.only]
    for index, name in enumerate(names):
        _write_ended(given.out, [*ended, *(Ended(later, "skipped", 0.0, NOT_REACHED) for later in names[index:])])
        left = deadline - time.monotonic()
        if left < 5:
            ended.append(Ended(name, "skipped", 0.0, "no time was left"))
        else:
            ended.append(run_stage(name, given.out, min(STAGES[name][1], left), log))
        print(ended[-1], flush=True)
    _write_ended(given.out, ended)
    print("", *ended, sep="\n")
    return 0 if all(one.status == "ok" for one in ended) else 1


def _write_ended(out: Path, ended: list[Ended]) -> None:
    text = json.dumps([asdict(one) for one in ended], indent=1) + "\n"
    (out / "gpu.json").write_text(text, encoding="utf-8")


def _be_stage(name: str, out: Path) -> int:
    try:
        print(STAGES[name][0](out), flush=True)
    except Failed as error:
        print(error, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

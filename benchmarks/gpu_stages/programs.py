"""What the stages share: other programs run and printed, and what is said of a failure."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MESHWRIGHT = (sys.executable, "-m", "meshwright")


class Failed(Exception):
    """A stage found something wrong; its text is the stage's last line."""


def options(fields: dict[str, str]) -> list[str]:
    """On a command line."""
    return [word for name, value in fields.items() for word in (f"--{name}", value)]


def printed(command: list[str], codes: tuple[int, ...] = (0,)) -> str:
    """Run a program, print what it prints as it comes, and return its standard output.

    Raises Failed for another exit code.
    """
    began = time.monotonic()
    print(f"$ {' '.join(command[1:])}", flush=True)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT)
        assert process.stdout is not None
        output = []
        for line in process.stdout:
            print(line, end="", flush=True)
            output.append(line)
        code = process.wait()
        errors.seek(0)
        said = errors.read()
    print(f"{said}[exit code {code}, {time.monotonic() - began:.1f} s]", flush=True)
    if code not in codes:
        lines = (said.strip() or "".join(output).strip()).splitlines()
        raise Failed(f"exit code {code}: {lines[-1] if lines else ''}")
    return "".join(output)


def first_line(error: BaseException, *, last: bool = False) -> str:
    """Of a failure, 300 characters at most."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if last else 0][:300]


def print_traceback() -> None:
    """Of what is being handled, where everything else is printed."""
    traceback.print_exc(file=sys.stdout)


def seconds_on_gpu(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, by events."""
    import statistics

    import torch

    for _ in range(3):
        call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for began, ended in pairs:
        began.record()
        call()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(began.elapsed_time(ended) for began, ended in pairs) / 1000

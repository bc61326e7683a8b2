"""Compile every shipped configuration of the flash kernels for GPUs that are not here, and look at what came out.

    python -m meshwright.bench.flash_compile [TEXT ...]      those whose label contains a text; exit 1 if one is refused

A row for each configuration and compute capability: registers of a thread, bytes that spilled out of them, shared
memory of a block beside what the device gives one, which tensor-core instruction multiplies, seconds to compile.
Refused is what does not compile, asks for more shared memory than there is, or, on Hopper, multiplies 16-bit numbers
without `wgmma`, at half the speed. Spills are reported.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.bench import record

KIB = 1024
SHARED_BYTES = {80: 163 * KIB, 90: 227 * KIB}
"""Shared memory that a block may have, by compute capability (CUDA C++ Programming Guide, technical specifications)."""

INSTRUCTIONS = ("wgmma", "mma")
"""Tensor-core products in PTX, the one that only Hopper has first."""


@dataclass(frozen=True)
class Compiled:
    """What one configuration became."""

    label: str
    capability: int
    seconds: float
    num_warps: int = 0
    registers: int = 0
    """Of a thread; 255 at most."""
    spilled_bytes: int = 0
    """Of a thread: stores of registers to local memory."""
    stack_bytes: int = 0
    shared_bytes: int = 0
    """Of a block."""
    instruction: str = "none"
    """The tensor core's, or `none`."""
    halves: bool = False
    """Whether it multiplies matrices of 16-bit numbers."""
    error: str = ""
    """Of the compiler."""

    @property
    def refused(self) -> str:
        """Why it cannot be shipped; empty if it can."""
        if self.error:
            return self.error
        most = SHARED_BYTES[self.capability]
        if self.shared_bytes > most:
            return f"shared memory of {self.shared_bytes} B > the {most} B of a block: fewer stages or smaller blocks"
        if self.capability >= 90 and self.halves and self.instruction != "wgmma":
            return f"{self.instruction} instead of wgmma: a block of queries needs 64 rows for each four warps"
        return ""

    def row(self) -> dict[str, Any]:
        """Of a record."""
        return record.row(
            kernel=self.label,
            target=f"sm_{self.capability}",
            num_warps=self.num_warps,
            registers=self.registers,
            spilled_bytes=self.spilled_bytes,
            stack_bytes=self.stack_bytes,
            shared_bytes=self.shared_bytes,
            shared_limit_bytes=SHARED_BYTES[self.capability],
            instruction=self.instruction,
            samples=[self.seconds],
            unit="s",
            failed=self.refused,
        )

    def __str__(self) -> str:
        shared = f"{self.shared_bytes / KIB:.0f} of {SHARED_BYTES[self.capability] // KIB} KiB"
        return (
            f"sm_{self.capability}  {self.label:<58} {self.num_warps:>2} warps  "
            f"{self.registers:>3} registers  {self.spilled_bytes:>4} B spilled  {shared:>14}  "
            f"{self.instruction:<5}  {self.seconds:4.1f} s  {self.refused}".rstrip()
        )


def compile_all(labels: Sequence[str] = (), capabilities: Iterable[int] = SHARED_BYTES) -> Iterator[Compiled]:
    """Each configuration whose label contains one of some texts (all of them, if none is given), on all cores."""
    context = multiprocessing.get_context("spawn")  # a process of its own decides whether Triton interprets
    with tempfile.TemporaryDirectory(prefix="meshwright-") as cache:
        workers = min(record.num_cores(), 8)
        with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(cache,)) as pool:
            tasks = [(c, label) for c in capabilities for label in pool.submit(_labels, c).result()]
            chosen = [(c, label) for c, label in tasks if not labels or any(text in label for text in labels)]
            yield from pool.map(compile_one, *zip(*chosen, strict=True)) if chosen else ()


def _begin(cache: str) -> None:
    """Compile, do not interpret; and compile anew."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache


def _labels(capability: int) -> list[str]:
    from meshwright.kernels import flash_sources

    return [label for label, _, _ in flash_sources.sources(capability)]


def compile_one(capability: int, label: str) -> Compiled:
    """In this process, where Triton must not be interpreting."""
    from meshwright.kernels import flash_sources

    (found,) = (rest for name, *rest in flash_sources.sources(capability) if name == label)
    return compile_source(label, capability, *found)


def compile_source(label: str, capability: int, source: Any, options: dict[str, Any]) -> Compiled:
    """Compile one kernel, and once more its PTX by the assembler, which tells what it did."""
    import triton
    from triton.backends.compiler import GPUTarget

    began = time.perf_counter()
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # Triton's own, MLIR's and the assembler's
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Compiled(label, capability, time.perf_counter() - began, error=why[:300])
    seconds, ptx = time.perf_counter() - began, kernel.asm["ptx"]
    registers, spilled, stack = resources(_assembled(ptx))
    return Compiled(
        label,
        capability,
        seconds,
        num_warps=kernel.metadata.num_warps,
        registers=registers,
        spilled_bytes=spilled,
        stack_bytes=stack,
        shared_bytes=kernel.metadata.shared,
        instruction=next((name for name in INSTRUCTIONS if re.search(rf"\b{name}\.", ptx)), "none"),
        halves=re.search(r"dot .*x(bf16|f16)[>,].* \*", kernel.asm["ttgir"]) is not None,
    )


def _assembled(ptx: str) -> str:
    """What NVIDIA's assembler, which comes with Triton, tells of its work."""
    import triton

    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(assembler), "-v", f"--gpu-name={target[1]}", file.name, "-o", os.devnull]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stderr


def resources(log: str) -> tuple[int, int, int]:
    """Registers, bytes spilled and bytes of stack of a thread, from what `ptxas -v` prints."""
    patterns = r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes stack frame"
    registers, spilled, stack = (max(map(int, re.findall(pattern, log)), default=0) for pattern in patterns)
    return registers, spilled, stack


def main(labels: Sequence[str]) -> int:
    """Print a line for each; 1 if one is refused, 2 if there is none."""
    compiled = []
    for one in compile_all(labels):
        compiled.append(one)
        print(one, flush=True)
    if not compiled:
        print(f"no configuration's label contains {' or '.join(labels)}", file=sys.stderr)
        return 2
    return int(any(one.refused for one in compiled))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

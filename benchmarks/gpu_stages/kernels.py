"""The device itself, tests of the kernels on it, and attention timed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from gpu_stages.programs import MESHWRIGHT, Failed, printed, seconds_on_gpu

ATTENTION_COMMANDS: dict[str, tuple[str, ...]] = {
    "attention": ("--grid", "flash", "--tune", "true", "--seconds", "0.12", "--max-seconds", "75"),
    "naive": (
        *("--grid", "naive", "--implementations", "naive,naive-compiled,naive-max-autotune,flash", "--dtypes", "bf16"),
        *("--head-dims", "64", "--seqs", "2048,8192,65536", "--seconds", "0.05", "--max-seconds", "60"),
    ),
}
"""Stages that are `meshwright bench attention`, and its arguments."""

COMPILED_AHEAD = (
    *(
        ("flash", "flex", head_dim, seq)
        for head_dim in (64, 128)
        for seq in (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    ),
    *(("naive", name, 64, seq) for name in ("naive-compiled", "naive-max-autotune") for seq in (2048, 8192)),
)
"""Grid, implementation, width and length of what these stages compile: in turns it would take minutes."""

COMPILE_SECONDS = 30.0


def environment(out: Path) -> str:
    """Versions and device."""
    import platform

    import torch

    with suppress(ImportError):
        import triton

        print("triton", triton.__version__)
    print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
    print("nccl", ".".join(map(str, torch.cuda.nccl.version())), "cudnn", torch.backends.cudnn.version())
    query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
    with suppress(OSError):
        print(subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True).stdout)
    properties = torch.cuda.get_device_properties(0)
    print(properties)
    from meshwright.training.device import known_device

    known = known_device()
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * n**3 / seconds_on_gpu(lambda: a @ b, 20)
    peak = known.peak_flops["bf16"] if known else None
    share = f", {rate / peak:.0%} of the catalog's peak" if peak else ", a device that the catalog does not know"
    return f"{torch.cuda.get_device_name()}: {rate / 1e12:.0f} TFLOP/s in bf16 products of {n}{share}"


def numerics(out: Path) -> str:
    """The kernels' own tests."""
    return _tested("tests/kernels/test_flash_gpu.py")


def flex(out: Path) -> str:
    """FlexAttention behind our operators."""
    return _tested("tests/kernels/test_flex.py")


def _tested(path: str) -> str:
    options = ["-v", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-W", "default", "-n", str(os.cpu_count())]
    text = printed([sys.executable, "-m", "pytest", path, *options])
    summary = text.strip().splitlines()[-1]
    if "passed" not in summary:
        raise Failed(f"no test ran on the GPU: {summary}")
    return summary


def attention(out: Path) -> str:
    """Fused kernels, a causal grid of the lengths that people train with."""
    compile_ahead()
    return _bench_attention("attention", out)


def naive(out: Path) -> str:
    """Naive attention, compiled and not, beside ours."""
    return _bench_attention("naive", out)


def compile_ahead() -> None:
    """Fill the compiler's cache on disk, all at once."""
    alone = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    began, compiling = time.monotonic(), []
    for grid, name, head_dim, seq in COMPILED_AHEAD:
        command = [*MESHWRIGHT, "bench", "attention", "--grid", grid, "--implementations", name, "--repeats", "1"]
        command += ["--dtypes", "bf16", "--head-dims", str(head_dim), "--seqs", str(seq), "--matmul-size", "16"]
        compiling.append(subprocess.Popen(command, env=alone, **quiet))
    for process in compiling:
        try:
            process.wait(timeout=max(0.0, began + COMPILE_SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    print(f"compiled ahead in {time.monotonic() - began:.0f} s", flush=True)


def _bench_attention(name: str, out: Path) -> str:
    printed([*MESHWRIGHT, "bench", "attention", *ATTENTION_COMMANDS[name], "--out", str(out)])
    return "every cell was measured, or says why not"

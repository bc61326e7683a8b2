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
goes to OUT/gpu.log; OUT/gpu.json holds how each ended. It runs from a checkout (`PYTHONPATH=src python3
benchmarks/gpu.py`), without an installed package. Exit code 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MESHWRIGHT = (sys.executable, "-m", "meshwright")

LIMITS = {
    "environment": 60.0,
    "footprint": 120.0,
    "agreement": 120.0,
    "numerics": 180.0,
    "flex": 60.0,
    "training": 180.0,
    "nccl": 120.0,
    "attention": 200.0,
    "naive": 120.0,
}
"""Seconds of each stage, in the order in which they run."""

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

FOOTPRINTS: dict[str, tuple[str, dict[str, str]]] = {
    "quickstart": ("quickstart", {}),
    "quickstart bf16": ("quickstart", {"training.precision": "bf16"}),
    "small": ("small", {}),
    "small bf16": ("small", {"training.precision": "bf16"}),
    "small bf16, loss in chunks": ("small", {"training.precision": "bf16", "training.loss_chunk": "512"}),
    "small bf16, recompute full": ("small", {"training.precision": "bf16", "layout.recompute": "full"}),
}
"""Jobs whose memory is compared with the allocator's, and what is set in them."""

CURVES: dict[tuple[str, str, int], tuple[tuple[str, bool], ...]] = {
    ("quickstart", "float32", 20): (("sdpa", False), ("sdpa", True), ("flash", False)),
    ("quickstart", "bf16", 20): (("sdpa", False), ("flash", False), ("flash", True)),
    ("small", "bf16", 6): (("sdpa", False), ("flash", False)),
}
"""Job, precision and steps; and the runs of it, by attention and whether compiled: all are compared with the first."""

VERIFIED = (("sdpa", "float32"), ("sdpa", "bf16"), ("flash", "float32"), ("flash", "bf16"))
"""Attention and precision."""

COMPILE_SECONDS = 30.0

AT_ONCE = 4
"""Programs of the stage `training` that share the GPU: nothing is timed there."""

LOSS_TOLERANCE = {"float32": 2e-6, "bf16": 2.0**-9}
"""Relative, between losses of the same step."""


class Failed(Exception):
    """A stage found something wrong; its text is the stage's last line."""


# --- stages -----------------------------------------------------------------------------------------------------------


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
    rate = 2 * n**3 / _seconds_on_gpu(lambda: a @ b, 20)
    peak = known.peak_flops["bf16"] if known else None
    share = f", {rate / peak:.0%} of the catalog's peak" if peak else ", a device that the catalog does not know"
    return f"{torch.cuda.get_device_name()}: {rate / 1e12:.0f} TFLOP/s in bf16 products of {n}{share}"


def _seconds_on_gpu(call: Callable[[], Any], repeats: int) -> float:
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


def numerics(out: Path) -> str:
    """The kernels' own tests."""
    return _tested("tests/kernels/test_flash_gpu.py")


def flex(out: Path) -> str:
    """FlexAttention behind our operators: until these pass, nobody trains with it (`training.device`)."""
    return _tested("tests/kernels/test_flex.py")


def _tested(path: str) -> str:
    options = ["-v", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-W", "default", "-n", str(os.cpu_count())]
    text = _printed([sys.executable, "-m", "pytest", path, *options])
    summary = text.strip().splitlines()[-1]
    if "passed" not in summary:
        raise Failed(f"no test ran on the GPU: {summary}")
    return summary


def footprint(out: Path) -> str:
    """A row for each category and job.

    Under expandable segments the allocator splits off what is left over of any block; else up to 1 MiB of each stays
    unsplit, which is 3 % of the peak of a model as small as quickstart.
    """
    import gc

    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

    import torch

    from meshwright.bench import footprint as bench
    from meshwright.bench import record

    rows, device = [], torch.cuda.get_device_name()
    for name, (source, settings) in FOOTPRINTS.items():
        job = _job(source, settings)
        try:
            found = bench.compare(name, job)
        except Exception as error:  # whatever it is, the other jobs are measured
            _print_traceback()
            found = [record.row(job=name, failed=f"{type(error).__name__}: {_first_line(error)}")]
        rows += found
        for row in found:
            print(json.dumps(row))
        print(*_footprint_lines(name, found), sep="\n", flush=True)
        try:
            _explain(name, job)
        except Exception:  # an explanation is no result
            _print_traceback()
        gc.collect()
        torch.cuda.empty_cache()
    print(record.write("footprint", "python benchmarks/gpu.py --only footprint", rows, device, out))
    failed = [f"{row['job']} {row.get('category', '')}" for row in rows if "failed" in row]
    if failed:
        raise Failed(f"{len(failed)} of {len(rows)} rows differ: {'; '.join(failed)}")
    errors = [abs(row["relative_error"]) for row in rows if row["category"] == "peak"]
    return f"{len(rows)} rows agree; peaks at most {max(errors):.2%} off the allocator's"


def _footprint_lines(name: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if "category" not in row:
            yield f"  {name}: {row['failed']}"
        elif row["category"] == "peak":
            places = [f"{row[f'{which}site']} in {row[f'{which}phase']}" for which in ("peak_", "run_peak_")]
            yield (
                f"  {name} peak: formula {row['formula_bytes']}, rehearsed {row['rehearsed_bytes']} at {places[0]}, "
                f"run {row['run_bytes']} at {places[1]}"
            )
            yield (
                f"    requested {row['requested_bytes']} (unseen {row['unseen_bytes']}), allocated "
                f"{row['allocated_bytes']}: {row['relative_error']:+.3%}, rounded {row['rounded_relative_error']:+.3%}"
            )
            yield f"    workspaces {row['workspaces_bytes']}, context {row['device_context_bytes']}"
        else:
            yield (
                f"  {name} {row['category']}: rehearsed {row['rehearsed_bytes']}, run {row['run_bytes']}, requested "
                f"{row['requested_bytes']} in {row['storages']} storages, rounding {row['rounding_bytes']}, unsplit "
                f"{row['unsplit_bytes']}"
            )


def _explain(name: str, job: Any) -> None:
    """Print where a step waits for the GPU, and what is alive at the allocator's peak of one, by who asked for it."""
    import warnings

    import torch

    from meshwright.comm.mesh import World
    from meshwright.training.step import State, step
    from meshwright.verify.observe import own_batch, own_device

    job = replace(job, training=replace(job.training, device="cuda"))
    world = World.single(own_device(job))
    state, batch = State.create(job, world), own_batch(job, 0, world.device)
    for _ in range(2):
        step(state, batch, world)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(state, batch, world)
    torch.cuda.set_sync_debug_mode("default")
    places = {f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)}
    print(f"  {name}: the host waits for the GPU at {', '.join(sorted(places)) or 'no place'} of a step")
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(max_entries=500_000, stacks="python")
    step(state, batch, world)
    torch.cuda.synchronize()
    events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    torch.cuda.memory._record_memory_history(None)
    seconds = _seconds_on_gpu(lambda: step(state, batch, world), 5)
    print(f"  {name}: a step takes {seconds * 1e3:.2f} ms; alive at the peak of one, of what it made itself:")
    for size, count, place in alive_at_peak(events)[:12]:
        print(f"    {size:>12}  {count:>4}  {place}")


def alive_at_peak(events: list[dict[str, Any]]) -> list[tuple[int, int, str]]:
    """(bytes, blocks, who) of what was allocated in a history of the allocator and alive at its highest level."""
    level = highest = 0
    alive: dict[int, tuple[int, str]] = {}
    best: dict[int, tuple[int, str]] = {}
    for event in events:
        if event["action"] == "alloc":
            alive[event["addr"]] = (event["size"], _who(event.get("frames", ())))
            level += event["size"]
            if level > highest:
                highest, best = level, dict(alive)
        elif event["action"] == "free_completed":
            level -= event["size"]  # also of what was there before
            alive.pop(event["addr"], None)
    sums: dict[str, tuple[int, int]] = {}
    for size, who in best.values():
        before = sums.get(who, (0, 0))
        sums[who] = (before[0] + size, before[1] + 1)
    return sorted(((size, count, who) for who, (size, count) in sums.items()), reverse=True)


def _who(frames: Any) -> str:
    own = [f for f in frames if "/meshwright/" in f["filename"] and "/audit/" not in f["filename"]]
    frame = own[0] if own else (frames[0] if frames else None)
    return f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}" if frame else "outside of Python"


def agreement(out: Path) -> str:
    """A row for each case of one device that CUDA can run."""
    import torch

    from meshwright.bench import record
    from meshwright.comm.ranks import RankError, Ranks
    from meshwright.verify.agreement import check
    from meshwright.verify.matrix import all_cases, all_long_cases

    cases = [case for case in (*all_cases(), *all_long_cases()) if case.job.layout.world == 1]
    able = [case for case in cases if case.job.training.documents == "joined"]
    rows, differing = [], []
    ranks = Ranks(1, timeout_seconds=60, on_gpus=True)
    for case in able:
        if not ranks.alive:
            ranks = Ranks(1, timeout_seconds=60, on_gpus=True)
        try:
            found = check(case, ranks)
            rows.append(record.row(**found.to_json(), failed="" if found.agrees else "does not agree"))
            said = [f"{sources}: {difference.to_json()}" for _, sources, difference in found.differences]
        except (RankError, RuntimeError) as error:
            rows.append(record.row(**case._asdict(), failed=_first_line(error, last=True)))
            said = [str(error)]
        if "failed" in rows[-1]:
            differing.append(str(case))
        print("DIFFERS" if said else "agrees ", case, *said, sep="\n    " if said else "  ", flush=True)
    ranks.close()
    print(
        record.write("agreement", "python benchmarks/gpu.py --only agreement", rows, torch.cuda.get_device_name(), out)
    )
    skipped = f"; {len(cases) - len(able)} with separate documents need a CPU"
    if differing:
        raise Failed(f"{len(differing)} of {len(able)} cases differ, the first {differing[0]}{skipped}")
    return f"{len(able)} of {len(able)} cases of one device agree{skipped}"


def training(out: Path) -> str:
    """Loss curves and `verify`; whatever fails is named, the rest runs."""
    from concurrent.futures import ThreadPoolExecutor

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
    command = [*MESHWRIGHT, "verify", "quickstart", "--json", *_options({**fields, "training.device": "cuda"})]
    try:
        return json.loads(_printed(command, codes=(0, 1)).strip().splitlines()[-1])
    except (Failed, ValueError, IndexError) as error:
        return _first_line(error)


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
            _printed([*MESHWRIGHT, "train", source, "--runs", runs, *_options(fields)])
            (metrics,) = Path(runs).glob("*/metrics.jsonl")
            return [json.loads(line) for line in metrics.read_text().splitlines()]
    except Failed as error:
        return _first_line(error)


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
    _printed([*MESHWRIGHT, "bench", "attention", *ATTENTION_COMMANDS[name], "--out", str(out)])
    return "every cell was measured, or says why not"


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
                *_options({"training.steps": "5", "training.device": "cuda"}),
            ],
            "5 steps by torchrun": [
                *(*torchrun, "-m", "meshwright.training", "quickstart", "--runs", folder),
                *_options({"training.steps": "5", "training.device": "cuda"}),
            ],
        }.items():
            try:
                _printed(command)
            except Failed as error:
                wrong.append(f"{what}: {_first_line(error)}")
            wrong += _left_behind(what)
        wrong += _interrupted(folder)
    if wrong:
        raise Failed("; ".join(wrong))
    return "a collective, 5 steps and Ctrl-C in a world of one end as they should, and leave no process"


def _interrupted(folder: str) -> list[str]:
    fields = {"training.steps": "1000000", "training.device": "cuda"}
    command = [*MESHWRIGHT, "train", "quickstart", "--runs", folder, *_options(fields)]
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


STAGES: dict[str, Callable[[Path], str]] = {
    "environment": environment,
    "footprint": footprint,
    "agreement": agreement,
    "numerics": numerics,
    "flex": flex,
    "training": training,
    "nccl": nccl,
    "attention": attention,
    "naive": naive,
}


# --- what they share --------------------------------------------------------------------------------------------------


def _job(source: str, settings: dict[str, str]) -> Any:
    from meshwright.config.files import load_job

    return load_job(source, [*settings.items(), ("training.device", "cuda")])


def _options(fields: dict[str, str]) -> list[str]:
    return [word for name, value in fields.items() for word in (f"--{name}", value)]


def _printed(command: list[str], codes: tuple[int, ...] = (0,)) -> str:
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


def _first_line(error: BaseException, *, last: bool = False) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if last else 0][:300]


def _print_traceback() -> None:
    import traceback

    traceback.print_exc(file=sys.stdout)


# --- running them -----------------------------------------------------------------------------------------------------


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
    for name in (name for name in STAGES if name in given.only):
        left = deadline - time.monotonic()
        if left < 5:
            ended.append(Ended(name, "skipped", 0.0, "no time was left"))
        else:
            ended.append(run_stage(name, given.out, min(LIMITS[name], left), log))
        print(ended[-1], flush=True)
        (given.out / "gpu.json").write_text(
            json.dumps([asdict(one) for one in ended], indent=1) + "\n", encoding="utf-8"
        )
    print("", *ended, sep="\n")
    return 0 if all(one.status == "ok" for one in ended) else 1


def _be_stage(name: str, out: Path) -> int:
    try:
        print(STAGES[name](out), flush=True)
    except Failed as error:
        print(error, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

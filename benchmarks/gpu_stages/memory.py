"""Memory and agreement: what was planned, rehearsed and run, beside what CUDA's allocator says.

Their records are written anew after each job or case, so that a stage that is cut off leaves a true one.
"""

from __future__ import annotations

import gc
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_stages.programs import Failed, first_line, print_traceback, seconds_on_gpu

FOOTPRINTS: dict[str, tuple[str, dict[str, str]]] = {
    "quickstart": ("quickstart", {}),
    "quickstart bf16": ("quickstart", {"training.precision": "bf16"}),
    "small": ("small", {}),
    "small bf16": ("small", {"training.precision": "bf16"}),
    "small bf16, loss in chunks": ("small", {"training.precision": "bf16", "training.loss_chunk": "512"}),
    "small bf16, recompute full": ("small", {"training.precision": "bf16", "layout.recompute": "full"}),
}
"""Jobs whose memory is compared with the allocator's, and what is set in them."""

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"


def footprint(out: Path) -> str:
    """A row for each category and job.

    Under expandable segments the allocator splits off what is left over of any block; else up to 1 MiB of each stays
    unsplit, which is 3 % of the peak of a model as small as quickstart.
    """
    os.environ.setdefault(ALLOCATOR, "expandable_segments:True")

    import torch

    from meshwright.bench import footprint as bench
    from meshwright.bench import record

    command = f"{ALLOCATOR}={os.environ[ALLOCATOR]} python benchmarks/gpu.py --only footprint"
    grown = record.Growing("footprint", command, torch.cuda.get_device_name(), out)
    rows: list[dict[str, Any]] = []
    left = [record.not_reached(job=name) for name in FOOTPRINTS]
    grown.write(left)
    for name, (source, settings) in FOOTPRINTS.items():
        job = _job(source, settings)
        try:
            found = bench.compare(name, job)
        except Exception as error:  # whatever it is, the other jobs are measured
            print_traceback()
            found = [record.row(job=name, failed=f"{type(error).__name__}: {first_line(error)}")]
        rows += found
        left.pop(0)
        grown.write([*rows, *left])
        for row in found:
            print(json.dumps(row))
        print(*_footprint_lines(name, found), sep="\n", flush=True)
        try:
            _explain(name, job)
        except Exception:  # an explanation is no result
            print_traceback()
        gc.collect()
        torch.cuda.empty_cache()
    print(grown.path)
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
    import torch

    from meshwright.comm.mesh import World
    from meshwright.comm.torch_private import allocations
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
    with allocations() as events:
        step(state, batch, world)
        torch.cuda.synchronize()
    seconds = seconds_on_gpu(lambda: step(state, batch, world), 5)
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
    grown = record.Growing("agreement", "python benchmarks/gpu.py --only agreement", torch.cuda.get_device_name(), out)
    left = [record.not_reached(**case._asdict()) for case in able]
    grown.write(left)
    rows: list[dict[str, Any]] = []
    differing = []
    ranks = Ranks(1, timeout_seconds=60, on_gpus=True)
    for case in able:
        if not ranks.alive:
            ranks = Ranks(1, timeout_seconds=60, on_gpus=True)
        try:
            found = check(case, ranks)
            rows.append(record.row(**found.to_json(), failed="" if found.agrees else "does not agree"))
            said = [f"{sources}: {difference.to_json()}" for _, sources, difference in found.differences]
        except (RankError, RuntimeError) as error:
            rows.append(record.row(**case._asdict(), failed=first_line(error, last=True)))
            said = [str(error)]
        if "failed" in rows[-1]:
            differing.append(str(case))
        left.pop(0)
        grown.write([*rows, *left])
        print("DIFFERS" if said else "agrees ", case, *said, sep="\n    " if said else "  ", flush=True)
    ranks.close()
    print(grown.path)
    skipped = f"; {len(cases) - len(able)} with separate documents need a CPU"
    if differing:
        raise Failed(f"{len(differing)} of {len(able)} cases differ, the first {differing[0]}{skipped}")
    return f"{len(able)} of {len(able)} cases of one device agree{skipped}"


def _job(source: str, settings: dict[str, str]) -> Any:
    from meshwright.config.files import load_job

    return load_job(source, [*settings.items(), ("training.device", "cuda")])

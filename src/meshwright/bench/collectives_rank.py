"""What one rank does in `bench collectives`; also a program, one rank of it under any launcher of torch's:

    torchrun --nnodes H --nproc-per-node R ... -m meshwright.bench.collectives_rank [--device cuda] [--out FILE] ...

Rank 0 writes a line of JSON for each case: an operation of `comm.collectives.Axis` on float32 tensors of one payload,
in groups of one tier. `intra` groups are the ranks of a host, `inter` groups take one rank of each host; all groups of
a tier work at once, as in training. Nothing here judges or converts: bandwidths and fits are `bench.collectives`'s.

A sample lasts from a barrier of all ranks to the next, on the rank where that is longest, over the number of calls that
follow each other in between: one where it is slow, many where they are fast. So it has in it all that the groups which
share a link sent, however unequal their turns. What a link of limited rate lets pass at once after a pause (a token
bucket's burst, in the lab 1 to 3 ms worth) is a small part of it, and so is the barrier. A few calls are
tried first, to know how many a sample needs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist

from meshwright.comm.collectives import Axis
from meshwright.comm.mesh import World
from meshwright.config.tree import Job, Layout, Training
from meshwright.training import group, process

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "shift")
TIERS = {"intra": "tensor", "inter": "replicate"}
"""Tier → the mesh axis whose groups are it: rank order has `tensor` innermost."""

SIZES = tuple(4**power for power in range(5, 15))
"""1 KiB to 256 MiB."""

SITE = "bench"
ITEM_BYTES = 4
LEAST_SAMPLES = 3
SAMPLE_SECONDS = 0.1
"""Calls that are faster share a sample, which lasts about so long."""
MOST_CALLS = 128
TRIAL_SECONDS = 0.02
MOST_TRIES = 16
"""Calls that are tried first, one by one; they open connections, and tell how many calls make a sample."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The cases of one world, and what they may cost."""

    hosts: int = 1
    ranks_per_host: int = 1
    sizes: tuple[int, ...] = SIZES
    """Payloads in bytes, ascending; each is rounded up to whole elements for every rank of its group."""
    samples: int = 15
    """The most samples of a case."""
    seconds: float = 60.0
    """For all cases. Sizes that would not fit into what is left are skipped."""

    @property
    def layout(self) -> Layout:
        """The ranks of a host are neighbours."""
        return Layout(replicate=self.hosts, tensor=self.ranks_per_host)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one size in the groups of one tier: its samples, or why there are none."""

    tier: str
    operation: str
    group_size: int
    payload_bytes: int
    samples: tuple[float, ...] = ()
    """Seconds of a call on the slowest rank."""
    calls: int = 0
    """Calls of which each sample is the mean."""
    skipped: str = ""


def measure_pool(grid: Grid) -> list[Case]:
    """`measure` on a CPU rank whose process group is there. Collective over its ranks."""
    return measure(grid, World.create(grid.layout, torch.device("cpu")))


def measure(grid: Grid, world: World) -> list[Case]:
    """All cases of a grid, the same on every rank. Collective over the world."""
    axes = {tier: world.axes[axis] for tier, axis in TIERS.items() if world.axes[axis].size > 1}
    cases: list[Case] = []
    left = grid.seconds
    for index, (tier, axis) in enumerate(axes.items()):
        clock = _Clock(left / (len(axes) - index), world.device)
        cases += _cases(grid, tier, axis, clock)
        left -= clock.spent
    return cases


class _Clock:
    """Seconds that all ranks agree on, so that all take the same decisions."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.device = device
        self.seconds = seconds
        self.spent = 0.0
        self._began = time.perf_counter()

    @property
    def left(self) -> float:
        """Seconds, as of the last agreement."""
        return self.seconds - self.spent

    def slowest(self, samples: Sequence[float]) -> tuple[float, ...]:
        """The largest of all ranks, sample by sample. Collective; renews `spent`."""
        values = torch.tensor([*samples, time.perf_counter() - self._began], dtype=torch.float64, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        *slowest, self.spent = values.tolist()
        return tuple(slowest)


def _cases(grid: Grid, tier: str, axis: Axis, clock: _Clock) -> Iterator[Case]:
    """The cases of one tier by size, so that time that ends early leaves the same sizes of every operation."""
    expected: dict[str, float] = {}  # at the most: the seconds of the size before × what this one has more
    before = grid.sizes[0]
    for index, size in enumerate(grid.sizes):
        payload = _rounded(size, axis.size)
        expected = {operation: seconds * size / before for operation, seconds in expected.items()}
        before = size
        least = sum(expected.values()) * (1 + LEAST_SAMPLES)
        if clock.left < least:
            reason = f"{least:.1f} s for {1 + LEAST_SAMPLES} calls of each operation, {max(0, clock.left):.1f} s left"
            for operation in OPERATIONS:
                yield Case(tier=tier, operation=operation, group_size=axis.size, payload_bytes=payload, skipped=reason)
            continue
        for number, operation in enumerate(OPERATIONS):
            call = _call(operation, axis, payload, clock.device)
            share = clock.left / ((len(grid.sizes) - index) * len(OPERATIONS) - number)
            tries = _clamp(TRIAL_SECONDS / expected.get(operation, TRIAL_SECONDS / MOST_TRIES), MOST_TRIES)
            trial = clock.slowest(_timed(call, clock.device, tries, 1))
            samples, calls = plan(trial, share, grid.samples)
            found = clock.slowest(_timed(call, clock.device, samples, calls))
            expected[operation] = statistics.median(found)
            yield Case(
                tier=tier,
                operation=operation,
                group_size=axis.size,
                payload_bytes=payload,
                samples=found,
                calls=calls,
            )


def plan(trial: Sequence[float], share_seconds: float, most_samples: int) -> tuple[int, int]:
    """(samples, calls of each) from the seconds of calls that were tried, in about a case's share of time.

    As many calls as make even the fastest fill a sample, as a short one would be a burst of the link; fewer only where
    not even the least number of samples would be affordable.
    """
    least, affordable = min(LEAST_SAMPLES, most_samples), share_seconds / statistics.median(trial)
    calls = _clamp(min(SAMPLE_SECONDS / min(trial), affordable / least), MOST_CALLS)
    return max(least, _clamp(affordable / calls, most_samples)), calls


def _clamp(value: float, most: int) -> int:
    """A whole number of at least 1."""
    return int(max(1, min(most, value)))


def _rounded(size: int, ranks: int) -> int:
    """The least payload of at least so many bytes that is the same number of elements for each rank."""
    return -(-size // (ranks * ITEM_BYTES)) * ranks * ITEM_BYTES


def _call(operation: str, axis: Axis, payload_bytes: int, device: torch.device) -> Callable[[], object]:
    """One call from issue to result; each makes its output, as in training. Zeros: sums stay what they are."""
    elements = payload_bytes // ITEM_BYTES // (axis.size if operation == "all_gather" else 1)
    tensor = torch.empty(elements, device=device).fill_(0.0)  # not zeros(), whose pages would all be one
    if operation == "all_to_all":
        tensor = tensor.view(axis.size, -1)
    issue = partial(getattr(axis, operation), tensor, site=SITE, phase="control")
    if operation == "shift":
        issue = partial(issue, send_to=(axis.rank + 1) % axis.size, receive_from=(axis.rank - 1) % axis.size)
    return lambda: issue().wait()


def _timed(call: Callable[[], object], device: torch.device, samples: int, calls: int) -> list[float]:
    """Seconds of a call as this rank sees it, the mean of so many and a barrier. Collective over the world."""
    dist.barrier()
    marks = [_now(device)]
    for _ in range(samples):
        for _ in range(calls):
            call()
        dist.barrier()
        marks.append(_now(device))
    return [(end - begin) / calls for begin, end in pairwise(marks)]


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- the program ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """This rank, to its end; returns its exit code."""
    options = _parser().parse_args(arguments)
    process.end_on_signals()
    place = process.Place.of(os.environ)
    grid = Grid(
        hosts=place.world // place.local_world,
        ranks_per_host=place.local_world,
        sizes=tuple(sorted(int(size) for size in options.sizes.split(","))),
        samples=options.samples,
        seconds=options.seconds,
    )
    training = Training(device=options.device, timeout_seconds=max(60.0, 2 * options.seconds))
    try:
        with group.joined(Job(layout=grid.layout, training=training), place) as world:
            cases = measure(grid, world)
            if place.rank == 0:
                with options.out.open("w", encoding="utf-8") if options.out else nullcontext(sys.stdout) as file:
                    file.writelines(json.dumps(asdict(case)) + "\n" for case in cases)
            dist.barrier()  # nobody leaves while another still measures or writes
    except process.Ended as ended:
        return ended.exit_code
    return 0


def read_cases(text: str) -> list[Case]:
    """What rank 0 wrote."""
    found = [json.loads(line) for line in text.splitlines()]
    return [Case(**{**case, "samples": tuple(case["samples"])}) for case in found]


def _parser() -> argparse.ArgumentParser:
    grid = Grid()
    parser = argparse.ArgumentParser(prog="python -m meshwright.bench.collectives_rank", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: gloo. cuda: NCCL")
    parser.add_argument("--sizes", default=",".join(map(str, grid.sizes)), help="payloads in bytes, between commas")
    parser.add_argument("--samples", type=int, default=grid.samples, help="the most samples of a case")
    parser.add_argument("--seconds", type=float, default=grid.seconds, help="for all cases")
    parser.add_argument("--out", type=Path, help="file that rank 0 writes; without it, stdout")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

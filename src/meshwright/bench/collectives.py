"""Collectives measured: latency, bandwidths, and the two constants of each operation and tier.

    meshwright bench collectives [--quick]                          gloo ranks of this machine (NCCL where it has GPUs)
    meshwright bench collectives --lab-hosts 2 --lab-rate 400mbit   hosts of an emulated cluster

`bench.collectives_rank` says what is timed and how. Of the median seconds of a call on the slowest rank:

    algorithm bandwidth   payload / seconds
    bus bandwidth         wire bytes / seconds, by the convention of the account
    link bandwidth        bus bandwidth × the backend's factor: what a rank really sends

Link bandwidth cannot be above the rate of the link; where that is known, in the lab, it is the row's limit, as the
least seconds that a call may take. The ranks of a host share its links, so the limit of each is its part of the rate.
A row of kind `fit` has α and β of one operation and tier, over all its sizes (`bench.fit`).
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from meshwright.account import wire_bytes
from meshwright.bench import record
from meshwright.bench.collectives_rank import OPERATIONS, SIZES, TIERS, Case, Grid, measure_pool, read_cases
from meshwright.bench.fit import fit
from meshwright.comm.ranks import BYTES_OF_A_RANK, RankError, Ranks, available_memory
from meshwright.config.backends import backend_factor
from meshwright.errors import UserError
from meshwright.units import format_bytes

Backend = Literal["gloo", "nccl"]

NOTE = "all ranks share the cores of this machine, a thread each: latencies and unlimited links are not a cluster's"
START_SECONDS = 120.0
"""What starting ranks may take, beside the seconds of measuring."""
BUFFERS = 4
"""Copies of the payload that a rank holds at most: input, output, and the backend's own."""
MOST_RANKS = 64


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured, where, and for how long."""

    worlds: tuple[int, ...] = (2, 4)
    """Numbers of ranks on this machine, one after the other; without a meaning in the lab."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """auto: gloo on CPUs, and NCCL wherever each rank has a GPU."""
    max_bytes: int = SIZES[-1]
    every: int = 1
    """2 leaves out every second size."""
    samples: int = 15
    max_seconds: float = 60.0
    lab_hosts: int = 0
    """Hosts of an emulated cluster; 0 measures this machine."""
    lab_ranks: int = 1
    lab_rate: str = "400mbit"
    lab_intra_rate: str = ""
    """Rate of the links between ranks of one host; empty is unlimited."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Payloads, ascending."""
        return tuple(size for size in SIZES[:: self.every] if size <= self.max_bytes)

    def command(self) -> str:
        """What measures it again."""
        here = f"--worlds {','.join(map(str, self.worlds))} --backend {self.backend}"
        quick = "--quick " if self.every > 1 else ""
        limits = f"{quick}--max-bytes {self.max_bytes} --samples {self.samples} --max-seconds {self.max_seconds:g}"
        return f"meshwright bench collectives {self.lab_options() if self.lab_hosts else here} {limits}"

    def lab_options(self) -> str:
        """Those that describe the emulated cluster."""
        intra = f" --lab-intra-rate {self.lab_intra_rate}" if self.lab_intra_rate else ""
        return f"--lab-hosts {self.lab_hosts} --lab-ranks {self.lab_ranks} --lab-rate {self.lab_rate}{intra}"


QUICK = Setting(worlds=(2,), backend="gloo", max_bytes=4 * 2**20, every=2, samples=5, max_seconds=6.0)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Ranks that are measured together."""

    backend: Backend
    hosts: int = 1
    ranks_per_host: int
    where: str = "this machine"
    rates: dict[str, float] = field(default_factory=dict)
    """Tier → the most bytes per second that its links let one rank send, where that is known."""

    @property
    def ranks(self) -> int:
        """Of all hosts."""
        return self.hosts * self.ranks_per_host

    def groups(self) -> dict[str, int]:
        """Tier → ranks of a group, for the tiers that there are."""
        sizes = {"intra": self.ranks_per_host, "inter": self.hosts}
        return {tier: sizes[tier] for tier in TIERS if sizes[tier] > 1}

    def about(self) -> dict[str, Any]:
        """Settings of every row."""
        return {
            "where": self.where,
            "backend": self.backend,
            "ranks": self.ranks,
            "hosts": self.hosts,
            "ranks_per_host": self.ranks_per_host,
        }


def measure(setting: Setting) -> list[dict[str, Any]]:
    """For each place a row a case, then a row a fit. Raises UserError, before any rank starts, for a bad setting."""
    check(setting)
    rows = []
    places = _places(setting)
    for place in places:
        sizes = tuple(size for size in setting.sizes if size <= _most_bytes(place.ranks, available_memory()))
        grid = Grid(
            hosts=place.hosts,
            ranks_per_host=place.ranks_per_host,
            sizes=sizes,
            samples=setting.samples,
            seconds=setting.max_seconds / len(places),
        )
        try:
            cases = _run(place, setting, grid)
        except RankError as error:
            reason = f"rank {error.rank}: {error.reason.strip().splitlines()[-1]}"
            rows.append(record.row(**place.about(), note=NOTE, failed=reason))
            continue
        too_large = [size for size in setting.sizes if size not in sizes]
        rows += rows_of(place, [*cases, *_without_memory(place, too_large)])
    return rows


# --- what can be measured ---------------------------------------------------------------------------------------------


def check(setting: Setting) -> None:
    """Raise UserError with a line for each mistake."""
    if mistakes := list(_mistakes(setting)):
        raise UserError("\n".join(mistakes))


def _mistakes(setting: Setting) -> Iterator[str]:
    for world in setting.worlds:
        if not 2 <= world <= MOST_RANKS:
            yield f"--worlds has {world} (a collective needs 2 ranks, this machine runs at most {MOST_RANKS}): use 2,4"
    if setting.max_bytes < SIZES[0]:
        yield f"--max-bytes = {setting.max_bytes} is below the smallest payload, {SIZES[0]} bytes: use {SIZES[-1]}"
    if setting.samples < 1:
        yield f"--samples = {setting.samples} is not a whole number above 0"
    if setting.max_seconds <= 0:
        yield f"--max-seconds = {setting.max_seconds:g} is not a number above 0"
    if setting.lab_hosts:
        ranks = setting.lab_hosts * setting.lab_ranks
        if setting.lab_hosts < 2 or setting.lab_ranks < 1 or ranks > MOST_RANKS:
            yield (
                f"--lab-hosts {setting.lab_hosts} × --lab-ranks {setting.lab_ranks} is not a cluster of at least 2 "
                f"hosts with at least 1 rank each, and at most {MOST_RANKS} ranks in all: use --lab-hosts 2"
            )
        if setting.backend == "nccl":
            yield "--backend = nccl does not run in the lab (its hosts have CPU ranks): use gloo"
    elif setting.backend == "nccl" and (gpus := _num_gpus()) < max(setting.worlds, default=0):
        yield (
            f"--backend = nccl, but this machine has {gpus} GPUs for {max(setting.worlds)} ranks (each rank needs its "
            "own): use --backend gloo, or smaller --worlds"
        )


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _places(setting: Setting) -> list[Place]:
    if setting.lab_hosts:
        return [_lab_place(setting)]
    gpus = _num_gpus() if setting.backend != "gloo" else 0
    backends: dict[Backend, bool] = {"gloo": setting.backend != "nccl", "nccl": setting.backend != "gloo"}
    return [
        Place(backend=backend, ranks_per_host=world)
        for backend, wanted in backends.items()
        for world in setting.worlds
        if wanted and (backend == "gloo" or world <= gpus)
    ]


def _lab_place(setting: Setting) -> Place:
    """Raises UserError for a rate that is none. All ranks of a host send at once, over its one link of each tier."""
    from meshwright.lab import rate_bytes_per_second

    rates = {"intra": setting.lab_intra_rate, "inter": setting.lab_rate}
    limited = {tier: rate for tier, rate in rates.items() if rate}
    return Place(
        backend="gloo",
        hosts=setting.lab_hosts,
        ranks_per_host=setting.lab_ranks,
        where=f"lab ({', '.join(f'{tier} {rate}' for tier, rate in limited.items())})",
        rates={tier: rate_bytes_per_second(rate) / setting.lab_ranks for tier, rate in limited.items()},
    )


def _most_bytes(ranks: int, available: int) -> int:
    """The largest payload for which all ranks have memory."""
    return (available // ranks - BYTES_OF_A_RANK) // BUFFERS


def _without_memory(place: Place, sizes: Sequence[int]) -> Iterator[Case]:
    for size in sizes:
        reason = f"{BUFFERS} buffers of {format_bytes(size)} on each of {place.ranks} ranks do not fit into free memory"
        for tier, group_size in place.groups().items():
            for operation in OPERATIONS:
                yield Case(tier=tier, operation=operation, group_size=group_size, payload_bytes=size, skipped=reason)


# --- running ranks ----------------------------------------------------------------------------------------------------


def _run(place: Place, setting: Setting, grid: Grid) -> list[Case]:
    """The cases that ranks measured. Raises RankError."""
    if place.hosts > 1:
        return _in_lab(setting, grid)
    if place.backend == "nccl":
        return _by_torchrun(grid, "cuda")
    with Ranks(grid.layout.world, timeout_seconds=2 * grid.seconds + START_SECONDS) as ranks:
        return ranks.run(measure_pool, grid)[0]


def _in_lab(setting: Setting, grid: Grid) -> list[Case]:
    """On the hosts of an emulated cluster."""
    from meshwright.lab import Lab

    seconds = 2 * grid.seconds + START_SECONDS
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        out, log = Path(folder) / "cases.jsonl", Path(folder) / "stderr"
        with Lab(setting.lab_hosts, setting.lab_rate, setting.lab_intra_rate or None) as lab, log.open("w") as stderr:
            try:
                command = _program(grid, "cpu", out)
                code = lab.run(command, setting.lab_ranks, timeout_seconds=seconds, stdout=stderr, stderr=stderr)
            except TimeoutError:
                raise RankError(0, f"no answer within {seconds:g} s") from None
        return _read(out, code, log.read_text(encoding="utf-8", errors="replace"))


def _read(out: Path, code: int, errors: str) -> list[Case]:
    """What rank 0 wrote. Raises RankError, with the last line that was said, where it did not come to that.

    It writes once all ranks have measured everything, so a rank that fails while it leaves takes nothing away.
    """
    if not out.exists():
        raise RankError(0, errors.strip() or f"ended with code {code}")
    return read_cases(out.read_text(encoding="utf-8"))


def _program(grid: Grid, device: str, out: Path) -> list[str]:
    """The rank program of a grid, as arguments of Python."""
    sizes = ",".join(map(str, grid.sizes))
    options = {"device": device, "sizes": sizes, "samples": grid.samples, "seconds": grid.seconds, "out": out}
    words = (word for name, value in options.items() for word in (f"--{name}", str(value)))
    return ["-m", "meshwright.bench.collectives_rank", *words]


def _by_torchrun(grid: Grid, device: str) -> list[Case]:
    """On ranks of this machine under torch's launcher, which gives each its own GPU."""
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        out = Path(folder) / "cases.jsonl"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(grid.layout.world)]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
        command = [*launcher, *meeting, *_program(grid, device, out)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, errors = process.communicate(timeout=2 * grid.seconds + START_SECONDS)
        except subprocess.TimeoutExpired:
            raise RankError(0, f"no answer within {2 * grid.seconds + START_SECONDS:g} s") from None
        finally:
            _end(process)
        return _read(out, process.returncode, errors)


def _end(process: subprocess.Popen[str]) -> None:
    """Ask the launcher, which asks its ranks; those that outlive it are ended by the kernel."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_of(place: Place, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """A row for each case, then one for each operation and tier."""
    rows = [_row(place, case) for case in cases]
    fits = [_fit_row(place, tier, operation, rows) for tier in place.groups() for operation in OPERATIONS]
    return [*rows, *fits]


def _row(place: Place, case: Case) -> dict[str, Any]:
    sent = wire_bytes(case.operation, case.group_size, case.payload_bytes)
    factor = backend_factor(place.backend, case.operation)
    rate = place.rates.get(case.tier)
    settings = {
        "kind": "case",
        **place.about(),
        "tier": case.tier,
        "operation": case.operation,
        "group_size": case.group_size,
        "payload_bytes": case.payload_bytes,
        "wire_bytes": sent,
        "backend_factor": factor,
        "note": NOTE,
    }
    if case.skipped:
        return record.row(**settings, skipped=case.skipped)
    row = record.row(
        **settings,
        calls_per_sample=case.calls,
        samples=case.samples,
        unit="s",
        limit=sent * factor / rate if rate else None,
        limit_kind="least",
    )
    bus = sent / row["median"]
    bandwidths = {"algorithm": case.payload_bytes / row["median"], "bus": bus, "link": bus * factor}
    return row | {f"{name}_bandwidth": bandwidth for name, bandwidth in bandwidths.items()}


def _fit_row(place: Place, tier: str, operation: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the medians of one operation and tier; residuals are relative, one for each of `sizes`."""
    found = [row for row in rows if (row["tier"], row["operation"]) == (tier, operation) and "median" in row]
    settings = {
        "kind": "fit",
        **place.about(),
        "tier": tier,
        "operation": operation,
        "group_size": place.groups()[tier],
        "backend_factor": backend_factor(place.backend, operation),
        "link_rate": place.rates.get(tier),
        "sizes": [row["payload_bytes"] for row in found],
        "note": NOTE,
    }
    points = [(row["wire_bytes"] * row["backend_factor"], row["median"]) for row in found]
    fitted = fit(points, place.rates.get(tier))
    if fitted is None and len(found) < 2:
        return record.row(**settings, skipped="fewer than two sizes were measured, and one tells no bandwidth")
    if fitted is None:
        reason = (
            f"the seconds of {len(found)} sizes do not grow with them: give larger --max-bytes, on a machine at rest"
        )
        return record.row(**settings, failed=reason)
    return record.row(
        **settings,
        latency_seconds=fitted.latency_seconds,
        bandwidth=fitted.bandwidth,
        residuals=list(fitted.residuals),
        worst_residual=fitted.worst,
    )

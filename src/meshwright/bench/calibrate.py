"""A cluster file of this machine: the constants of its collectives, and what its ranks compute.

    meshwright bench calibrate --out laptop.toml [--ranks N] [--quick]
    meshwright plan quickstart --cluster laptop.toml

    latency, bandwidth    α and β of all-reduce in each tier (`bench.collectives`); the other operations' as comments
    peak_flops            square matrix products by precision: the best of a few sizes, each the median of its samples
    memory_bandwidth      a copy of a large tensor, bytes read and bytes written
    memory_bytes          memory of the machine / ranks

All ranks compute at once, a thread each, as in a run (one rank alone has all cores), and the slowest counts. Links
between hosts cannot be measured on one machine: they are those of the catalog's `laptop`, unless the lab has them.
"""

from __future__ import annotations

import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from meshwright.bench import collectives, record
from meshwright.bench.collectives_rank import TIERS
from meshwright.comm.ranks import RankError, Ranks
from meshwright.config import toml
from meshwright.config.hardware import load_cluster
from meshwright.config.ranges import PRECISIONS
from meshwright.config.tree import Cluster, Device, Link
from meshwright.errors import UserError
from meshwright.model.build import DTYPES
from meshwright.units import format_bandwidth, format_seconds

LINK_OPERATION = "all_reduce"
"""Whose constants are those of a link in the cluster file."""

ASSUMED_LINKS = "laptop"
TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured; `collectives` says where, `worlds` aside."""

    ranks: int = 0
    """Ranks of this machine: 0 is one for each GPU, or each core, at least 2; in the lab it is hosts × ranks."""
    matmul_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    copy_bytes: int = 64 * 2**20
    samples: int = 9
    quick: bool = False
    collectives: collectives.Setting = field(default_factory=lambda: collectives.Setting())

    def command(self, out: Path) -> str:
        """What measures it again."""
        words = [f"meshwright bench calibrate --out {out}"]
        if self.collectives.lab_hosts:
            words.append(self.collectives.lab_options())
        else:
            words.append(f"--ranks {self.ranks}")
        words.append(f"--max-seconds {self.collectives.max_seconds:g}")
        return " ".join([*words, *(["--quick"] if self.quick else [])])


QUICK = Setting(matmul_sizes=(256, 512), samples=5, quick=True, collectives=collectives.QUICK)


def resolve(setting: Setting) -> Setting:
    """The setting with its ranks. Raises UserError for a wrong one, before anything is measured."""
    asked = setting.collectives
    if asked.lab_hosts:
        collectives.check(asked)
        return replace(setting, ranks=asked.lab_hosts * asked.lab_ranks)
    ranks = setting.ranks or torch.cuda.device_count() or max(2, min(record.num_cores(), collectives.MOST_RANKS))
    if not 1 <= ranks <= collectives.MOST_RANKS:
        raise UserError(
            f"--ranks = {ranks} is not between 1 and {collectives.MOST_RANKS} (all ranks live on this machine): "
            f"use {max(2, record.num_cores())}"
        )
    backend: Literal["gloo", "nccl"] = "nccl" if torch.cuda.device_count() >= ranks else "gloo"
    worlds = (ranks,) if ranks > 1 else ()
    collectives.check(replace(asked, worlds=worlds, backend=backend))
    return replace(setting, ranks=ranks, collectives=replace(asked, worlds=worlds, backend=backend))


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Rows of the ranks' rates, then those of the collectives; the setting is resolved."""
    try:
        with Ranks(setting.ranks, timeout_seconds=TIMEOUT_SECONDS) as ranks:
            kind = "cuda" if setting.collectives.backend == "nccl" else "cpu"
            found = ranks.run(rates_rank, setting.matmul_sizes, setting.copy_bytes, setting.samples, kind)
    except RankError as error:
        reason = f"rank {error.rank}: {error.reason.strip().splitlines()[-1]}"
        return [record.row(kind="rate", ranks=setting.ranks, failed=reason)]
    return [*_rate_rows(setting.ranks, found), *collectives.measure(setting.collectives)]


# --- what a rank computes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Seconds of something on one rank while all ranks do it."""

    name: str
    size: int
    """Of a matrix product: its three equal dimensions. Of a copy: bytes."""
    amount: int
    """FLOPs, or bytes read and written."""
    seconds: tuple[float, ...]


def rates_rank(sizes: Sequence[int], copy_bytes: int, samples: int, kind: Literal["cpu", "cuda"]) -> list[Rate]:
    """Matrix products of each size and precision, and a copy. Collective over the ranks of this machine."""
    device = torch.device(kind, dist.get_rank()) if kind == "cuda" else torch.device("cpu")
    torch.set_num_threads(1 if dist.get_world_size() > 1 else record.num_cores())
    rates = []
    for precision in PRECISIONS:
        for size in sizes:
            a, b = (torch.ones(size, size, dtype=DTYPES[precision], device=device) for _ in range(2))
            out = torch.empty_like(a)
            seconds = _seconds(partial(torch.mm, a, b, out=out), device, samples)
            rates.append(Rate(name=precision, size=size, amount=2 * size**3, seconds=seconds))
    source = torch.ones(copy_bytes // 4, device=device)
    target = torch.ones_like(source)
    seconds = _seconds(partial(target.copy_, source), device, samples)
    return [*rates, Rate(name="copy", size=copy_bytes, amount=2 * copy_bytes, seconds=seconds)]


def _seconds(work: Callable[[], object], device: torch.device, samples: int) -> tuple[float, ...]:
    found = []
    for _ in range(1 + samples):
        dist.barrier()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return tuple(found[1:])


def _rate_rows(ranks: int, found: Sequence[Sequence[Rate]]) -> list[dict[str, Any]]:
    """The slowest rank of each sample."""
    rows = []
    for same in zip(*found, strict=True):
        rate = same[0]
        seconds = [max(values) for values in zip(*(one.seconds for one in same), strict=True)]
        median = statistics.median(seconds)
        settings = {"ranks": ranks, "name": rate.name, "size": rate.size, "per_second": rate.amount / median}
        rows.append(record.row(kind="rate", **settings, samples=seconds, unit="s", note=collectives.NOTE))
    return rows


# --- the file ---------------------------------------------------------------------------------------------------------


def cluster_of(setting: Setting, rows: Sequence[Mapping[str, Any]], source: str) -> Cluster:
    """The cluster that rows describe. Raises UserError where what it needs failed."""
    needed = [row for row in rows if row.get("operation", LINK_OPERATION) == LINK_OPERATION]
    if failed := [_failure(row) for row in needed if "failed" in row or "skipped" in row]:
        raise UserError("\n".join(f"calibrate cannot write a cluster: {failure}" for failure in failed))
    best: dict[str, float] = {}
    for row in rows:
        if row["kind"] == "rate":
            best[row["name"]] = max(best.get(row["name"], 0.0), row["per_second"])
    fits = {
        row["tier"]: Link(latency_seconds=float(f"{row['latency_seconds']:.4g}"), bandwidth=_round(row["bandwidth"]))
        for row in rows
        if row["kind"] == "fit" and row["operation"] == LINK_OPERATION
    }
    assumed = load_cluster(ASSUMED_LINKS)
    hosts = max(1, setting.collectives.lab_hosts)
    cuda = setting.collectives.backend == "nccl"
    device = Device(
        name=torch.cuda.get_device_name() if cuda else "cpu",
        kind="cuda" if cuda else "cpu",
        peak_flops={precision: _round(best[precision]) for precision in PRECISIONS},
        memory_bytes=_memory_of_a_rank(setting.ranks, cuda),
        memory_bandwidth=_round(best["copy"]),
        source=source,
    )
    intra, inter = fits.get("intra", assumed.intra), fits.get("inter", assumed.inter)
    guessed = [tier for tier in TIERS if tier not in fits]
    note = f"; {' and '.join(guessed)} assumed, as in the catalog's {ASSUMED_LINKS}" if guessed else ""
    return Cluster(
        device=device,
        hosts=hosts,
        devices_per_host=setting.ranks // hosts,
        intra=intra,
        inter=inter,
        source=f"{source}; links: constants of {LINK_OPERATION.replace('_', '-')}{note}",
    )


def _failure(row: Mapping[str, Any]) -> str:
    return (
        f"{row['tier']} {row['operation']}: {row.get('failed') or row['skipped']}"
        if "tier" in row
        else str(row["failed"])
    )


def _round(value: float) -> float:
    """Four digits: more would be noise."""
    return float(f"{value:.4g}")


def _memory_of_a_rank(ranks: int, cuda: bool) -> int:
    if cuda:
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks


def source_of(command: str) -> str:
    """When, on what and by what it was measured."""
    about = record.of("calibrate", command, [])
    machine = f"{about['environment']['device']}, {about['environment']['cores']} cores"
    return f"measured on {datetime.date.today().isoformat()} on {machine}, torch {torch.__version__}: {command}"


def text_of(cluster: Cluster, rows: Sequence[Mapping[str, Any]]) -> str:
    """The file: the constants of every operation as comments, then the cluster."""
    comments = ["Latency and bandwidth of a call by operation and tier, with the largest relative residual of the fit:"]
    for row in rows:
        if row["kind"] == "fit" and "bandwidth" in row:
            constants = f"{format_seconds(row['latency_seconds'])}, {format_bandwidth(row['bandwidth'])}"
            comments.append(f"  {row['tier']} {row['operation']:<15} {constants}, {row['worst_residual']:.0%}")
    table = asdict(cluster)
    del table["name"]
    plain = {key: table.pop(key) for key in ("hosts", "devices_per_host", "source")}
    return "".join(f"# {comment}\n" for comment in comments) + "\n" + toml.dumps(plain | table)


def check_out(out: Path) -> None:
    """Raise UserError where the file must not, or could not, be written."""
    if out.exists():
        raise UserError(f"--out {out} is there already (calibrate never overwrites a file): name another, or remove it")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} is not there: make it, or name another")


def write(out: Path, text: str) -> None:
    """Write a cluster file that `load_cluster` takes. Raises UserError where the file is there."""
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        draft = Path(folder) / "cluster.toml"
        draft.write_text(text, encoding="utf-8")
        load_cluster(draft)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        check_out(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None

"""The benchmarks: for each NAME one dataclass, which is its options and measures.

A new benchmark is a class here and a line in `BENCHES`. It is a page of `bench/`, imported when it is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from meshwright.cli.bench_attention import Attention
from meshwright.errors import UserError

if TYPE_CHECKING:
    from meshwright.bench import collectives


class Measurement(Protocol):
    """Options of a benchmark."""

    def show(self) -> int:
        """Measure and print; the exit code."""
        ...


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Attention over a divided sequence on 1, 2 and 4 ranks here: ring in both orders, Ulysses, and both together."""

    quick: bool = False
    """Small sizes and few samples, where others are not given: a few seconds."""
    seq: int | None = None
    """Tokens in the whole sequence: 4096, or 512 if quick."""
    heads: int | None = None
    """Query heads: 8, or 4 if quick."""
    kv_heads: int | None = None
    """Key and value heads: 4, or 2 if quick."""
    head_dim: int | None = None
    """Width of a head: 64, or 32 if quick."""
    batch: int | None = None
    """Sequences: 1."""
    precision: Literal["float32", "bf16"] | None = None
    """Compute precision: float32."""
    samples: int | None = None
    """How often each layout is timed, in turns: 15, or 6 if quick."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def show(self) -> int:
        """1 where a layout failed, or differs from its formula."""
        from meshwright.bench import ring
        from meshwright.bench.context import Setting

        own = {name: value for name, value in vars(self).items() if name not in ("quick", "json")}
        given = {name: value for name, value in own.items() if value is not None}
        setting = replace(ring.QUICK if self.quick else Setting(), **given)
        rows = ring.measure(setting)
        from meshwright.cli.show import show_ring

        return _told("ring", setting.command(), rows, show_ring, as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class Collectives:
    """All-reduce, all-gather, reduce-scatter, all-to-all and shift by size: bandwidths, and the constants of each."""

    quick: bool = False
    """Two gloo ranks, every second size up to 4 MiB and few samples, where others are not given: a few seconds."""
    worlds: str | None = None
    """Numbers of ranks on this machine, between commas: 2,4, or 2 if quick."""
    backend: Literal["auto", "gloo", "nccl"] | None = None
    """auto is gloo on CPUs, and NCCL where each rank has a GPU; gloo if quick."""
    max_bytes: int | None = None
    """The largest payload; sizes are 1 KiB to 256 MiB, each four times the one before."""
    samples: int | None = None
    """Samples of each case, if there is time for so many: 15, or 5 if quick."""
    max_seconds: float | None = None
    """Seconds for all calls, the start of ranks aside: 60, or 6 if quick. Sizes beyond that are skipped, and say so."""
    lab_hosts: int | None = None
    """Measure in an emulated cluster of so many hosts on this machine instead (Linux, root)."""
    lab_ranks: int | None = None
    """Ranks on each of them: 1."""
    lab_rate: str | None = None
    """Rate of the link of each of them: 400mbit."""
    lab_intra_rate: str | None = None
    """Rate between ranks of one of them; not limited if it is not given."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def show(self) -> int:
        """1 where something failed; what was skipped for want of time or memory did not."""
        setting = _collectives(self)
        from meshwright.bench import collectives

        rows = collectives.measure(setting)
        from meshwright.cli.show_collectives import show_collectives

        return _told("collectives", setting.command(), rows, show_collectives, as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Measure this machine's collectives and matrix products, and write them into a cluster file for other commands."""

    out: str | None = None
    """File to write, such as here.toml; it must not be there yet."""
    quick: bool = False
    """Few sizes and samples: a few seconds."""
    ranks: int | None = None
    """Ranks on this machine: one for each GPU, or else for each core, at least 2."""
    max_seconds: float | None = None
    """Seconds for all collectives: 60, or 6 if quick."""
    lab_hosts: int | None = None
    """Take the links from an emulated cluster of so many hosts on this machine (Linux, root)."""
    lab_ranks: int | None = None
    """Ranks on each of them: 1."""
    lab_rate: str | None = None
    """Rate of the link of each of them: 400mbit."""
    lab_intra_rate: str | None = None
    """Rate between ranks of one of them; not limited if it is not given."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def show(self) -> int:
        """0: a file that could not be measured is not written, which is an error."""
        if not self.out:
            raise UserError("bench calibrate needs --out: give it the file to write, such as --out here.toml")
        if self.ranks is not None and self.lab_hosts is not None:
            raise UserError(f"--ranks = {self.ranks} cannot be given with --lab-hosts: use --lab-ranks")
        from meshwright.bench import calibrate, record

        out = Path(self.out)
        calibrate.check_out(out)
        setting = replace(calibrate.QUICK if self.quick else calibrate.Setting(), collectives=_collectives(self))
        setting = calibrate.resolve(replace(setting, ranks=self.ranks or 0))
        command, rows = setting.command(out), calibrate.measure(setting)
        cluster = calibrate.cluster_of(setting, rows, calibrate.source_of(command))
        calibrate.write(out, calibrate.text_of(cluster, rows))
        if self.json:
            print(json.dumps({"records": [record.of("calibrate", command, rows)]}, allow_nan=False))
        else:
            from meshwright.cli.show_collectives import show_calibration

            show_calibration(rows, self.out)
        return 0


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Gradient synchronisation on two emulated hosts: four strategies and torch's DDP, over buckets and rates."""

    quick: bool = False
    """A small model, one rate and few samples, where others are not given: a minute."""
    rates: str | None = None
    """Between commas: rates of the link, or ratios of communication to backward: 0.5,1,2,400mbit, or 1 if quick."""
    samples: int | None = None
    """Pairs of each comparison: 30, or 6 if quick."""
    sweep: int | None = None
    """Samples of every strategy and bucket: 4, or 2 if quick."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def show(self) -> int:
        """1 where ranks were lost."""
        from meshwright.bench import gradients

        given = {
            name: value for name, value in vars(self).items() if name not in ("quick", "json") and value is not None
        }
        if "rates" in given:
            given["rates"] = tuple(word.strip() for word in given["rates"].split(","))
        setting = replace(gradients.QUICK if self.quick else gradients.Setting(), **given)
        rows = gradients.measure(setting)
        from meshwright.cli.show_gradients import show_gradients

        return _told("gradients", setting.command(), rows, show_gradients, as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """Overlap on emulated hosts: under matrix products, in a block, in a step, under backward, and sums by tiers."""

    quick: bool = False
    """Small problems, two hosts, one ratio and few samples, where others are not given: half a minute."""
    parts: str | None = None
    """Between commas: matmul,block,step,buckets,hierarchical."""
    hosts: str | None = None
    """Numbers of hosts, a rank on each, between commas: 2,4, or 2 if quick."""
    ratios: str | None = None
    """Ratios of communication to computation, between commas: 0.5,1,2, or 1 if quick."""
    samples: int | None = None
    """Turns of all subjects with two hosts: 9, or 2 if quick; two thirds as many with more hosts."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def show(self) -> int:
        """1 where ranks were lost, or a subject computes or sends something else than it should."""
        from meshwright.bench import overlap

        kinds: dict[str, Callable[[str], Any]] = {"parts": str, "hosts": int, "ratios": float}
        given: dict[str, Any] = {} if self.samples is None else {"samples": self.samples}
        for name, kind in kinds.items():
            if (text := getattr(self, name)) is not None:
                given[name] = _between_commas(name, text, kind)
        setting = replace(overlap.QUICK if self.quick else overlap.Setting(), **given)
        rows = overlap.measure(setting, _silent if self.json else print)
        from meshwright.cli.show_overlap import show_overlap

        return _told("overlap", setting.command(), rows, show_overlap, as_json=self.json)


def _silent(_: str) -> None:
    """Where stdout is for JSON."""


def _between_commas(name: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """What is written so. Raises UserError where that is not of the kind."""
    try:
        return tuple(kind(word.strip()) for word in text.split(","))
    except ValueError:
        what, example = ("whole numbers", "2,4") if kind is int else ("numbers", "0.5,1,2")
        raise UserError(f'--{name} = "{text}" is not {what} between commas: use {example}') from None


def _told(
    name: str, command: str, rows: list[dict[str, Any]], show: Callable[[list[dict[str, Any]]], None], *, as_json: bool
) -> int:
    """Print rows, as one record or for people; 1 where something failed."""
    from meshwright.bench import record

    if as_json:
        print(json.dumps({"records": [record.of(name, command, rows)]}, allow_nan=False))
    else:
        show(rows)
    return 1 if any("failed" in row for row in rows) else 0


def _collectives(given: Collectives | Calibrate) -> collectives.Setting:
    """The setting of the options that were given. Raises UserError for a list of numbers that is none."""
    from meshwright.bench import collectives

    own = {name: value for name, value in vars(given).items() if name not in ("quick", "json", "out", "ranks")}
    settings = {name: value for name, value in own.items() if value is not None}
    if "lab_hosts" not in settings and (alone := [name for name in settings if name.startswith("lab_")]):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in alone)
        raise UserError(f"{options} without --lab-hosts: give the number of emulated hosts, such as --lab-hosts 2")
    if "lab_hosts" in settings and "worlds" in settings:
        raise UserError("--worlds cannot be given with --lab-hosts (its ranks are --lab-hosts × --lab-ranks): leave it")
    if settings.get("lab_hosts") == 0:
        raise UserError("--lab-hosts = 0 is not a number of hosts: use 2, or leave it out to measure this machine")
    if "worlds" in settings:
        words = settings["worlds"].split(",")
        if not all(word.strip().isdecimal() for word in words):
            raise UserError(f'--worlds = "{settings["worlds"]}" is not whole numbers between commas: use 2,4')
        settings["worlds"] = tuple(map(int, words))
    return replace(collectives.QUICK if given.quick else collectives.Setting(), **settings)


BENCHES: dict[str, type[Measurement]] = {
    "attention": Attention,
    "ring": Ring,
    "collectives": Collectives,
    "gradients": Gradients,
    "matmul": Matmul,
    "calibrate": Calibrate,
}

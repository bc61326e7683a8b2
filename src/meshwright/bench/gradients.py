"""Gradient synchronisation on two emulated hosts: four strategies and torch's DDP, over buckets and rates.

    meshwright bench gradients [--quick] [--rates 0.5,1,2,400mbit]

A rate that is a number is the ratio of communication to backward: the link is set so that all gradients take that many
times what backward takes, as measured first. At each rate:

    alone           forward, backward, and when the first bucket is ready; nothing is sent
    communication   all buckets on the wire at once, without computation; and the last of them alone
    sweep           every strategy, and buckets of 1 to 64 MiB for `bucketed` and for DDP, in turns
    pairs           alternating: bucketed against DDP at 25 MiB and each at its best of the sweep; bucketed at the
                    bucket of the model (`schemes.bucketing`, its constants measured at this rate) against its best

A sample is the slowest rank's. The limit of a step is forward + max(backward + last bucket, first ready +
communication): the wire cannot begin before a bucket is ready, nor end before the last one is sent.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from meshwright.bench import record
from meshwright.bench.gradients_rank import MODEL, Problem, Subject, Times, communicate, forget, sample, send_once
from meshwright.bench.pairs import ratio_row
from meshwright.comm.lab_ranks import LabRanks
from meshwright.comm.ranks import RankError
from meshwright.errors import UserError
from meshwright.lab import Lab, rate_bytes_per_second
from meshwright.schemes import bucketing
from meshwright.units import MIB

HOSTS = 2
DEFAULT_MIB = 25.0
BUCKETS_MIB = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
SMALL_BYTES = 1024
"""Of the call whose seconds are the model's o."""
WARM_UP = 3
NOTE = "both hosts share the cores of this machine, a thread each; nothing is stepped"

_TARGETS = {"bucketed / ddp": 1.03, "model's bucket / best bucket": 1.03}


@dataclass(frozen=True)
class Setting:
    """How much is measured."""

    rates: tuple[str, ...] = ("0.5", "1", "2", "400mbit")
    samples: int = 30
    """Pairs."""
    sweep: int = 4
    """Turns of the sweep."""
    buckets_mib: tuple[float, ...] = BUCKETS_MIB
    problem: Problem = Problem()
    quick: bool = False
    """Whether model and buckets are those of `QUICK`."""

    def command(self) -> str:
        """What measures this."""
        quick = " --quick" if self.quick else ""
        options = f"--rates {','.join(self.rates)} --samples {self.samples} --sweep {self.sweep}"
        return f"meshwright bench gradients{quick} {options}"


QUICK = Setting(
    rates=("1",),
    samples=6,
    sweep=2,
    buckets_mib=(1.0, 4.0),
    problem=Problem(replace(MODEL, layers=2), 128),
    quick=True,
)


def check(setting: Setting) -> None:
    """Raise UserError with a line for each mistake."""
    mistakes = [
        f"--{name} = {value} is not a whole number above 0"
        for name, value in (("samples", setting.samples), ("sweep", setting.sweep))
        if value < 1
    ]
    for rate in setting.rates:
        try:
            if _ratio(rate) is None:
                rate_bytes_per_second(rate, "--rates")
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UserError("\n".join(mistakes))


def measure(setting: Setting, report: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """Rows of all rates. Raises UserError for wrong settings, and where no lab can be made."""
    check(setting)
    rows: list[dict[str, Any]] = []
    with Lab(HOSTS) as lab, closing(LabRanks(lab, timeout_seconds=600.0)) as ranks:
        run = _Run(setting, ranks)
        alone = run.alone(2 * WARM_UP)
        for label in setting.rates:
            rate = _rate_of(label, alone, setting.problem)
            lab.set_rate(rate)
            report(f"rate {label}: {rate}")
            try:
                rows += run.at_rate(label, rate)
            except RankError as error:  # with it the pool is closed: this rate and those after it have no rows
                why = f"rank {error.rank}: {error.reason.strip().splitlines()[-1]}"
                rows.append(record.row(rate=label, link=rate, part="lost", note=NOTE, failed=why))
                break
    return rows


def _ratio(label: str) -> float | None:
    """Of communication to backward, where the label is that and not a rate."""
    try:
        ratio = float(label)
    except ValueError:
        return None
    if not 0.01 <= ratio <= 100:
        raise UserError(f"--rates = {label} is not a ratio of communication to backward between 0.01 and 100: use one")
    return ratio


def _rate_of(label: str, alone: Sequence[Times], problem: Problem) -> str:
    ratio = _ratio(label)
    if ratio is None:
        return label
    backward = statistics.median(times.backward - times.forward for times in alone)
    wire = sum(bucket.numel for bucket in problem.buckets(DEFAULT_MIB)) * 4  # 2(n-1)/n of it, at two ranks all
    return f"{round(8 * wire / (ratio * backward) / 1e6)}mbit"


class _Run:
    """The ranks, and how they are asked."""

    def __init__(self, setting: Setting, ranks: LabRanks) -> None:
        self.setting, self.problem, self.ranks = setting, setting.problem, ranks
        self.nbytes = sum(bucket.numel for bucket in self.problem.buckets(DEFAULT_MIB)) * 4

    def seconds(self, subject: Subject) -> float:
        """One sample: the slowest rank's."""
        return max(times.end for times in self.ranks.run(sample, self.problem, subject))

    def alone(self, count: int) -> list[Times]:
        """Of each sample the slowest rank's; the first few are warm-up."""
        found = [self.ranks.run(sample, self.problem, Subject("alone")) for _ in range(WARM_UP + count)]
        return [max(times, key=lambda one: one.end) for times in found[WARM_UP:]]

    def at_rate(self, label: str, rate: str) -> list[dict[str, Any]]:
        """Everything at one rate."""
        setting = self.setting
        alone = self.alone(setting.sweep)
        constants = self._constants(alone)
        strategies = [Subject("naive"), Subject("flat"), Subject("per_parameter")]
        sized = [Subject(kind, mib) for mib in setting.buckets_mib for kind in ("bucketed", "ddp")]
        seconds = self._in_turns([*strategies, *sized], setting.sweep)
        best = {
            kind: min((s for s in sized if s.kind == kind), key=lambda s: statistics.median(seconds[s]))
            for kind in ("bucketed", "ddp")
        }
        chosen = Subject("bucketed", bucketing.bucket_bytes(self.nbytes, *constants) / MIB)
        pairs = {
            f"bucketed / ddp, {DEFAULT_MIB:g} MiB": (Subject("bucketed", DEFAULT_MIB), Subject("ddp", DEFAULT_MIB)),
            "bucketed / ddp, each at its best": (best["bucketed"], best["ddp"]),
            "model's bucket / best bucket": (chosen, best["bucketed"]),
        }
        compared = {name: self._pairs(*pair) for name, pair in pairs.items()}
        about = {"rate": label, "link": rate, "note": NOTE}
        rows = [*self._rows_of_parts(alone, constants, about)]
        for subject, samples in seconds.items():
            rows.append(self._row(subject, samples, alone, {**about, "part": "sweep"}))
        for name, (first, second) in pairs.items():
            ones, others = compared[name]
            rows += [
                self._row(subject, samples, alone, {**about, "part": name})
                for subject, samples in ((first, ones), (second, others))
            ]
            target = next(limit for start, limit in _TARGETS.items() if name.startswith(start))
            by_name = {"first": ones, "second": others}
            ratio = ratio_row(
                "first", "second", by_name, {}, **about, subjects=[str(first), str(second)], target=target
            )
            rows.append({**ratio, "comparison": name})
        self.ranks.run(forget)
        return rows

    def _constants(self, alone: Sequence[Times]) -> tuple[float, float, float]:
        """o, w and t_bwd of the bucketing model: of the smallest call, of one call with all gradients, of `alone`."""
        small, whole = (
            statistics.median(max(self.ranks.run(send_once, nbytes)) for _ in range(3 * self.setting.sweep))
            for nbytes in (SMALL_BYTES, self.nbytes)
        )
        backward = statistics.median(times.backward - times.forward for times in alone)
        return small, self.nbytes / max(whole - small, 1e-9), backward

    def _in_turns(self, subjects: Sequence[Subject], count: int) -> dict[Subject, list[float]]:
        seconds: dict[Subject, list[float]] = {subject: [] for subject in subjects}
        for index in range(-1, count):
            for subject in reversed(subjects) if index % 2 else subjects:
                found = self.seconds(subject)
                if index >= 0:  # the first turn makes the models, and lets DDP rebuild its buckets
                    seconds[subject].append(found)
        return seconds

    def _pairs(self, first: Subject, second: Subject) -> tuple[list[float], list[float]]:
        for subject in (first, second) * 2:
            self.seconds(subject)
        samples: tuple[list[float], list[float]] = ([], [])
        for index in range(self.setting.samples):
            for side in (1, 0) if index % 2 else (0, 1):
                samples[side].append(self.seconds((first, second)[side]))
        return samples

    def _rows_of_parts(
        self, alone: Sequence[Times], constants: tuple[float, float, float], about: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Compute alone, and the model's constants."""
        parts = {
            "forward": [times.forward for times in alone],
            "backward": [times.backward - times.forward for times in alone],
            "first bucket ready": [times.first_ready - times.forward for times in alone],
        }
        for name, samples in parts.items():
            yield record.row(part=f"alone: {name}", samples=samples, unit="s", **about)
        yield record.row(
            part="bucketing model",
            seconds_per_call=constants[0],
            bandwidth=constants[1],
            backward_seconds=constants[2],
            bucket_mib=bucketing.bucket_bytes(self.nbytes, *constants) / MIB,
            **about,
        )

    def _row(
        self, subject: Subject, samples: Sequence[float], alone: Sequence[Times], about: dict[str, Any]
    ) -> dict[str, Any]:
        """Beside the limit of its buckets, if it has some."""
        settings: dict[str, Any] = {"subject": subject.kind, **about}
        limit = None
        if subject.kind == "ddp":
            settings["bucket_mib"] = subject.bucket_mib  # how it divides gradients is its own affair
        if subject.kind == "bucketed":
            everything, last = self._communication(subject.bucket_mib)
            forward, backward, first = (
                statistics.median(getattr(times, name) for times in alone)
                for name in ("forward", "backward", "first_ready")
            )
            limit = max(backward + last, first + everything)
            settings |= {
                "bucket_mib": subject.bucket_mib,
                "buckets": len(self.problem.buckets(subject.bucket_mib)),
                "compute_seconds": backward,
                "forward_seconds": forward,
                "communication_seconds": everything,
                "last_bucket_seconds": last,
            }
        return record.row(samples=samples, unit="s", limit=limit, limit_kind="least", **settings)

    def _communication(self, bucket_mib: float) -> tuple[float, float]:
        found = [self.ranks.run(communicate, self.problem, bucket_mib) for _ in range(3)]
        everything, last = zip(*(map(max, zip(*times, strict=True)) for times in found), strict=True)
        return statistics.median(everything), statistics.median(last)

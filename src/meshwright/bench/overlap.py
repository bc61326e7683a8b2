"""Overlap on emulated hosts: communication under matrix products, in a block, in a step, and under backward.

    meshwright bench matmul [--quick] [--parts matmul,block,step,buckets,hierarchical] [--hosts 2,4] [--ratios 0.5,1,2]

A ratio is communication over computation: compute alone is measured first, then the links are set so that what a rank
sends takes so many times as long. At each setting every subject (`bench.overlap_subjects`) takes its turn, forwards and
backwards, with compute alone and communication alone among them. A sample is the slowest rank's. What the rows say is
`bench.overlap_rows`, what the timeline says of every subject `bench.overlap_price`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from meshwright.account import Issue, Ledger, Trace, wire_bytes
from meshwright.bench import overlap_hierarchical, overlap_rank, record
from meshwright.bench.gradients_rank import MODEL
from meshwright.bench.overlap_price import Constants, fitted, rates
from meshwright.bench.overlap_rank import Checked, Sample
from meshwright.bench.overlap_rows import NOTE, Alone, Measured, alone_row, subject_rows, timeline_rows
from meshwright.bench.overlap_subjects import Problem, Subject
from meshwright.comm.lab_ranks import LabRanks
from meshwright.comm.ranks import RankError
from meshwright.config.tree import Model
from meshwright.errors import UserError
from meshwright.lab import Lab, rate_bytes_per_second

PARTS = ("matmul", "block", "step", "buckets", "hierarchical")
MOST_HOSTS = 8
WARM_UP = 2
CALLS = 5
"""Samples of each size of a call, for the constants of a link."""
COPY_BYTES = 32 * 2**20
MOST_ERROR = 2.0**-15
"""Of results in float32, which are sums of thousands of terms in another order."""

COMPUTE, COMMUNICATION = "compute", "communication"


def _model(layers: int, width: int, inner: int, heads: int, vocabulary: int) -> Model:
    return Model(
        layers=layers,
        d_model=width,
        d_ff=inner,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        vocab_size=vocabulary,
    )


PROBLEMS: dict[str, tuple[Problem, ...]] = {
    "matmul": (
        Problem("gather_matmul", _model(1, 1024, 4096, 8, 64), 4096),
        Problem("matmul_scatter", _model(1, 1024, 4096, 8, 64), 4096),
    ),
    "block": (Problem("block", _model(1, 768, 2048, 12, 64), 1024),),
    "step": (Problem("step", _model(2, 512, 1408, 8, 2048), 1024),),
    "buckets": (Problem("buckets", MODEL, 384),),
}
QUICK_PROBLEMS: dict[str, tuple[Problem, ...]] = {
    "matmul": (
        Problem("gather_matmul", _model(1, 256, 512, 4, 64), 512),
        Problem("matmul_scatter", _model(1, 256, 512, 4, 64), 512),
    ),
    "block": (Problem("block", _model(1, 128, 384, 4, 64), 256),),
    "step": (Problem("step", _model(1, 128, 384, 4, 64), 256),),
    "buckets": (Problem("buckets", _model(1, 128, 384, 4, 256), 128),),
}


@dataclass(frozen=True)
class Setting:
    """How much is measured."""

    parts: tuple[str, ...] = PARTS
    hosts: tuple[int, ...] = (2, 4)
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    samples: int = 9
    """Turns with two hosts; two thirds as many with more."""
    quick: bool = False
    """Whether problems are those of `QUICK`."""

    def command(self) -> str:
        """What measures this."""
        ratios, hosts = (",".join(f"{value:g}" for value in values) for values in (self.ratios, self.hosts))
        options = f"--parts {','.join(self.parts)} --hosts {hosts} --ratios {ratios} --samples {self.samples}"
        return f"meshwright bench matmul{' --quick' if self.quick else ''} {options}"

    def turns(self, hosts: int) -> int:
        """How often each subject is timed."""
        return self.samples if hosts == 2 else math.ceil(2 * self.samples / 3)

    def problems(self, part: str) -> tuple[Problem, ...]:
        """Those of a part."""
        return (QUICK_PROBLEMS if self.quick else PROBLEMS)[part]

    def subjects(self, problem: Problem, hosts: int) -> tuple[Subject, ...]:
        """Those that communicate, `unsplit` first."""
        if problem.shape == "buckets":
            return (Subject("unsplit"), *(Subject("bucketed", bucket_mib=mib) for mib in self._buckets_mib))
        chunks = (1, 4) if self.quick else (1, 2, 4, 8)
        found = [Subject("unsplit"), *(Subject("pipelined", count) for count in chunks)]
        if problem.shape in ("block", "step"):
            found.insert(1, Subject("none"))
        if hosts > 2:
            found += [Subject("pipelined", count, "bidirectional") for count in chunks[1:]]
        return tuple(found)

    @property
    def _buckets_mib(self) -> tuple[float, ...]:
        return (0.25, 1.0) if self.quick else (2.0, 8.0, 25.0)


QUICK = Setting(hosts=(2,), ratios=(1.0,), samples=2, quick=True)


def check(setting: Setting) -> None:
    """Raise UserError with a line for each mistake."""
    mistakes = []
    for part in setting.parts:
        if part not in PARTS:
            mistakes.append(f'--parts = "{part}" is no part: use some of {",".join(PARTS)}')
    for hosts in setting.hosts:
        if not 2 <= hosts <= MOST_HOSTS:
            mistakes.append(
                f"--hosts = {hosts} is out of range (communication needs 2, this lab has {MOST_HOSTS}): use 2,4"
            )
        elif problems := _indivisible(setting, hosts):
            mistakes.append(f"--hosts = {hosts} does not divide {problems}: use 2,4")
    for ratio in setting.ratios:
        if not 0.01 <= ratio <= 100:
            mistakes.append(
                f"--ratios = {ratio:g} is not a ratio of communication to computation between 0.01 and 100: use 0.5,1,2"
            )
    if setting.samples < 1:
        mistakes.append(f"--samples = {setting.samples} is not a whole number above 0")
    if mistakes:
        raise UserError("\n".join(mistakes))


def _indivisible(setting: Setting, hosts: int) -> str:
    """The first of what a tensor axis over the hosts would have to divide, and does not."""
    for part in (part for part in setting.parts if part in PROBLEMS and part != "buckets"):
        for problem in setting.problems(part):
            for name in ("heads", "d_ff"):
                if getattr(problem.model, name) % hosts:
                    return f"the {getattr(problem.model, name)} {name} of {part}"
    return ""


SECONDS_OF_COMPUTE = {"gather_matmul": 0.2, "matmul_scatter": 0.2, "block": 0.42, "step": 0.5, "buckets": 0.65}
"""About, for the estimate, on 2 cores."""
SECONDS_TO_PREPARE = 8.0


def expected_seconds(setting: Setting) -> float:
    """About how long everything takes, where the machine does nothing else."""
    if setting.quick:
        return 8.0 * len(setting.parts) * len(setting.hosts) * len(setting.ratios)
    total = overlap_hierarchical.expected_seconds(setting.samples) if "hierarchical" in setting.parts else 0.0
    for part in (part for part in setting.parts if part != "hierarchical"):
        for hosts in setting.hosts:
            for problem in setting.problems(part):
                overlapped = len(setting.subjects(problem, hosts)) - 1
                turns = sum(overlapped * max(1.0, ratio) + 2 * (1 + ratio) for ratio in setting.ratios)
                share = hosts / 2 if problem.shape == "buckets" else 1.0  # others are divided among hosts
                total += (setting.turns(hosts) + 1) * turns * share * SECONDS_OF_COMPUTE[problem.shape]
                total += SECONDS_TO_PREPARE
    return total


def measure(setting: Setting, report: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """Rows of everything, the timeline's last; raises as `measure_parts`."""
    rows = measure_parts(setting, report)
    return [*rows, *timeline_rows(rows)]


def measure_parts(setting: Setting, report: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """Rows of what was measured. Raises UserError for wrong settings, and where no lab can be made."""
    check(setting)
    report(f"about {expected_seconds(setting) / 60:.0f} minutes")
    rows: list[dict[str, Any]] = []
    parts = [part for part in setting.parts if part != "hierarchical"]
    for hosts in setting.hosts if parts else ():
        with Lab(hosts) as lab, closing(LabRanks(lab, timeout_seconds=300.0)) as ranks:
            try:
                for part in parts:
                    for problem in setting.problems(part):
                        rows.extend(_Run(setting, lab, ranks, part, problem).rows(report))
            except RankError as error:  # with it the pool is closed: what comes after has no rows
                why = f"rank {error.rank}: {error.reason.strip().splitlines()[-1]}"
                rows.append(record.row(part="lost", hosts=hosts, note=NOTE, failed=why))
    if "hierarchical" in setting.parts:
        rows += overlap_hierarchical.measure(setting.samples, quick=setting.quick, report=report)
    return rows


class _Run:
    """One problem over the hosts of one lab."""

    def __init__(self, setting: Setting, lab: Lab, ranks: LabRanks, part: str, problem: Problem) -> None:
        self._lab, self._ranks, self._part, self._problem = lab, ranks, part, problem
        self._turns, self._ratios = setting.turns(lab.hosts), setting.ratios
        self._subjects = setting.subjects(problem, lab.hosts)
        self._compute = Subject("compute")

    def rows(self, report: Callable[[str], None]) -> Iterator[dict[str, Any]]:
        """Check every subject, then measure at each ratio; what is computed is priced when all of that is known."""
        self._lab.set_rate(None)
        checked = {subject: self._checked(subject) for subject in (*self._subjects, self._compute)}
        first = self._median_compute([self._sample(self._compute) for _ in range(WARM_UP + 3)][WARM_UP:])
        copies = statistics.median(max(self._ranks.run(overlap_rank.copy, COPY_BYTES)) for _ in range(CALLS))
        measured = {}
        for ratio in self._ratios:
            sent = checked[self._subjects[0]].ledger.wire_bytes()
            rate = f"{round(8 * sent / (ratio * first) / 1e3)}kbit"
            self._lab.set_rate(rate)
            report(f"{self._problem.shape}, {self._lab.hosts} hosts, ratio {ratio:g}: {rate}")
            measured[ratio] = _Measured(rate, *self._at_rate(checked[self._subjects[0]]))
        self._lab.set_rate(None)
        self._ranks.run(overlap_rank.forget)
        whole = statistics.median(s.seconds for one in measured.values() for s in one.turns[COMPUTE])
        arithmetic = rates(_trace(checked[self._compute]), whole, 2 * COPY_BYTES / copies)
        for ratio, one in measured.items():
            yield from self._rows_at(ratio, one, arithmetic, checked)

    def _checked(self, subject: Subject) -> Checked:
        """On all ranks: the largest error, and what rank 0 does."""
        found = self._ranks.run(overlap_rank.prepare, self._problem, subject)
        return found[0]._replace(error=max(one.error for one in found))

    def _sample(self, subject: Subject) -> Sample:
        return max(self._ranks.run(overlap_rank.sample, self._problem, subject))

    def _median_compute(self, samples: Sequence[Sample]) -> float:
        return statistics.median(sample.seconds - sample.forward for sample in samples)

    def _at_rate(self, unsplit: Checked) -> tuple[list[tuple[float, float]], dict[str, list[Sample]]]:
        """Points for the constants of the link, and samples in turns."""
        calls = [event for event in _trace(unsplit).expanded() if isinstance(event, Issue) and event.phase != "control"]
        points = [(float(sent), seconds) for sent, seconds in self._points(max(calls, key=lambda c: c.payload_bytes))]

        def communicate() -> Sample:
            found = self._ranks.run(overlap_rank.communicate, self._problem, self._subjects[0], calls)
            return Sample(max(found), max(found))

        todo: dict[str, Callable[[], Sample]] = {COMMUNICATION: communicate}
        todo |= {str(subject): partial(self._sample, subject) for subject in (self._compute, *self._subjects)}
        turns: dict[str, list[Sample]] = {name: [] for name in todo}
        for index in range(-1, self._turns):
            for name in reversed(todo) if index % 2 else todo:
                found = todo[name]()
                if index >= 0:
                    turns[name].append(found)
        return points, turns

    def _points(self, largest: Issue) -> Iterator[tuple[int, float]]:
        """Wire bytes and seconds of the largest call, of an eighth of it, and of a small one."""
        for payload in sorted({min(65536, largest.payload_bytes), largest.payload_bytes // 8, largest.payload_bytes}):
            arguments = largest.operation, largest.axis, payload, self._problem, self._subjects[0]
            found = [max(self._ranks.run(overlap_rank.send_once, *arguments)) for _ in range(1 + CALLS)]
            yield wire_bytes(largest.operation, largest.group_size, payload), statistics.median(found[1:])

    def _rows_at(
        self, ratio: float, one: _Measured, arithmetic: tuple[float, float], checked: Mapping[Subject, Checked]
    ) -> Iterator[dict[str, Any]]:
        hosts = self._lab.hosts
        about: dict[str, Any] = {"part": self._part, "problem": self._problem.shape, "hosts": hosts, "ratio": ratio}
        about |= {"link": one.rate, "note": NOTE}
        constants = Constants(fitted(one.points, rate_bytes_per_second(one.rate)), *arithmetic)
        computed = one.turns[COMPUTE]
        alone = Alone(
            self._median_compute(computed),
            statistics.median(sample.seconds for sample in one.turns[COMMUNICATION]),
            statistics.median(sample.forward for sample in computed),
        )
        measured, chunks = {}, {}
        for subject in self._subjects:
            trace, samples = _trace(checked[subject]), one.turns[str(subject)]
            predicted = constants.price(trace, self._problem.job(subject, hosts))
            seconds, exposed = [s.seconds for s in samples], [s.exposed for s in samples]
            sent = checked[subject].ledger.wire_bytes()
            measured[str(subject)] = Measured(seconds, exposed, *predicted, sent, checked[subject].error)
            if (chunk := self._chunk(subject, checked[subject].ledger)) is not None:
                chunks[str(subject)] = chunk
        yield record.row(
            constants="link and ranks",
            latency_seconds=constants.link.latency_seconds,
            bandwidth=constants.link.bandwidth,
            worst_residual=constants.link.worst if constants.link.residuals else None,
            flops_per_second=constants.flops_per_second,
            memory_bandwidth=constants.memory_bandwidth,
            points=[list(point) for point in one.points],
            **about,
        )
        yield alone_row(COMPUTE, [sample.seconds for sample in computed], about)
        yield alone_row(COMMUNICATION, [sample.seconds for sample in one.turns[COMMUNICATION]], about)
        yield from subject_rows(measured, chunks, alone, MOST_ERROR, {**about, **self._auto(constants)})

    def _auto(self, constants: Constants) -> dict[str, str]:
        """What `auto` makes of a step on links of this rate; of other problems the timeline's order is the choice."""
        if self._problem.shape != "step":
            return {}
        layout = constants.auto(self._problem.job(Subject("none"), self._lab.hosts))
        if layout.overlap == "none":
            return {"auto": "none"}
        return {"auto": str(Subject("pipelined", layout.overlap_chunks, layout.overlap_ring))}

    def _chunk(self, subject: Subject, ledger: Ledger) -> float | None:
        """The part of the hideable that has nothing to run under; None of what is not overlapped by us."""
        if subject.kind == "pipelined":
            return 1 / (self._lab.hosts * subject.chunks)
        if subject.kind == "bucketed":
            last = self._problem.gradients.buckets(subject.bucket_mib)[-1].numel * 4
            return wire_bytes("all_reduce", self._lab.hosts, last) / ledger.wire_bytes()
        return None


@dataclass(frozen=True)
class _Measured:
    rate: str
    points: list[tuple[float, float]]
    turns: dict[str, list[Sample]]


def _trace(checked: Checked) -> Trace:
    assert checked.trace is not None
    return checked.trace

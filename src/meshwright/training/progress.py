"""What rank 0 shows and writes while it trains: a line a step, metrics.jsonl, a progress bar, the verdict."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from meshwright.account import StepAccount, Timeline
from meshwright.comm.exposed import Reading
from meshwright.config.tree import Job
from meshwright.planner.estimate import mfu, model_flops
from meshwright.training import agreement, metrics
from meshwright.training.device import known_device
from meshwright.training.metrics import MetricsFile, StepMetrics
from meshwright.training.run_folder import RunFolder

_TYPICAL_STEPS = 1000
"""The last so many tell what is typical: a run may have millions."""


class Outcome(NamedTuple):
    """One step as the loop saw it; `number` counts from 1."""

    number: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    idle_seconds: float
    """Of which it read data, and computed nothing."""
    lane: Reading | None
    """What the compute lane did in the rest; None where that cannot be measured."""
    heldout_loss: float | None = None


@dataclass
class Report:
    """Rank 0's record of a run; use as a context manager around the loop."""

    job: Job
    folder: RunFolder
    device: torch.device
    run: StepAccount | None = None
    _recent: deque[Outcome] = field(default_factory=lambda: deque(maxlen=_TYPICAL_STEPS))
    _num_steps: int = 0

    def __post_init__(self) -> None:
        self._file = MetricsFile(self.folder.metrics_file)
        self._catalog_device = known_device() if self.device.type == "cuda" else None
        self._model_flops = model_flops(self.job)
        self._console = Console(highlight=False, soft_wrap=True)
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("train", total=self.job.training.steps)

    def __enter__(self) -> Report:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def audited(self, account: StepAccount) -> None:
        """Take the account of the audited step. Of the overlap it says what the plan does: choice, prices and trial."""
        self.run = replace(account, overlap=self.folder.read_account("plan")["overlap"])
        self.folder.write_account("run", self.run)

    def step(self, outcome: Outcome) -> None:
        """Write and show one step."""
        training = self.job.training
        self._keep(outcome)
        line = StepMetrics(
            step=outcome.number,
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            tokens_per_s=metrics.tokens_per_second(training, outcome.seconds),
            mfu=self._mfu(outcome.seconds),
            exposed_seconds=None if outcome.lane is None else outcome.lane.exposed_seconds,
            memory_bytes=metrics.memory_bytes(self.device),
            heldout_bits_per_byte=None if outcome.heldout_loss is None else metrics.bits_per_byte(outcome.heldout_loss),
        )
        self._file.write(line)
        self._bar.update(self._task, completed=outcome.number)
        self._say(step_line(line, training.steps, outcome.learning_rate))

    def close(self) -> None:
        """After the last step: what was predicted beside what was measured, and whether the ledgers agree."""
        if self.run is None:
            self._say(
                "ledger: not compared, because the second step is the one that is audited: use training.steps 2 or more"
            )
            return
        self.run = replace(self.run, timeline=timeline(self._recent), time_model="measured")
        self.folder.write_account("run", self.run)
        names = {"formula": "plan", "rehearsal": "rehearsal", "run": "run"}
        accounts = {source: self.folder.read_account(name) for source, name in names.items()}
        allocated = metrics.memory_bytes(self.device) if self.device.type == "cuda" else None
        self._say("", agreement.comparison_table(accounts, memory_bytes=allocated), "", agreement.ledger_line(accounts))

    def _keep(self, outcome: Outcome) -> None:
        """The first step warms up and the second is audited: they are typical only where there are no others."""
        self._num_steps += 1
        if self._num_steps == 3:
            self._recent.clear()
        if (
            self._recent and (before := self._recent[-1]).lane is not None
        ):  # of all spans, only the last step's are kept
            self._recent[-1] = before._replace(lane=replace(before.lane, spans=()))
        self._recent.append(outcome)

    def _mfu(self, seconds: float) -> float | None:
        return mfu(self._model_flops, seconds, self._catalog_device, self.job.training.precision)

    def _say(self, *lines: str) -> None:
        for line in lines:
            self._console.print(line, markup=False)
        self._console.file.flush()


def timeline(steps: Sequence[Outcome]) -> Timeline:
    """The typical step: medians over these, and the spans of the last."""
    seconds = statistics.median(step.seconds for step in steps)
    lanes = [step.lane for step in steps if step.lane is not None]
    if not lanes:
        return Timeline(seconds)
    keys = sorted(set().union(*(lane.exposed for lane in lanes)))
    exposed = {key: statistics.median(lane.exposed.get(key, 0.0) for lane in lanes) for key in keys}
    return Timeline(seconds, exposed, statistics.median(lane.compute_seconds for lane in lanes), lanes[-1].spans)


def step_line(line: StepMetrics, steps: int, learning_rate: float) -> str:
    """One step for people."""
    parts = [
        f"step {line.step:>{len(str(steps))}}/{steps}",
        f"loss {line.loss:.4f}",
        f"grad norm {line.grad_norm:.3f}",
        f"lr {learning_rate:.2e}",
        f"{line.tokens_per_s:,.0f} tok/s",
    ]
    if line.mfu is not None:
        parts.append(f"MFU {line.mfu:.1%}")
    if line.heldout_bits_per_byte is not None:
        parts.append(f"held out {line.heldout_bits_per_byte:.3f} bits/byte")
    return "  ".join(parts)

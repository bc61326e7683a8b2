"""Before training, measured: does what `layout.overlap = auto` cut beat the layout with nothing cut?

The timeline chose it, and the timeline is a model. So both layouts are built side by side from the run's own initial
weights, take steps on the run's own batches, and are forgotten: the run then begins as it would have without.

    warm-up    2 steps of each, for first touches, optimiser states, and what libraries prepare
    pairs      `training.trial_steps` times a step of each on the same batch, by turns first
    seconds    of a step, until the last that it put on the wire is there, on the rank where that is longest
    verdict    rank 0's, from the ratios chosen / unsplit of the pairs (`Trial.pays`)

Both layouts have the same degrees, so they share a world and its groups. While the trial lasts, weights, gradients and
optimiser states exist twice: on CUDA no trial is run where the two do not fit beside each other.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from meshwright.comm.mesh import World
from meshwright.config.tree import Job, Layout, Training
from meshwright.intervals import median_interval
from meshwright.planner.overlap import LEAST_GAIN, described
from meshwright.training.data import Text
from meshwright.training.group import from_all, from_rank_0
from meshwright.training.process import leave_if_asked
from meshwright.training.run_folder import RunFolder
from meshwright.training.schedule import set_learning_rate
from meshwright.training.step import Batch, State, step
from meshwright.units import format_bytes, format_seconds

WARM_UP_STEPS = 2
LEAST_FASTER_SHARE = 0.75
"""Of the pairs: in so many the chosen layout must be the faster one. Of 4 equal pairs, noise makes 3 in 5 of 16 cases;
to keep what is as fast costs nothing, and to ask for more would drop overlaps that pay for one disturbed pair."""
SPARE_MEMORY = 0.1
"""Of the free memory of a GPU, left for what a footprint does not count."""


@dataclass(frozen=True)
class Trial:
    """Seconds of a step of the two layouts on the slowest rank, pair by pair."""

    chosen_seconds: tuple[float, ...]
    unsplit_seconds: tuple[float, ...]

    @classmethod
    def of_ranks(cls, ranks: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Trial:
        """From what every rank measured of the chosen layout and of the unsplit one."""
        slowest = (tuple(map(max, zip(*seconds, strict=True))) for seconds in zip(*ranks, strict=True))
        return cls(*slowest)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Chosen / unsplit of each pair: neighbours in time are disturbed alike."""
        return tuple(a / b for a, b in zip(self.chosen_seconds, self.unsplit_seconds, strict=True))

    @property
    def ratio(self) -> float:
        """Their median."""
        return statistics.median(self.ratios)

    @property
    def pays(self) -> bool:
        """Whether the chosen layout is faster by more than the timeline can tell apart, in the median pair, and faster
        at all in most pairs."""
        faster = sum(ratio < 1 for ratio in self.ratios)
        return self.ratio < 1 - LEAST_GAIN and faster >= LEAST_FASTER_SHARE * len(self.ratios)

    def to_json(self) -> dict[str, Any]:
        """`overlap.trial` of the account."""
        low, high, confidence = median_interval(self.ratios)
        return {
            "chosen_seconds": list(self.chosen_seconds),
            "unsplit_seconds": list(self.unsplit_seconds),
            "ratio": self.ratio,
            "interval": [low, high],
            "confidence": confidence,
            "pays": self.pays,
        }

    def line(self, chosen: Layout) -> str:
        """The verdict with both figures."""
        figures = [format_seconds(statistics.median(s)) for s in (self.chosen_seconds, self.unsplit_seconds)]
        pairs = "1 pair" if len(self.ratios) == 1 else f"{len(self.ratios)} pairs"
        return (
            f"overlap: {described(chosen)} measured {figures[0]} a step against {figures[1]} with nothing cut: "
            f"{'stays' if self.pays else 'falls back'} (median ratio {self.ratio:.3f} of {pairs})"
        )


def cost_in_steps(training: Training) -> int:
    """Of a trial."""
    return 2 * (WARM_UP_STEPS + training.trial_steps)


def reason_against(training: Training) -> str:
    """Why a run has no trial though something was cut; empty where it has one."""
    if not training.trial_steps:
        return "training.trial_steps = 0"
    if training.steps < cost_in_steps(training):
        return f"it would take {cost_in_steps(training)} steps, more than the run's {training.steps}"
    return ""


def skipped_line(reason: str) -> str:
    """That there is no trial."""
    return f"overlap: not tried before the run, as {reason}"


def settled(
    job: Job, fallback: Layout, folder: RunFolder, text: Text, world: World, create: Callable[[Job], State]
) -> Job:
    """Try the job's layout against the one to fall back to; the job that shall run. Collective.

    `create` builds a layout as the run will. Rank 0 writes the verdict into the folder and says it.
    """
    if reason := _too_large(folder, world):
        trial = None
    else:
        states = (create(job), create(replace(job, layout=fallback)))
        own = measure(states, text, world, job.training.trial_steps)
        del states
        _forget(world.device)
        trial = agreed(own, world)
    kept = job if trial is None or trial.pays else replace(job, layout=fallback)
    if world.rank == 0:
        record = {"skipped": reason} if trial is None else trial.to_json()
        folder.settle(record, fall_back=kept is not job)
        print(skipped_line(reason) if trial is None else trial.line(job.layout), flush=True)
    return kept


def measure(
    states: tuple[State, State], text: Text, world: World, pairs: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """This rank's seconds of a step of each, pair by pair, after the warm-up. Collective; changes the states."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for index in range(WARM_UP_STEPS + pairs):
        batch = text.batch(index, world.device)
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            leave_if_asked()
            set_learning_rate(states[which].optimiser, states[which].job.training, index)
            seconds[which].append(_timed_step(states[which], batch, world))
    return tuple(seconds[0][WARM_UP_STEPS:]), tuple(seconds[1][WARM_UP_STEPS:])


def agreed(own: tuple[Sequence[float], Sequence[float]], world: World) -> Trial:
    """What all ranks measured, put together by rank 0, so that all act on one verdict. Collective."""
    ranks = from_all(own, world)
    return from_rank_0(Trial.of_ranks(ranks) if world.rank == 0 else None, world)


def _timed_step(state: State, batch: Batch, world: World) -> float:
    began = time.perf_counter()
    result = step(state, batch, world)
    state.states.settle()  # else the next step, which is the other layout's, would wait for what this one sent
    float(result.loss)  # waits for the device
    return time.perf_counter() - began


def _forget(device: torch.device) -> None:
    """Give back what a trial held; modules and their hooks refer to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # what is reported is the run's


def _too_large(folder: RunFolder, world: World) -> str:
    """Why the two layouts cannot be held at once; empty if they can, or if nobody knows. Collective."""
    if world.device.type != "cuda":
        return ""
    free = min(from_all(torch.cuda.mem_get_info(world.device)[0], world))
    reason = ""
    if world.rank == 0:
        footprints = [of.read_account("rehearsal")["footprint"] for of in (folder, folder.fallback)]
        if (needed := bytes_of_both(*footprints)) > free * (1 - SPARE_MEMORY):
            reason = f"both layouts take {format_bytes(needed)} and a rank has {format_bytes(free)} free"
    return from_rank_0(reason, world)


def bytes_of_both(first: Mapping[str, int], second: Mapping[str, int]) -> int:
    """At the peak of one layout's step, while the other one keeps what lasts between steps; of two footprints."""

    def lasting(footprint: Mapping[str, int]) -> int:
        return sum(footprint[name] for name in ("parameters", "gradients", "optimiser_states"))

    return max(first["peak"] + lasting(second), second["peak"] + lasting(first))

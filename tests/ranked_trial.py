"""Trials that ranks hold by clocks of the tests' own, and the runs that follow (importable by name)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from meshwright.comm.mesh import World
from meshwright.config.tree import Job, Layout
from meshwright.training import trial
from meshwright.training.data import Text
from meshwright.training.run_folder import RunFolder
from meshwright.training.schedule import set_learning_rate
from meshwright.training.step import Batch, State, StepResult, audited_step, step
from meshwright.training.trial import Trial

CPU = torch.device("cpu")


class PlantedClock:
    """A clock that only steps move: by so many seconds, by the layout that steps."""

    def __init__(self, cut_seconds: float, unsplit_seconds: float, unsplit: Layout | None = None) -> None:
        self.now, self._cut, self._unsplit, self._layout = 0.0, cut_seconds, unsplit_seconds, unsplit

    def perf_counter(self) -> float:
        """As that of `time`."""
        return self.now

    def step(self, state: State, batch: Batch, world: World) -> StepResult:
        """The real step."""
        layout = state.job.layout
        whole = layout.overlap == "none" if self._layout is None else layout == self._layout
        self.now += self._unsplit if whole else self._cut
        return step(state, batch, world)

    def plant(self, patch: pytest.MonkeyPatch) -> None:
        """Let trials go by this clock."""
        patch.setattr(trial, "time", self)
        patch.setattr(trial, "step", self.step)


class Ran(NamedTuple):
    """What a rank did after its trial."""

    layout: Layout
    losses: list[float]
    ledger: list[dict[str, Any]]
    weights: list[float]


def tried(job: Job, fallback: Layout, folder: RunFolder, seconds: Mapping[int, tuple[float, float]]) -> Ran:
    """The trial, in which rank r's clock counts `seconds[r]` for a step of the layout and of the fallback; the run."""
    world = World.create(job.layout, CPU)
    text = Text.open(job, world.rank)
    with pytest.MonkeyPatch.context() as patch:
        PlantedClock(*seconds[world.rank], unsplit=fallback).plant(patch)
        return _run(
            trial.settled(job, fallback, folder, text, world, lambda one: State.create(one, world)), text, world
        )


def untried(job: Job) -> Ran:
    """The run alone."""
    world = World.create(job.layout, CPU)
    return _run(job, Text.open(job, world.rank), world)


def agreed(pairs: Mapping[int, tuple[tuple[float, ...], tuple[float, ...]]]) -> Trial:
    """What is made of these measurements, on this rank."""
    world = World.create(Layout(replicate=len(pairs)), CPU)
    return trial.agreed(pairs[world.rank], world)


def _run(job: Job, text: Text, world: World) -> Ran:
    state, losses, ledger = State.create(job, world), [], []
    for index in range(job.training.steps):
        set_learning_rate(state.optimiser, job.training, index)
        batch = text.batch(index)
        if index == 1:
            result, account = audited_step(state, batch, world)
            ledger = account.ledger.to_json()
        else:
            result = step(state, batch, world)
        losses.append(float(result.loss))
    state.states.settle()
    weights = [float(one.parameter.detach().double().sum()) for one in state.states.owned]
    return Ran(job.layout, losses, ledger, weights)


SITE = """
import os
if "RANK" in os.environ:
    import pytest
    from ranked_trial import PlantedClock
    PlantedClock({cut}, {unsplit}).plant(pytest.MonkeyPatch())
"""


def planted_site(folder: Path, cut_seconds: float, unsplit_seconds: float) -> str:
    """PYTHONPATH under which the ranks of any launcher hold their trials by a planted clock."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE.format(cut=cut_seconds, unsplit=unsplit_seconds))
    return os.pathsep.join(filter(None, [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))

"""Who drops a `State` has its memory back: nothing that only C++ refers to may hold parameters, or what is theirs."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from jobs import tiny_job

from meshwright.comm.mesh import World
from meshwright.config.tree import Job, Layout
from meshwright.rehearsal.fake_world import fake_group
from meshwright.training.step import State, audited_step, step
from meshwright.verify.matrix import MODELS
from meshwright.verify.observe import observe_reference, own_batch

LAYOUTS = {
    "one device": Layout(recompute="full"),
    "zero 0": Layout(replicate=4, gradients="bucketed"),
    "zero 1": Layout(replicate=2, shard=2, zero=1, gradients="per_parameter"),
    "zero 3": Layout(replicate=2, shard=2, zero=3),
    "halves": Layout(replicate=2, tensor=2, sequence_parallel=True, half_batches=True),
}
MODEL = replace(MODELS["tied"], kv_heads=2)


def kept(state: State) -> list[torch.Tensor]:
    """All that a state keeps from step to step."""
    parameters = [*state.model.parameters(), *(parameter for _, parameter in state.states.owned)]
    states = [value for of in state.optimiser.state.values() for value in of.values()]
    return [*parameters, *states, *(p.grad for p in parameters if p.grad is not None)]


def after_steps(job: Job) -> list[weakref.ref[torch.Tensor]]:
    """What a state kept that is dropped when this returns; the second of its steps was audited."""
    with fake_group(job.layout.world, 0):
        world = World.create(job.layout, torch.device("cpu"))
        state, batch = State.create(job, world), own_batch(job, 0)
        step(state, batch, world)
        audited_step(state, batch, world)
        return [weakref.ref(tensor) for tensor in kept(state)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_state_keeps_dies_with_it(name: str) -> None:
    found = after_steps(tiny_job(MODEL, LAYOUTS[name]))
    gc.collect()
    assert len(found) > 20
    assert not sum(tensor() is not None for tensor in found)


def test_what_is_observed_holds_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    create = State.create

    def noted(*args: object, **kwargs: object) -> State:
        state = create(*args, **kwargs)  # type: ignore[arg-type]
        made.extend(map(weakref.ref, state.model.parameters()))
        return state

    monkeypatch.setattr(State, "create", noted)
    observation = observe_reference(tiny_job(), float64=False)
    gc.collect()
    assert made and not sum(parameter() is not None for parameter in made)
    assert observation.gradients

"""One training step: the same function for training, verification and rehearsal.

It never synchronises with the host (no `.item()`), so it runs on fake tensors and does not stall a GPU. The loss is a
sum of token losses divided by the number of labelled tokens of the whole global batch: never a mean of means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from meshwright.account import StepAccount
from meshwright.audit.recorder import Recorder
from meshwright.comm.mesh import World
from meshwright.comm.scope import scope
from meshwright.config.tree import Job
from meshwright.model.build import Values, build, initial_values, specs_of
from meshwright.model.decoder import Decoder
from meshwright.parallel.loss import IGNORE
from meshwright.parallel.replicate import Owned, States
from meshwright.schemes.params import ParamSpec
from meshwright.training import gradients
from meshwright.training.states import states_of

STEP_SITE = "step"


class Batch(NamedTuple):
    """This rank's part of the global batch, cut into A micro-batches.

    tokens    [A, B, S] int64
    labels    [A, B, S] int64, the next token or `IGNORE`
    positions [S] int64, global
    first     [A, B, U·S] int64, where documents are separate: the global position at which the document of each token
              begins that this rank attends for, once ulysses has exchanged sequence for heads; else None
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    first: torch.Tensor | None = None


class StepResult(NamedTuple):
    """Scalar tensors, equal on all ranks."""

    loss: torch.Tensor
    grad_norm: torch.Tensor


@dataclass
class State:
    """What a step changes: the model, its states, and the optimiser, which steps what this rank owns of them."""

    job: Job
    model: Decoder
    specs: tuple[ParamSpec, ...]
    states: States
    optimiser: torch.optim.Optimizer

    @classmethod
    def create(
        cls,
        job: Job,
        world: World,
        *,
        values_of: Values | None = initial_values,
        float64: bool = False,
        instrument: Callable[[Decoder, World], None] | None = None,
    ) -> State:
        """Build and initialise everything that a job needs on this rank.

        Arguments are those of `model.build.build`; `instrument` changes the model before its states are taken over.
        """
        model, specs = build(job, world, values_of=values_of, float64=float64), specs_of(job)
        if instrument is not None:
            instrument(model, world)
        states = states_of(job, model, specs, world)
        return cls(job, model, specs, states, _adamw(job, states.owned))


def _adamw(job: Job, owned: Sequence[Owned]) -> torch.optim.Optimizer:
    """Fused AdamW: no copies of parameters or gradients while it steps."""
    training = job.training
    groups: list[dict[str, Any]] = [
        {
            "params": [parameter for spec, parameter in owned if spec.decay == decay],
            "weight_decay": training.weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    betas = (training.beta1, training.beta2)
    if not owned:  # a rank that holds nothing but padding still takes part in every step
        groups[0]["params"] = [torch.nn.Parameter(torch.empty(0))]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=training.learning_rate, betas=betas, fused=True)


def step(state: State, batch: Batch, world: World) -> StepResult:
    """Forward, backward, gradient synchronisation, clipping, optimiser. Collective over the world."""
    loss = forward_backward(state, batch, world)
    grad_norm = gradients.clip(state.states.owned, state.specs, world, state.job.training.clip_norm)
    state.optimiser.step()
    state.states.publish()
    return StepResult(loss, grad_norm)


def audited_step(state: State, batch: Batch, world: World) -> tuple[StepResult, StepAccount]:
    """Take a step and account for it, on this rank. It should be the second: then the optimiser's states exist."""
    with Recorder() as recorder:
        result = step(state, batch, world)
    job = state.job
    return result, StepAccount.of(recorder.trace(), source="run", rank=world.rank, world=job.layout.world, job=job.name)


def forward_backward(state: State, batch: Batch, world: World) -> torch.Tensor:
    """Leave the gradients of the mean token loss of the global batch in what is owned; return that loss."""
    with scope(STEP_SITE, "forward"):
        count = (batch.labels != IGNORE).sum()
        counting = world.gradient_axis.all_reduce(count, site=STEP_SITE)  # backward needs it, forward does not
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        one_over_count = torch.zeros((), dtype=torch.float64, device=world.device)
    with scope(STEP_SITE, "backward"):
        state.states.begin()
    firsts = [None] * len(batch.tokens) if batch.first is None else batch.first
    for index, (tokens_BS, labels_BS, first_BS) in enumerate(zip(batch.tokens, batch.labels, firsts, strict=True)):
        loss = state.model(tokens_BS, labels_BS, batch.positions, first_BS)
        if index == 0:
            with scope(STEP_SITE, "forward"):
                one_over_count.copy_(counting.wait()).reciprocal_()
        if index + 1 == len(batch.tokens):
            state.states.last()
        loss.backward(one_over_count)
        total += loss.detach()
        del loss
    with scope(STEP_SITE, "backward"):
        state.states.finish()
    world.gradient_axis.all_reduce(total, site=STEP_SITE, phase="forward").wait()
    return total * one_over_count

"""Whole steps under data parallelism and sharded states as one rank takes them, ours and torch's (importable by name).

Jobs are tiny and legal; a function is run by all ranks of a job's layout and returns what its test compares. What has
no layout (`plain_*`) is run by the test itself, with plain autograd and torch's own optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from meshwright.account import Compute, Issue, StepAccount, Wait
from meshwright.audit.recorder import Recorder
from meshwright.comm.mesh import World
from meshwright.config.tree import Job, Layout
from meshwright.model.build import build, specs_of
from meshwright.model.decoder import Decoder
from meshwright.parallel.loss import IGNORE
from meshwright.parallel.shard import ShardedStates
from meshwright.training.step import Batch, State, audited_step, forward_backward, step
from meshwright.verify.observe import global_batch, own_batch, random_values

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


# --- ours -------------------------------------------------------------------------------------------------------------


def prepared(job: Job) -> tuple[State, Batch, World]:
    """A job's state on this rank, its part of the batch, and the world. Norms and biases are random, too."""
    world = World.create(job.layout, CPU)
    return State.create(job, world, values_of=random_values), own_batch(job, world.rank), world


def gradients(job: Job) -> Tensors:
    """What one backward pass leaves: of this rank's whole part of each parameter."""
    state, batch, world = prepared(job)
    forward_backward(state, batch, world)
    return {spec.name: state.states.whole_gradient(spec).clone() for spec in state.specs}


def parameters(state: State) -> Tensors:
    """This rank's whole part of each (`ParamSpec.local_shape`), however they are sharded. Collective."""
    if isinstance(state.states, ShardedStates):
        state.states.wait_for([spec.name for spec in state.specs])
    return {spec.name: _whole(state.model.get_parameter(spec.name)).clone() for spec in state.specs}


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Trained(NamedTuple):
    """Parameters after the last step, loss and gradient norm of each step, and the account of the last."""

    parameters: Tensors
    losses: list[float]
    grad_norms: list[float]
    account: StepAccount
    evaluations: list[float]


def trained(job: Job, steps: int = 3, num_evaluations: int = 0) -> Trained:
    """Some steps on one repeated batch; after each, some evaluations on it."""
    state, batch, world = prepared(job)
    losses, norms, evaluations = [], [], []
    for index in range(steps):
        if index + 1 < steps:
            result = step(state, batch, world)
        else:
            result, account = audited_step(state, batch, world)
        losses.append(float(result.loss))
        norms.append(float(result.grad_norm))
        evaluations += [_evaluated(state, batch, world) for _ in range(num_evaluations)]
    return Trained(parameters(state), losses, norms, account, evaluations)


@torch.no_grad()
def _evaluated(state: State, batch: Batch, world: World) -> float:
    """The mean token loss of a batch, as `training.loop.evaluate` finds it."""
    totals = torch.zeros(2, dtype=torch.float64)
    for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
        totals[0] += state.model(tokens, labels, batch.positions)
        totals[1] += (labels != IGNORE).sum()
    total, count = world.gradient_axis.all_reduce(totals, site="heldout", phase="control").wait().tolist()
    return total / count


def arrivals(job: Job) -> list[str]:
    """A step and the forward after it: `gather SITE` and `wait SITE` of parameters, `compute SITE` of that forward."""
    state, batch, world = prepared(job)
    step(state, batch, world)
    with Recorder() as recorder:
        state.optimiser.step()
        state.states.publish()
        _evaluated(state, batch, world)
    words, sent = [], {}
    for event in recorder.trace().expanded():
        if isinstance(event, Issue) and event.operation == "all_gather":
            sent[event.ticket] = event.site
            words.append(f"gather {event.site}")
        elif isinstance(event, Wait) and event.ticket in sent:
            words.append(f"wait {sent[event.ticket]}")
        elif isinstance(event, Compute) and event.phase == "forward":
            words.append(f"compute {event.site}")
    return words


# --- one device, plain ------------------------------------------------------------------------------------------------


def single(job: Job) -> Job:
    """The same job on one device."""
    return replace(job, layout=Layout())


def _plain_model(job: Job, *, float64: bool = False) -> Decoder:
    """Its tied head, if it has one, uses the embedding's table itself: autograd adds up the two shares."""
    model = build(single(job), World.single(CPU), values_of=random_values, float64=float64)
    model._head_weight = lambda: (model.embedding if job.model.tied else model.head).weight  # type: ignore[method-assign]
    return model


def _micro_losses(model: nn.Module, batch: Batch) -> Iterator[torch.Tensor]:
    """The loss of each micro-batch, over the labelled tokens of the global batch: it may be as large as one likes."""
    for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
        yield model(tokens, labels, batch.positions)


def one_over_count(job: Job) -> torch.Tensor:
    """One over the labelled tokens of the global batch."""
    return (global_batch(job)[1] != IGNORE).sum().double().reciprocal()


def plain_gradients(job: Job, rank: int, micro_batch: int) -> Tensors:
    """A rank's share of the gradient, of one micro-batch of its own, by plain autograd."""
    model, batch = _plain_model(job), own_batch(job, rank)
    one = batch._replace(tokens=batch.tokens[micro_batch, None], labels=batch.labels[micro_batch, None])
    (loss,) = _micro_losses(model, one)
    names = [spec.name for spec in specs_of(single(job))]
    found = torch.autograd.grad(loss, [model.get_parameter(name) for name in names], one_over_count(job))
    return dict(zip(names, found, strict=True))


def plain_training(job: Job, steps: int = 3, *, float64: bool = False) -> tuple[Tensors, Tensors]:
    """Parameters before and after some steps on the global batch: torch's AdamW, not fused, and its clipping."""
    model, batch = _plain_model(job, float64=float64), own_batch(single(job), 0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.AdamW(_groups(job, model), foreach=False, fused=False, **_settings(job))
    for _ in range(steps):
        optimiser.zero_grad()
        for loss in _micro_losses(model, batch):
            loss.backward(one_over_count(job))
        _clip(job, model)
        optimiser.step()
    return before, {name: parameter.detach() for name, parameter in model.named_parameters()}


def _groups(job: Job, model: Decoder) -> list[dict[str, Any]]:
    """Weight decay is its parameter's."""
    specs, decay = specs_of(single(job)), job.training.weight_decay
    return [
        {"params": [model.get_parameter(s.name) for s in specs if s.decay is kind], "weight_decay": decay * kind}
        for kind in (True, False)
    ]


def _settings(job: Job) -> dict[str, Any]:
    return {"lr": job.training.learning_rate, "betas": (job.training.beta1, job.training.beta2)}


def _clip(job: Job, model: nn.Module) -> None:
    if job.training.clip_norm:
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.training.clip_norm)


# --- torch's own data parallelism -------------------------------------------------------------------------------------


def ddp_gradients(job: Job) -> Tensors:
    """By DistributedDataParallel over all ranks, which averages: times the number of ranks, they are the sums."""
    model = _plain_model(job)
    _ddp_backward(job, model, DistributedDataParallel(model, bucket_cap_mb=0.002))
    return {name: parameter.grad.detach() for name, parameter in model.named_parameters() if parameter.grad is not None}


def _ddp_backward(job: Job, model: nn.Module, ddp: DistributedDataParallel) -> None:
    losses = list(range(job.training.accumulation))
    batch = own_batch(job, dist.get_rank())
    for index in losses:
        with nullcontext() if index == losses[-1] else ddp.no_sync():
            ddp(batch.tokens[index], batch.labels[index], batch.positions).backward(one_over_count(job))
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad *= dist.get_world_size()


def zero_redundancy(job: Job, steps: int = 3) -> Tensors:
    """Parameters after some steps of torch's ZeroRedundancyOptimizer over AdamW and DistributedDataParallel."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch.jit, which pytest would raise

    model = _plain_model(job)
    ddp = DistributedDataParallel(model)
    optimiser = ZeroRedundancyOptimizer(_groups(job, model), torch.optim.AdamW, **_settings(job))
    for _ in range(steps):
        optimiser.zero_grad()
        _ddp_backward(job, model, ddp)
        _clip(job, model)
        optimiser.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}

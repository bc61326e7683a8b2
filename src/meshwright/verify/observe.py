"""What one rank, or the one device of reference, did: loss, gradients, probes and the account of its second step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from meshwright.account import StepAccount
from meshwright.comm.mesh import World
from meshwright.config.tree import Job
from meshwright.model.build import DTYPES, initial_values
from meshwright.model.decoder import Decoder
from meshwright.parallel.loss import IGNORE
from meshwright.schemes.params import ParamSpec
from meshwright.training.shard import shard_batch
from meshwright.training.step import Batch, State, audited_step, forward_backward, step
from meshwright.verify.probes import Probes, probing

Instrument = Callable[[Decoder, World], None]
"""Changes a model before it is verified; tests plant bugs with it."""


@dataclass
class Observation:
    """All that is compared. Gradients are local parts, by parameter; the account is missing for references."""

    coordinates: dict[str, int]
    loss: float
    gradients: dict[str, torch.Tensor]
    probes: Probes
    account: StepAccount | None = None


def observe_rank(job: Job, instrument: Instrument | None = None) -> Observation:
    """One observed pass, then two steps, the second audited.

    Run by every rank of the layout, in an initialised process group.
    """
    world = World.create(job.layout, own_device(job))
    state = _prepare(job, world, instrument)
    batch = own_batch(job, world.rank, world.device)
    observation = _observe(state, batch, world)
    step(state, batch, world)
    _, observation.account = audited_step(state, batch, world)
    return observation


def observe_reference(job: Job, *, float64: bool) -> Observation:
    """One device in this process, in float64 or in the run's precision, gradients rounded to that of their sums.

    In float64 it is the CPU, whose attention takes it; else the kind that the job has.
    """
    if float64:
        job = replace(job, training=replace(job.training, device="cpu"))
    world = World.single(own_device(job))
    state = _prepare(job, world, None, float64=float64)
    batch = own_batch(job, 0, world.device)
    observation = _observe(state, batch, world)
    if not float64 and job.training.reduce_precision != "float32":
        low = DTYPES[job.training.reduce_precision]
        observation.gradients = {name: g.to(low).to(g.dtype) for name, g in observation.gradients.items()}
    return observation


def _prepare(job: Job, world: World, instrument: Instrument | None, *, float64: bool = False) -> State:
    return State.create(job, world, values_of=random_values, float64=float64, instrument=instrument)


def _observe(state: State, batch: Batch, world: World) -> Observation:
    with probing(state.model) as probes:
        loss = forward_backward(state, batch, world)
    gradients = {spec.name: state.states.whole_gradient(spec).detach().clone().cpu() for spec in state.specs}
    joined = probes.joined() if state.job.layout.halves else probes
    return Observation(world.layout.coordinates(world.rank), float(loss), gradients, joined)


def random_values(spec: ParamSpec, seed: int) -> torch.Tensor:
    """Initial values, but random for norm weights and biases: at ones and zeros, their wrong gradients could hide."""
    if spec.init == "normal":
        return initial_values(spec, seed)
    generator = torch.Generator().manual_seed(spec.seed(0))
    return torch.empty(spec.shape).normal_(std=0.2, generator=generator) + float(spec.init == "ones")


def own_device(job: Job) -> torch.device:
    """The CPU, or the GPU that this process has made its own."""
    if job.training.device == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def own_batch(job: Job, rank: int, device: torch.device | None = None) -> Batch:
    """A rank's part of the global batch."""
    whole = (*global_batch(job), document_starts(job))
    tokens, labels, first = (x if x is None or device is None else x.to(device) for x in whole)
    assert tokens is not None and labels is not None
    return shard_batch(tokens, labels, job, job.layout.coordinates(rank), first)


def document_starts(job: Job) -> torch.Tensor | None:
    """[batch, seq_len]: documents of other lengths in each sequence, some of one token; None if they are joined."""
    if job.training.documents == "joined":
        return None
    positions = torch.arange(job.training.seq_len)
    starts = [
        torch.where(positions * (b + 2) % 7 == 0, positions, 0).cummax(0).values for b in range(job.training.batch)
    ]
    return torch.stack(starts)


def global_batch(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and labels [batch, seq_len]; labels are missing in part, and unevenly among sequences."""
    training, vocab_size = job.training, job.model.vocab_size
    generator = torch.Generator().manual_seed(training.seed)
    text = torch.randint(0, vocab_size, (training.batch, training.seq_len + 1), generator=generator)
    tokens, labels = text[:, :-1].clone(), text[:, 1:].clone()  # slices of one sequence are views of one storage
    quarters = torch.arange(training.batch)[:, None] % 4 + 1
    kept = (quarters * training.seq_len // 4).clamp(min=1)
    labels[torch.arange(training.seq_len)[None, :] >= kept] = IGNORE
    return tokens, labels

"""What `bench matmul` times: problems, and for each its subjects, which differ only in how they communicate.

    B batch   S sequence   E d_model   T ranks   P elements

A problem is a matrix product at either end of a tensor-parallel region, one block, a whole step, or gradients that are
summed. Its subjects:

    compute     sends nothing: collectives return what the rank itself has
    unsplit     one after the other: our own ring, every hop waited for at once, then the whole product (gradients:
                one all-reduce after backward)
    none        as `overlap = "none"` runs: the backend's collectives, under what the program has left to do
    pipelined   `parallel.matmul`, k pieces a hop, around the ring one way or both
    bucketed    `parallel.replicate`, at a bucket size
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from meshwright.bench import gradients_rank
from meshwright.comm.collectives import Axis, Pending
from meshwright.comm.mesh import World
from meshwright.config.tree import Job, Layout, Model, Training
from meshwright.kernels.pointwise import rope_tables
from meshwright.model.build import build
from meshwright.model.decoder import Decoder
from meshwright.parallel.hierarchical import ring_all_gather, ring_reduce_scatter
from meshwright.parallel.sequence import Region
from meshwright.parallel.tensor import column_linear, row_linear
from meshwright.schemes.tape import Pipeline
from meshwright.training.step import Batch, State, step

CPU = torch.device("cpu")
SITE = "bench"

Kind = Literal["compute", "unsplit", "none", "pipelined", "bucketed"]
Shape = Literal["gather_matmul", "matmul_scatter", "block", "step", "buckets"]


class Subject(NamedTuple):
    """One way to communicate. `chunks` and `ring` are of `pipelined`, `bucket_mib` is of `bucketed`."""

    kind: Kind
    chunks: int = 1
    ring: Literal["unidirectional", "bidirectional"] = "unidirectional"
    bucket_mib: float = 25.0

    def __str__(self) -> str:
        if self.kind == "bucketed":
            return f"bucketed {self.bucket_mib:g} MiB"
        if self.kind != "pipelined":
            return self.kind
        return f"pipelined {self.chunks}{' bidirectional' * (self.ring == 'bidirectional')}"


@dataclass(frozen=True)
class Problem:
    """What is computed; the same over any number of ranks."""

    shape: Shape
    model: Model
    """Of products: `d_model` and `d_ff` are the features of both sides."""
    seq: int
    """Tokens of the one sequence; of `buckets`, of each rank's."""

    def job(self, subject: Subject, ranks: int) -> Job:
        """The job of a subject: over tensor × sequence parallelism, or, of gradients, replicated."""
        if self.shape == "buckets":
            return self.gradients.job(gradients_subject(subject), ranks)
        layout = Layout(tensor=ranks, sequence_parallel=True, overlap="none")
        if subject.kind == "pipelined":
            layout = replace(layout, overlap="pipelined", overlap_chunks=subject.chunks, overlap_ring=subject.ring)
        return Job(model=self.model, layout=layout, training=Training(batch=1, seq_len=self.seq, device="cpu"))

    @property
    def gradients(self) -> gradients_rank.Problem:
        """That of `bench gradients`."""
        return gradients_rank.Problem(self.model, self.seq)


def gradients_subject(subject: Subject) -> gradients_rank.Subject:
    """Its name in `bench gradients`."""
    kinds: dict[Kind, Any] = {"compute": "alone", "unsplit": "flat", "bucketed": "bucketed"}
    return gradients_rank.Subject(kinds[subject.kind], subject.bucket_mib)


# --- ways to communicate ----------------------------------------------------------------------------------------------


class SilentAxis(Axis):
    """An axis that sends nothing: what would come from others is this rank's own."""

    def all_reduce(self, tensor: torch.Tensor, **_: Any) -> Pending:
        """Not summed."""
        return Pending(tensor)

    def all_gather(self, tensor: torch.Tensor, *, dim: int = 0, **_: Any) -> Pending:
        """This rank's part, again and again."""
        return Pending(torch.cat([tensor] * self.size, dim))

    def reduce_scatter(self, tensor: torch.Tensor, *, dim: int = 0, **_: Any) -> Pending:
        """This rank's part, not summed."""
        return Pending(tensor.chunk(self.size, dim)[self.rank])


@dataclass(frozen=True)
class UnsplitRegion(Region):
    """A split region that is entered and left by rings of hops, each waited for before the next; one sequence."""

    def enter(self, x: torch.Tensor, site: str) -> Pending:
        """[1, S/T, E] -> [1, S, E]."""
        whole = x.new_empty(1, x.shape[1] * self.axis.size, x.shape[2])
        whole.chunk(self.axis.size, 1)[self.axis.rank].copy_(x)
        ring_all_gather(whole.flatten(), self.axis, site=site)
        return Pending(whole)

    def leave(self, y: torch.Tensor, site: str) -> Pending:
        """[1, S, E] -> the sum of this rank's [1, S/T, E]."""
        own_P = ring_reduce_scatter(y.flatten(), self.axis, site=site)
        return Pending(own_P.view(1, -1, y.shape[2]))


def world_of(job: Job, subject: Subject) -> World:
    """This rank's world, silent for `compute`. Collective."""
    world = World.create(job.layout, CPU)
    if subject.kind != "compute":
        return world
    silent = {name: SilentAxis(axis.name, axis.size, axis.rank) for name, axis in world.axes.items() if axis.size > 1}
    return replace(world, axes={**world.axes, **silent})


def region_of(job: Job, world: World, subject: Subject) -> Region:
    """The ends of the subject's tensor-parallel regions."""
    kind = UnsplitRegion if subject.kind == "unsplit" else Region
    return kind(world.axes["tensor"], split=True, pipeline=Pipeline.of(job.layout))


def _instrument(subject: Subject, job: Job) -> Callable[[Decoder, World], None]:
    def use(decoder: Decoder, world: World) -> None:
        region = region_of(job, world, subject)
        for module in decoder.modules():
            if isinstance(getattr(module, "region", None), Region):
                module.region = region  # type: ignore[assignment]

    return use


# --- what runs --------------------------------------------------------------------------------------------------------


class Work:
    """One subject of one problem, made once and run many times."""

    def reset(self) -> None:
        """Before a run, and not timed: let go of what the last one made."""

    def run(self) -> None:
        """What is timed."""
        raise NotImplementedError

    def results(self) -> list[torch.Tensor]:
        """What the last run computed: the same for every subject that communicates, but for rounding."""
        raise NotImplementedError


class Product(Work):
    """A matrix product, forward alone, at the beginning or at the end of a region."""

    def __init__(self, problem: Problem, subject: Subject) -> None:
        ranks = dist.get_world_size()
        job = problem.job(subject, ranks)
        self._region = region_of(job, world_of(job, subject), subject)
        self._gathers = problem.shape == "gather_matmul"
        model, generator = problem.model, torch.Generator().manual_seed(dist.get_rank())
        features = model.d_ff // ranks
        shape = (problem.seq // ranks, model.d_model) if self._gathers else (problem.seq, features)
        self._x = torch.randn(1, *shape, generator=generator)
        out, into = (features, model.d_model) if self._gathers else (model.d_model, features)
        self._w = torch.randn(out, into, generator=generator) / into**0.5
        self._y: torch.Tensor | None = None

    def reset(self) -> None:
        self._y = None

    def run(self) -> None:
        with torch.no_grad():
            if self._gathers:
                (self._y,) = column_linear(self._x, (self._w,), (None,), self._region, SITE)
            else:
                self._y = row_linear(self._x, self._w, None, self._region, SITE)

    def results(self) -> list[torch.Tensor]:
        assert self._y is not None
        return [self._y]


class OneBlock(Work):
    """Forward and backward of a block."""

    def __init__(self, problem: Problem, subject: Subject) -> None:
        job = problem.job(subject, dist.get_world_size())
        world = world_of(job, subject)
        decoder = build(job, world)
        _instrument(subject, job)(decoder, world)
        self._block, model = decoder.layers[0], problem.model
        generator = torch.Generator().manual_seed(dist.get_rank())
        shape = (1, problem.seq // world.layout.tensor, model.d_model)
        self._x, self._dy = (torch.randn(shape, generator=generator) for _ in range(2))
        self._x.requires_grad_()
        positions = torch.arange(problem.seq)
        self._rotary = rope_tables(positions, model.head_dim, model.rope_theta, model.rope_scaling, torch.float32)

    def reset(self) -> None:
        self._x.grad = None
        self._block.zero_grad(set_to_none=True)

    def run(self) -> None:
        self._block(self._x, self._rotary).backward(self._dy)

    def results(self) -> list[torch.Tensor]:
        return [tensor.grad for tensor in (self._x, *self._block.parameters()) if tensor.grad is not None]


class Step(Work):
    """A whole training step, optimiser included."""

    def __init__(self, problem: Problem, subject: Subject) -> None:
        job = problem.job(subject, dist.get_world_size())
        self._world = world_of(job, subject)
        instrument = _instrument(subject, job) if subject.kind == "unsplit" else None
        self._state = State.create(job, self._world, instrument=instrument)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, problem.model.vocab_size, (1, 1, problem.seq + 1), generator=generator)
        self._batch = Batch(tokens[..., :-1].clone(), tokens[..., 1:].clone(), torch.arange(problem.seq))
        self._told: list[torch.Tensor] = []

    def run(self) -> None:
        self._told = [*step(self._state, self._batch, self._world)]

    def results(self) -> list[torch.Tensor]:
        gradients = [p.grad for p in self._state.model.parameters() if p.grad is not None]
        return [*self._told, *(gradient.clone() for gradient in gradients)]


class Gradients(Work):
    """Forward and backward of `bench gradients`, and the sums of gradients."""

    def __init__(self, problem: Problem, subject: Subject) -> None:
        self._problem, self._subject = problem.gradients, gradients_subject(subject)
        self.times: gradients_rank.Times | None = None

    def run(self) -> None:
        self.times = gradients_rank.sample(self._problem, self._subject)

    def results(self) -> list[torch.Tensor]:
        return gradients_rank.gradients_of(self._problem, self._subject)


def make(problem: Problem, subject: Subject) -> Work:
    """Everything that a subject needs on this rank. Collective."""
    kinds: dict[str, Callable[[Problem, Subject], Work]] = {"block": OneBlock, "step": Step, "buckets": Gradients}
    return kinds.get(problem.shape, Product)(problem, subject)

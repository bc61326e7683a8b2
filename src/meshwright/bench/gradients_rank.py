"""What a rank does for `bench gradients`: forward, backward and the synchronisation of one subject, timed.

A subject is a way to sum gradients: one of our strategies or torch's DistributedDataParallel, at a bucket size. Each
has a model of its own, with the same values, which stays from sample to sample. Nothing is stepped: what is timed is
zeroing or dropping gradients, forward, backward and waiting for the sums. Before each sample ranks meet in a barrier.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from meshwright.comm.mesh import World
from meshwright.config.tree import Job, Layout, Model, Training
from meshwright.model.build import build
from meshwright.model.decoder import Decoder
from meshwright.schemes.params import param_specs
from meshwright.schemes.replicate import Bucket, Strategy, buckets
from meshwright.training.step import State
from meshwright.units import MIB

MODEL = Model(layers=8, d_model=384, d_ff=1024, heads=6, kv_heads=6, head_dim=64, vocab_size=4096)
"""17 million parameters: 66 MiB of gradients."""


class Subject(NamedTuple):
    """What is timed. `bucket_mib` is without a meaning for naive, flat and per_parameter; `alone` sends nothing."""

    kind: Literal["naive", "flat", "per_parameter", "bucketed", "ddp", "alone"]
    bucket_mib: float = 25.0

    def __str__(self) -> str:
        return f"{self.kind} {self.bucket_mib:g} MiB" if self.kind in ("bucketed", "ddp") else self.kind


@dataclass(frozen=True)
class Problem:
    """One model and batch; every rank has a sequence of its own."""

    model: Model = MODEL
    seq: int = 384

    def job(self, subject: Subject, ranks: int) -> Job:
        """The job of one of our own subjects."""
        own: dict[str, Strategy] = {"naive": "naive", "flat": "flat", "per_parameter": "per_parameter"}
        strategy = own.get(subject.kind, "bucketed")
        layout = Layout(replicate=ranks, gradients=strategy, bucket_mib=subject.bucket_mib)
        return Job(model=self.model, layout=layout, training=Training(batch=ranks, seq_len=self.seq, device="cpu"))

    def buckets(self, bucket_mib: float) -> tuple[Bucket, ...]:
        """Those of `bucketed`."""
        specs = param_specs(self.model, Layout(replicate=2), self.seq)
        return buckets(specs, "bucketed", int(bucket_mib * MIB))


class Times(NamedTuple):
    """Seconds of one sample on one rank, from the barrier on: until forward was over, backward was over (of DDP with
    all sums), the first bucket was ready (of `alone`; else 0), and all was over."""

    forward: float
    backward: float
    first_ready: float
    end: float


_made: dict[tuple[Problem, Subject], Any] = {}


def sample(problem: Problem, subject: Subject) -> Times:
    """Time one forward and backward of a subject, made at the first call. Collective."""
    key = problem, subject
    if key not in _made:
        _made[key] = (_Torch if subject.kind == "ddp" else _Ours)(problem, subject)
    return _made[key].sample()


def gradients_of(problem: Problem, subject: Subject) -> list[torch.Tensor]:
    """Copies of the gradients that the last sample of one of our own subjects left."""
    model = _made[problem, subject]._state.model
    return [parameter.grad.clone() for parameter in model.parameters()]


def communicate(problem: Problem, bucket_mib: float) -> tuple[float, float]:
    """Seconds of all buckets alone, put on the wire together as backward would, and of the last one alone."""
    sizes = [bucket.numel for bucket in problem.buckets(bucket_mib)]
    everything, last = _all_reduce(sizes), _all_reduce(sizes[-1:])
    return everything, last


def send_once(nbytes: int) -> float:
    """Seconds to all-reduce so many bytes."""
    return _all_reduce([nbytes // 4])


def forget() -> None:
    """Let go of all subjects."""
    _made.clear()


def _all_reduce(sizes: list[int]) -> float:
    tensors = [torch.zeros(size) for size in sizes]
    dist.barrier()
    began = time.perf_counter()
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in works:
        assert work is not None
        work.wait()
    return time.perf_counter() - began


def _batch(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(0, problem.model.vocab_size, (1, problem.seq + 1), generator=generator)
    return tokens[:, :-1].clone(), tokens[:, 1:].clone(), torch.arange(problem.seq)


class _Ours:
    """One of our strategies, or the same model on its own."""

    def __init__(self, problem: Problem, subject: Subject) -> None:
        job = problem.job(subject, dist.get_world_size())
        self._alone = subject.kind == "alone"
        world = World.create(job.layout, torch.device("cpu"))
        if self._alone:
            job, world = replace(job, layout=Layout()), World.single(torch.device("cpu"))
        self._state, self._batch = State.create(job, world), _batch(problem)
        self._first_ready = _Readiness()
        if self._alone:
            self._first_ready.watch(problem.buckets(subject.bucket_mib)[0], self._state.model)

    def sample(self) -> Times:
        states = self._state.states
        dist.barrier()
        began = time.perf_counter()
        states.begin()
        loss = self._state.model(*self._batch)
        forward = time.perf_counter()
        if not self._alone:
            states.last()
        loss.backward()
        backward = time.perf_counter()
        if not self._alone:
            states.finish()
        end = time.perf_counter()
        first_ready = self._first_ready.at - began if self._alone else 0.0
        return Times(forward - began, backward - began, first_ready, end - began)


class _Readiness:
    """When the gradients of a bucket were last complete. Hooks of its parameters hold this, and this holds none."""

    def __init__(self) -> None:
        self.at = 0.0
        self._names: set[str] = set()
        self._missing: set[str] = set()

    def watch(self, bucket: Bucket, model: Decoder) -> None:
        """From now on."""
        self._names = {spec.name for spec in bucket.members}
        self._missing = set(self._names)
        for name in self._names:
            model.get_parameter(name).register_post_accumulate_grad_hook(lambda _, name=name: self._ready(name))

    def _ready(self, name: str) -> None:
        self._missing.discard(name)
        if not self._missing:
            self.at, self._missing = time.perf_counter(), set(self._names)


class _Torch:
    """The same model in DistributedDataParallel."""

    def __init__(self, problem: Problem, subject: Subject) -> None:
        job = problem.job(subject, dist.get_world_size())
        model = build(job, World.single(torch.device("cpu")))
        self._model = DistributedDataParallel(model, bucket_cap_mb=subject.bucket_mib, gradient_as_bucket_view=True)
        self._batch = _batch(problem)

    def sample(self) -> Times:
        dist.barrier()
        began = time.perf_counter()
        self._model.zero_grad(set_to_none=True)
        loss = self._model(*self._batch)
        forward = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        return Times(forward - began, end - began, 0.0, end - began)

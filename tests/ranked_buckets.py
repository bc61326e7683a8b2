"""Where gradients live and when they are sent, as one rank sees it: of jobs, and of small modules (importable by name).

Small modules have whole numbers everywhere, so that every sum is exact in whatever order it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from ranked_states import prepared
from torch import nn

from meshwright.account import Compute, Event, Issue, Memory, Wait
from meshwright.audit.recorder import Recorder
from meshwright.comm.collectives import Axis, Pending
from meshwright.comm.mesh import World
from meshwright.config.tree import Job, Layout
from meshwright.parallel.replicate import GradientBuckets
from meshwright.schemes.params import ParamSpec
from meshwright.schemes.replicate import Bucket, Strategy, buckets
from meshwright.training.step import State, audited_step, step

WIDTH = 4
BUCKET_BYTES = 2 * WIDTH * WIDTH * 4
"""Two weights of a small module."""


# --- of a job ---------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a gradient lives: its storage (an address), that storage's size, and its own bytes in it."""

    storage: int
    storage_bytes: int
    start: int
    stop: int


def _places(state: State) -> dict[str, Place]:
    found = {}
    for spec in state.specs:
        gradient = state.model.get_parameter(spec.name).grad
        assert gradient is not None and gradient.is_contiguous(), spec.name
        storage, nbytes = gradient.untyped_storage(), gradient.numel() * gradient.element_size()
        start = gradient.data_ptr() - storage.data_ptr()
        found[spec.name] = Place(storage.data_ptr(), storage.nbytes(), start, start + nbytes)
    return found


class Homes(NamedTuple):
    """Places as the state is made and after each of two steps, and what the second step's account holds for them."""

    places: list[dict[str, Place]]
    allocated: list[int]
    """Sizes of the storages that were ever gradients."""
    at_peak: int


def homes(job: Job) -> Homes:
    """Where gradients live from the beginning on."""
    state, batch, world = prepared(job)
    places = [_places(state)]
    step(state, batch, world)
    places.append(_places(state))
    _, account = audited_step(state, batch, world)
    places.append(_places(state))
    memory = [event for event in account.trace.expanded() if isinstance(event, Memory)]
    allocated = [event.delta_bytes for event in memory if event.category == "gradients" and event.delta_bytes > 0]
    return Homes(places, allocated, account.footprint.bytes["gradients"])


class Course(NamedTuple):
    """Backward of a step: buckets sent and waited for, and the modules that computed, in order; one word an event."""

    words: list[str]

    def index(self, word: str) -> int:
        """The first such word."""
        return self.words.index(word)

    def last(self, prefix: str) -> int:
        """The last word that begins so."""
        return max(i for i, word in enumerate(self.words) if word.startswith(prefix))

    def all(self, prefix: str) -> list[str]:
        """What follows the prefix, in order."""
        return [word.removeprefix(prefix) for word in self.words if word.startswith(prefix)]


def course(job: Job) -> Course:
    """`send SITE`, `wait SITE` of float32 sums of gradients, `compute SITE` of the model."""
    state, batch, world = prepared(job)
    step(state, batch, world)
    _, account = audited_step(state, batch, world)
    return Course(_words(account.trace.expanded()))


def _words(events: object) -> list[str]:
    words, sent = [], {}
    for event in events:  # type: ignore[attr-defined]
        if isinstance(event, Issue) and event.phase == "backward" and event.dtype == "float32":
            sent[event.ticket] = event.site
            words.append(f"send {event.site}")
        elif isinstance(event, Wait) and event.ticket in sent:
            words.append(f"wait {sent[event.ticket]}")
        elif isinstance(event, Compute) and event.phase == "backward" and event.site not in ("step", "gradients"):
            words.append(f"compute {event.site}")
    return words


# --- of small modules -------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Weights [WIDTH, WIDTH] of small whole numbers, under single letters, in order of registration."""

    def __init__(self, names: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in names:
            weight = torch.randint(-2, 3, (WIDTH, WIDTH), generator=generator).float()
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self, x: torch.Tensor, path: str) -> torch.Tensor:
        """Multiply by the weights of a path, in its order."""
        for name in path:
            x = x @ self.get_parameter(name)
        return x.sum()


class Tied(Small):
    """The last weight of a path is used under two names."""

    def __init__(self, names: str) -> None:
        super().__init__(names)
        self.register_parameter("z", self.get_parameter(names[0]))


def small(kind: str, names: str) -> Small:
    """A module by its kind."""
    return {"small": Small, "tied": Tied}[kind](names)


def inputs(rank: int, micro_batch: int) -> torch.Tensor:
    """[2, WIDTH] small whole numbers, different everywhere."""
    generator = torch.Generator().manual_seed(10 * rank + micro_batch)
    return torch.randint(-2, 3, (2, WIDTH), generator=generator).float()


def plan(module: nn.Module, strategy: Strategy) -> tuple[Bucket, ...]:
    """The buckets of a small module."""
    specs = [ParamSpec(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]
    return buckets(specs, strategy, BUCKET_BYTES)


class Sums(NamedTuple):
    """Gradients, the sites sent before the end of each backward, and those sent by `finish`."""

    gradients: dict[str, torch.Tensor]
    sent: list[list[str]]


def summed(kind: str, names: str, strategy: Strategy, paths: list[list[str]], rounds: int = 1) -> Sums:
    """`paths[rank][micro_batch]` through a small module, `rounds` times over; what the last round did."""
    axis = World.create(Layout(replicate=dist.get_world_size()), torch.device("cpu")).axes["replicate"]
    module = small(kind, names)
    sites: list[str] = []
    held = GradientBuckets(dict(module.named_parameters()), plan(module, strategy), strategy, _sending(axis, sites))
    for _ in range(rounds):
        sites.clear()
        sent = _step(held, module, paths[axis.rank], sites)
    return Sums({name: parameter.grad.clone() for name, parameter in _with_gradients(module)}, sent)


def _sending(axis: Axis, sites: list[str]) -> Callable[[Bucket, torch.Tensor], Pending]:
    def send(bucket: Bucket, buffer: torch.Tensor) -> Pending:
        sites.append(bucket.site)
        return axis.all_reduce(buffer, site=bucket.site, phase="backward")

    return send


def _step(held: GradientBuckets, module: Small, paths: list[str], sites: list[str]) -> list[list[str]]:
    sent, rank = [], dist.get_rank()
    held.begin()
    for index, path in enumerate(paths):
        if index + 1 == len(paths):
            held.last()
        module(inputs(rank, index), path).backward()
        sent.append([*sites])
        sites.clear()
    held.finish()
    return [*sent, [*sites]]


def _with_gradients(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    found = [(name, parameter) for name, parameter in module.named_parameters()]
    assert all(parameter.grad is not None for _, parameter in found)
    return found


def plain_sums(kind: str, names: str, paths: list[list[str]]) -> dict[str, torch.Tensor]:
    """The gradients of all ranks and micro-batches on one device, by plain autograd."""
    module = small(kind, names)
    for rank, own in enumerate(paths):
        for index, path in enumerate(own):
            module(inputs(rank, index), path).backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in module.named_parameters()
    }


def recorded(strategy: Strategy, num_micro_batches: int) -> list[int]:
    """Collectives that the recorder has counted after each backward, and after `finish`."""
    axis = World.create(Layout(replicate=dist.get_world_size()), torch.device("cpu")).axes["replicate"]
    module = small("small", "abcd")
    held = GradientBuckets(dict(module.named_parameters()), plan(module, strategy), strategy, _sending(axis, []))
    counts = []
    with Recorder() as recorder:
        held.begin()
        for index in range(num_micro_batches):
            if index + 1 == num_micro_batches:
                held.last()
            module(inputs(axis.rank, index), "abcd").backward()
            counts.append(_num_issued(recorder.trace().events))
        held.finish()
        counts.append(_num_issued(recorder.trace().events))
    return counts


def _num_issued(events: tuple[Event, ...]) -> int:
    return sum(isinstance(event, Issue) for event in events)

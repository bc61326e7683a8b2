"""Sums by tiers: rewrite rules 1 and 2 of Centauri (Chen et al., ASPLOS 2024, sections 3.1 and 3.2).

Rule 1, primitives: an all-reduce is a reduce-scatter and then an all-gather. Rule 2, topology: a group of n ranks that
has r = n/h of them on each of h hosts sums inside hosts and between them, in three stages:

    flat_P          [P]      elements of each of n ranks, P a multiple of r
    reduce_scatter  [P] -> [P/r]    inside the host, r ranks: each is left with its part of the host's sum
    all_reduce      [P/r] -> [P/r]  between hosts, the h ranks that have the same part: the sum over all n
    all_gather      [P/r] -> [P]    inside the host, r ranks
    sent, elements  inside a host 2(r-1)/r·P, between hosts 2(h-1)/h·P/r; all at once it would be 2(n-1)/n·P
    saved           nothing, and no memory beside flat_P, in which all of it happens; a bucket is padded to r

So a host of r ranks sends 2(h-1)/h·P to others instead of 2(n-1)/n·P. In the account the axis of the group ends in
`:intra` or `:inter`.

Buckets (`schemes.replicate`) are a pipeline under backward: when one is sent, each that is on its way is waited for and
put on to its next stage, the youngest first, so that the slow wire between hosts has work before anything else is
waited for. What is issued in which order depends on nothing but the order of buckets, which all ranks share.

Rings move what the stages are made of by single hops, and are the same on every backend: gloo's own reduce-scatter
sends as much as its all-reduce. Training leaves its stages to the backend: between hosts that is an all-reduce, in
which gloo sends what the ring does; inside, where gloo sends twice as much, the wire is the fast one, and an account
that is the same on every backend is worth more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, Literal, NamedTuple, TypeVar

from meshwright.config.tiers import gradient_tiers
from meshwright.config.tree import Layout
from meshwright.schemes.matmul import Steps, gather_steps, scatter_steps
from meshwright.schemes.replicate import Bucket, Strategy, is_overlapped, sum_partial
from meshwright.schemes.tape import FLOAT32, Group, Pipeline, Tape

Stage = Literal["reduce_scatter", "all_reduce", "all_gather"]
STAGES: tuple[Stage, ...] = ("reduce_scatter", "all_reduce", "all_gather")
INTRA, INTER = ":intra", ":inter"
"""What the name of an axis ends in where it is one tier of it."""

T = TypeVar("T")


# --- a bucket after another -------------------------------------------------------------------------------------------


class Sum(Generic[T]):
    """What is on its way: the stage it is in, and what its caller waits for at the end of it."""

    def __init__(self, start: Callable[[Stage, T | None], T]) -> None:
        self._start, self._stage = start, 0
        self.ticket = start(STAGES[0], None)

    @property
    def is_in_last_stage(self) -> bool:
        """Whether there is nothing left to put it on to."""
        return self._stage + 1 == len(STAGES)

    def put_on(self) -> None:
        """Into the next stage."""
        self._stage += 1
        self.ticket = self._start(STAGES[self._stage], self.ticket)


class Relay(Generic[T]):
    """The order of stages, for the formula and the executor alike.

    A `start` of the caller's issues a stage, after it has waited for the ticket of the one before, and returns its own.
    """

    def __init__(self) -> None:
        self._on_the_way: list[Sum[T]] = []

    def send(self, start: Callable[[Stage, T | None], T]) -> Sum[T]:
        """Issue the first stage, then put on what was sent before."""
        sent = Sum(start)
        self._put_on()
        self._on_the_way.append(sent)
        return sent

    def finish(self, sent: Sum[T]) -> T:
        """Put everything on to its last stage; the ticket that is left to wait for."""
        while self._on_the_way:
            self._put_on()
        return sent.ticket

    def _put_on(self) -> None:
        for sent in reversed(self._on_the_way):
            sent.put_on()
        self._on_the_way = [sent for sent in self._on_the_way if not sent.is_in_last_stage]


# --- formula ----------------------------------------------------------------------------------------------------------


class TierGroups(NamedTuple):
    """The two subgroups as formulas see them."""

    intra: Group
    inter: Group


def tier_groups(layout: Layout, devices_per_host: int) -> TierGroups | None:
    """Those of the gradient group of a legal layout; None where it is summed all at once."""
    sizes = gradient_tiers(layout, devices_per_host)
    if sizes is None:
        return None
    name = layout.gradient_axis
    return TierGroups(Group(name + INTRA, sizes.intra), Group(name + INTER, sizes.inter))


class HierarchicalSums:
    """Sums of buckets on a tape: `send` them in their order, then `finish` each."""

    def __init__(self, tape: Tape, groups: TierGroups) -> None:
        self._tape, self._groups, self._relay = tape, groups, Relay[int]()

    def send(self, bucket: Bucket) -> Sum[int]:
        """All in it is final."""
        return self._relay.send(partial(self._start, bucket))

    def finish(self, bucket: Bucket, sent: Sum[int]) -> None:
        """Wait for the sum."""
        ticket = self._relay.finish(sent)
        with self._tape.at(bucket.site, "backward"):
            self._tape.wait(ticket)

    def _start(self, bucket: Bucket, stage: Stage, before: int | None) -> int:
        group = self._groups.inter if stage == "all_reduce" else self._groups.intra
        numel = bucket.shard_numel if stage == "all_reduce" else bucket.numel
        with self._tape.at(bucket.site, "backward"):
            if before is not None:
                self._tape.wait(before)
            return self._tape.issue(stage, group, "float32", numel * FLOAT32)


def synchronise(tape: Tape, parts: Sequence[Bucket], strategy: Strategy, groups: TierGroups) -> None:
    """Sum every bucket over the gradient group by tiers, then the partial ones over their own, whole."""
    sums, sent = HierarchicalSums(tape, groups), []
    for bucket in parts:
        sent.append((bucket, sums.send(bucket)))
        if not is_overlapped(strategy):
            sums.finish(*sent.pop())
    for one in sent:
        sums.finish(*one)
    sum_partial(tape, parts, whole=True)


# --- rings ------------------------------------------------------------------------------------------------------------


class Hop(NamedTuple):
    """A message of a ring: which of the equal parts of a tensor is sent, and which one comes."""

    sends: int
    receives: int
    send_to: int
    receive_from: int


_WHOLE = Pipeline(1)
"""A part is not cut."""


def reduce_scatter_hops(rank: int, size: int) -> tuple[Hop, ...]:
    """Each part visits all ranks, its owner last, and every one adds its own: n-1 hops of P/n elements."""
    return _hops(scatter_steps(rank, size, 1, _WHOLE))


def all_gather_hops(rank: int, size: int) -> tuple[Hop, ...]:
    """Each part goes on from its owner to all others: n-1 hops of P/n elements."""
    return _hops(gather_steps(rank, size, 1, _WHOLE))


def _hops(steps: Steps) -> tuple[Hop, ...]:
    """From what is held at each step of a ring: it goes on, and what the next step holds comes."""
    held = [step[0] for step in steps]
    return tuple(Hop(now.part, then.part, now.send_to, now.receive_from) for now, then in itertools.pairwise(held))

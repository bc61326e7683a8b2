"""Data parallelism by formula: ranks split the batch and sum the gradients (Li et al. 2020, PyTorch Distributed).

A bucket is a flat float32 buffer in which the gradients of some parameters live and are summed together. The strategies
differ in how parameters are put into buckets, and in when a bucket is sent:

    naive           a bucket a parameter; after the last backward, one after another, each waited for
    flat            one bucket; after the last backward
    per_parameter   a bucket a parameter; sent as soon as its gradient is final, waited for after backward
    bucketed        buckets of `bucket_mib` in order of readiness; sent as soon as all in it are final

Each sends the P elements of all gradients once in the last micro-batch of a step: P elements in as many all-reduces as
there are buckets. A gradient is added to where it lives, so a bucket costs no memory but its padding, which only
sharding has (`schemes.shard`).

Gradients become final in the reverse of the order of registration, near enough, on every rank alike; buckets are filled
and sent in that order. The first bucket is smaller, so that the wire has work early. A parameter whose gradient is
partial over other ranks besides (`ParamSpec.partial_over`) shares a bucket with its likes only, the last one of all:
once it is summed over the gradient group, it is summed over those ranks, without a copy where it is one bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from meshwright.schemes.params import ParamSpec
from meshwright.schemes.tape import FLOAT32, Group, Tape

Strategy = Literal["naive", "flat", "per_parameter", "bucketed"]
FIRST_BUCKET_BYTES = 2**20
"""The most that the first bucket of `bucketed` holds, unless one parameter is larger."""
PARTIAL_SITE = "gradients"


@dataclass(frozen=True)
class Bucket:
    """Parameters whose gradients are sent together, in order of readiness."""

    site: str
    """What the account calls it: the parameter, or the number of the bucket."""
    members: tuple[ParamSpec, ...]
    ranks: int = 1
    """Into how many parts it is cut: by ranks that shard it (`schemes.shard`) or that sum it by parts
    (`schemes.hierarchical`)."""

    @property
    def partial_over(self) -> tuple[str, int] | None:
        """Axis and size of the group over which all its gradients are partial, besides the gradient group."""
        return self.members[0].partial_over

    @property
    def numel(self) -> int:
        """Elements of the buffer: those of its members, padded to a multiple of the ranks."""
        return self.ranks * self.shard_numel

    @property
    def shard_numel(self) -> int:
        """Elements of a rank's equal part of the buffer."""
        return -(-sum(spec.local_numel for spec in self.members) // self.ranks)

    def places(self) -> Iterator[tuple[ParamSpec, int]]:
        """Each member, and the element at which it begins."""
        start = 0
        for spec in self.members:
            yield spec, start
            start += spec.local_numel


def is_overlapped(strategy: Strategy) -> bool:
    """Whether buckets are sent while backward runs."""
    return strategy in ("per_parameter", "bucketed")


def buckets(specs: Sequence[ParamSpec], strategy: Strategy, bucket_bytes: int, ranks: int = 1) -> tuple[Bucket, ...]:
    """All parameters in buckets, in the order in which they are sent."""
    if strategy == "naive":
        return tuple(Bucket(spec.name, (spec,), ranks) for spec in specs)
    ready = specs[::-1]
    if strategy == "per_parameter":
        return tuple(Bucket(spec.name, (spec,), ranks) for spec in ready)
    whole = [spec for spec in ready if spec.partial_over is None]
    groups = dict.fromkeys(spec.partial_over for spec in ready if spec.partial_over is not None)
    partial = [tuple(spec for spec in ready if spec.partial_over == group) for group in groups]
    filled = [tuple(whole)] if strategy == "flat" else _filled(whole, bucket_bytes)
    parts = [part for part in (*filled, *partial) if part]
    return tuple(Bucket(f"bucket.{index}", members, ranks) for index, members in enumerate(parts))


def _filled(specs: Iterable[ParamSpec], bucket_bytes: int) -> Iterator[tuple[ParamSpec, ...]]:
    """A bucket is closed by the parameter that would make it too large."""
    members: list[ParamSpec] = []
    limit, held = min(FIRST_BUCKET_BYTES, bucket_bytes), 0
    for spec in specs:
        nbytes = spec.local_numel * FLOAT32
        if members and held + nbytes > limit:
            yield tuple(members)
            members, limit, held = [], bucket_bytes, 0
        members.append(spec)
        held += nbytes
    if members:
        yield tuple(members)


def synchronise(tape: Tape, parts: Sequence[Bucket], group: Group) -> None:
    """Sum every bucket over the gradient group, then the partial ones over their own.

    Written after backward, whenever they are sent: what is sent does not depend on it, and nothing is allocated.
    """
    for bucket in parts:
        with tape.at(bucket.site, "backward"):
            tape.wait(tape.all_reduce(group, "float32", bucket.numel * FLOAT32))
    sum_partial(tape, parts)


def sum_partial(tape: Tape, parts: Sequence[Bucket], *, whole: bool = False) -> None:
    """One all-reduce for each group over which gradients are partial; several buckets of it go through a copy.

    Of each bucket the own part, or the `whole`.
    """
    for (axis, size), own in partial_buckets(parts).items():
        nbytes = sum(bucket.numel if whole else bucket.shard_numel for bucket in own) * FLOAT32
        with tape.at(PARTIAL_SITE, "backward"), tape.holding(nbytes if len(own) > 1 else 0, "communication_buffers"):
            tape.elementwise(4 * nbytes if len(own) > 1 else 0)
            tape.wait(tape.all_reduce(Group(axis, size), "float32", nbytes))


def partial_buckets(parts: Iterable[Bucket]) -> dict[tuple[str, int], list[Bucket]]:
    """The buckets of each group over which gradients are partial."""
    groups: dict[tuple[str, int], list[Bucket]] = {}
    for bucket in parts:
        if bucket.partial_over is not None:
            groups.setdefault(bucket.partial_over, []).append(bucket)
    return groups

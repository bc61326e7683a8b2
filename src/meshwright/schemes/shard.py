"""Sharded states by formula: ZeRO-1 (Rajbhandari et al. 2020, section 5.1), and what FSDP gathers (`schemes.fsdp`).

States are divided over shard × ring × ulysses, N ranks; `replicate` holds copies of the shards (HSDP).

zero 1   Parameters and gradients live in the same buckets (`schemes.replicate`), each padded to a multiple of N, of
         which every rank owns an equal part. It alone has the optimiser's states of that part, and steps it.

    gradients    reduce-scatter of the bucket over the N ranks, in place, then, if there are replicas, an all-reduce of
                 the own part over them: P + P/N elements in a step
    parameters   after the step, an all-gather of the bucket, in place, in the order in which the next forward needs
                 them, each waited for by the first module that does: P elements in a step
    memory       float32 parameters 4P, gradients 4P, optimiser states 8P/N bytes

A rank's part of a bucket is cut where parameters begin and end: each piece is a parameter of the optimiser's, because
weight decay is its parameter's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from meshwright.schemes.params import ParamSpec
from meshwright.schemes.replicate import Bucket, sum_partial
from meshwright.schemes.tape import FLOAT32, Group, Tape


class Piece(NamedTuple):
    """Elements [start, stop) of a bucket's buffer: what one rank owns of one parameter."""

    spec: ParamSpec
    start: int
    stop: int


def pieces(bucket: Bucket, coordinate: int) -> Iterator[Piece]:
    """What the rank at this coordinate of the N owns of a bucket; none of the padding."""
    first, last = coordinate * bucket.shard_numel, (coordinate + 1) * bucket.shard_numel
    for spec, begin in bucket.places():
        start, stop = max(first, begin), min(last, begin + spec.local_numel)
        if start < stop:
            yield Piece(spec, start, stop)


def scatter_gradients(tape: Tape, parts: Sequence[Bucket], states: Group, replicas: Group) -> None:
    """Leave the sums of each bucket's own part on its owner, when backward is over."""
    for bucket in parts:
        with tape.at(bucket.site, "backward"):
            tape.wait(tape.issue("reduce_scatter", states, "float32", bucket.numel * FLOAT32))
    sum_parts(tape, parts, replicas)


def sum_parts(tape: Tape, parts: Sequence[Bucket], replicas: Group) -> None:
    """Sum each bucket's own part over the replicas, all at once, then what is partial."""
    tickets = []
    for bucket in parts:
        with tape.at(bucket.site, "backward"):
            tickets.append(tape.all_reduce(replicas, "float32", bucket.shard_numel * FLOAT32))
    for bucket, ticket in zip(parts, tickets, strict=True):
        with tape.at(bucket.site, "backward"):
            tape.wait(ticket)
    sum_partial(tape, parts)


def in_order_of_need(parts: Sequence[Bucket], names: Iterable[str]) -> list[Bucket]:
    """The buckets as forward first needs something of them; `names` are all parameters in order of registration."""
    position = {name: index for index, name in enumerate(names)}
    return sorted(parts, key=lambda bucket: min(position[spec.name] for spec in bucket.members))


def gather_parameters(tape: Tape, parts: Sequence[Bucket], names: Iterable[str], states: Group) -> None:
    """Give every rank the stepped parameters; they arrive under the next forward. `names` as of `in_order_of_need`."""
    for bucket in in_order_of_need(parts, names):
        with tape.at(bucket.site, "optimiser"):
            queue = tape.queue(parameters_queue(bucket))
            tape.issue("all_gather", states, "float32", bucket.numel * FLOAT32, queue)


def parameters_queue(bucket: Bucket) -> str:
    """The queue of a bucket's gathers: a step waits for that of the step before."""
    return f"parameters of {bucket.site}"

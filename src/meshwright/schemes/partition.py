"""Which overlaps a layout could have: rewrite rules after Centauri (Chen et al. 2024), and their compositions.

Communication hides under computation that does not need it. A rule makes such pairs by cutting one operation into
several, along one of three dimensions, at one of three levels:

    primitive   a collective becomes others that send the same: a gather of T parts is T-1 shifts, an all-reduce is a
                reduce-scatter and an all-gather
    group       a collective over a group becomes several over parts of it: inside hosts first, then between them
    workload    a collective of everything becomes several of chunks, each under the computation of another chunk

    operation   one product and the collective beside it (`schemes.matmul`)
    layer       attention and MLP of one half of the batch beside those of the other (`schemes.halves`)
    model       gradients under backward, gathered parameters under the layers before

A rule is a function from a layout to the layouts that it could become, itself not among them; what else a layout has
stays as it is, half-batches and sums by tiers that were asked for among it. Rules touch options of their own, so that
any of them compose: the candidates of a layout are itself and whatever any choice of rules makes of it. Nothing is
judged here: which of them is legal is `config.legality`'s to say, and which is fastest the timeline's
(`planner.overlap`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from meshwright.config.tree import Layout

CHUNKS = (1, 2, 4, 8)
"""Pieces into which a hop is cut."""
BUCKETS_MIB = (2.0, 8.0, 32.0, 64.0)
"""That many are tried beside `auto`'s own, of the closed form."""
MOST_PREFETCH = 2
"""Units ahead of the one that computes: one more than what fully_shard does by itself."""


class Rule(NamedTuple):
    """One way to rewrite a layout."""

    name: str
    rewrites: Callable[[Layout], tuple[Layout, ...]]


class Candidate(NamedTuple):
    """A layout, and the names of the rules that made it."""

    layout: Layout
    rules: tuple[str, ...]


def unsplit(layout: Layout) -> Layout:
    """The layout with no rule applied: operations whole, in program order, but for what was asked for by name."""
    return replace(layout, overlap="none")


def candidates(layout: Layout, rules: Sequence[Rule] | None = None) -> Iterator[Candidate]:
    """The unsplit layout, and all compositions of rules on it, fewer rules first."""
    start, rules = unsplit(layout), RULES if rules is None else rules
    for count in range(len(rules) + 1):
        for chosen in itertools.combinations(rules, count):
            made = [start]
            for rule in chosen:
                made = [rewritten for one in made for rewritten in rule.rewrites(one)]
            yield from (Candidate(one, tuple(rule.name for rule in chosen)) for one in made)


def _pipelined(layout: Layout) -> tuple[Layout, ...]:
    """Shifts, and sums of slices, under the product beside them.

    Which way around stays as it is: the timeline has one queue a link, so it cannot tell the two apart.
    """
    if layout.tensor == 1 or layout.half_batches:
        return ()
    return tuple(replace(layout, overlap="pipelined", overlap_chunks=chunks) for chunks in CHUNKS)


def _half_batches(layout: Layout) -> tuple[Layout, ...]:
    """Attention of one half beside MLP of the other; not beside products that are cut themselves."""
    if layout.tensor == 1 or layout.half_batches or layout.overlap != "none":
        return ()
    return (replace(layout, half_batches=True),)


def _hierarchical(layout: Layout) -> tuple[Layout, ...]:
    """Sums of gradients by tiers."""
    if layout.hierarchical or layout.gradient_group_size == 1 or layout.state_axes:
        return ()
    return (replace(layout, hierarchical=True),)


def _buckets(layout: Layout) -> tuple[Layout, ...]:
    """Gradients in buckets of other sizes; only where the size is the timeline's to choose."""
    if layout.bucket_mib != "auto" or layout.gradients != "bucketed":
        return ()
    if layout.gradient_group_size == 1 or layout.zero_stage > 1:
        return ()
    return tuple(replace(layout, bucket_mib=size) for size in BUCKETS_MIB)


def _prefetch(layout: Layout) -> tuple[Layout, ...]:
    """Units gathered further ahead."""
    if layout.zero_stage < 2 or not layout.state_axes:
        return ()
    return (replace(layout, prefetch=MOST_PREFETCH),) if layout.prefetch < MOST_PREFETCH else ()


RULES = (
    Rule("pipelined products", _pipelined),  # primitives and workload of an operation
    Rule("half batches", _half_batches),  # workload of a layer
    Rule("hierarchical sums", _hierarchical),  # primitives and groups, in the model
    Rule("buckets", _buckets),  # workload of the model
    Rule("prefetch", _prefetch),
)

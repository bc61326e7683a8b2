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
stays as it is. Rules touch options of their own, so that any of them compose: the candidates of a layout are itself and
whatever any choice of rules makes of it. Nothing is judged here: which of them is legal is `config.legality`'s to say,
and which is fastest the timeline's (`planner.overlap`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from meshwright.config.tree import Layout

Dimension = Literal["primitive", "group", "workload"]
Level = Literal["operation", "layer", "model"]
Way = Literal["unidirectional", "bidirectional"]

CHUNKS = (1, 2, 4, 8)
"""Pieces into which a hop is cut."""
BUCKETS_MIB = (2.0, 8.0, 25.0, 64.0)
PREFETCHES = (1, 2)


class Rule(NamedTuple):
    """One way to rewrite a layout."""

    name: str
    dimensions: tuple[Dimension, ...]
    level: Level
    rewrites: Callable[[Layout], tuple[Layout, ...]]


class Candidate(NamedTuple):
    """A layout, and the names of the rules that made it."""

    layout: Layout
    rules: tuple[str, ...]


def unsplit(layout: Layout) -> Layout:
    """The layout with no rule applied: every operation whole, in program order."""
    return replace(layout, overlap="none", half_batches=False, hierarchical=False)


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
    """Shifts, and sums of slices, under the product beside them. Two ways around differ from one above two ranks."""
    if layout.tensor == 1:
        return ()
    both = layout.tensor > 2 and layout.sequence_parallel
    ways: tuple[Way, ...] = ("unidirectional", "bidirectional") if both else ("unidirectional",)
    return tuple(
        replace(layout, overlap="pipelined", overlap_chunks=chunks, overlap_ring=way)
        for way in ways
        for chunks in CHUNKS
        if way == "unidirectional" or chunks > 1
    )


def _half_batches(layout: Layout) -> tuple[Layout, ...]:
    """Attention of one half beside MLP of the other; not beside products that are cut themselves."""
    return (replace(layout, half_batches=True),) if layout.tensor > 1 and layout.overlap == "none" else ()


def _hierarchical(layout: Layout) -> tuple[Layout, ...]:
    """Sums of gradients by tiers."""
    return (replace(layout, hierarchical=True),) if layout.gradient_group_size > 1 and not layout.state_axes else ()


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
    return tuple(replace(layout, prefetch=count) for count in PREFETCHES if count > layout.prefetch)


RULES = (
    Rule("pipelined products", ("primitive", "workload"), "operation", _pipelined),
    Rule("half batches", ("workload",), "layer", _half_batches),
    Rule("hierarchical sums", ("primitive", "group"), "model", _hierarchical),
    Rule("buckets", ("workload",), "model", _buckets),
    Rule("prefetch", ("workload",), "model", _prefetch),
)

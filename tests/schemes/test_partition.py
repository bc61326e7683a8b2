"""Rewrite rules and their compositions: which layouts a layout could become."""

import itertools
from dataclasses import fields, replace

from meshwright.config.tree import Layout
from meshwright.schemes.partition import CHUNKS, RULES, Rule, candidates, unsplit

LAYOUT = Layout(replicate=4, tensor=4, sequence_parallel=True, bucket_mib="auto")


def test_the_unsplit_layout_comes_first_and_once():
    found = list(candidates(replace(LAYOUT, overlap="pipelined", hierarchical=True)))
    assert [c for c in found if not c.rules] == found[:1]
    assert found[0].layout == replace(LAYOUT, overlap="none", hierarchical=True)


def test_what_was_asked_for_by_name_stays():
    """Half-batches and sums by tiers are in every candidate then, and nothing is cut twice."""
    asked = replace(LAYOUT, half_batches=True, hierarchical=True)
    found = list(candidates(asked))
    assert all(c.layout.half_batches and c.layout.hierarchical for c in found)
    assert {c.rules for c in found} == {(), ("buckets",)}


def test_every_choice_of_rules_is_composed():
    """Each rule gives the layout some rewrites; a composition has as many as their product."""
    sizes = {rule.name: len(rule.rewrites(unsplit(LAYOUT))) for rule in RULES}
    expected = {"pipelined products": 4, "half batches": 1, "hierarchical sums": 1, "buckets": 4, "prefetch": 0}
    assert sizes == expected
    found = list(candidates(LAYOUT))
    for count in range(len(RULES) + 1):
        for rules in itertools.combinations(sizes, count):
            product = 0 if {"pipelined products", "half batches"} <= set(rules) else 1  # both cut the same
            for name in rules:
                product *= sizes[name]
            assert sum(c.rules == rules for c in found) == product
    assert len({c.layout for c in found}) == len(found)


def test_rules_touch_options_of_their_own():
    """So any order of applying them gives the same layouts."""
    touched = {}
    for rule, layout in itertools.product(RULES, [unsplit(LAYOUT), unsplit(Layout(shard=2))]):
        for rewritten in rule.rewrites(layout):
            changed = {f.name for f in fields(Layout) if getattr(rewritten, f.name) != getattr(layout, f.name)}
            assert changed
            touched.setdefault(rule.name, set()).update(changed)
    assert set(touched) == {rule.name for rule in RULES}
    for a, b in itertools.combinations(touched.values(), 2):
        assert not a & b


def test_a_rule_leaves_alone_what_it_cannot_cut():
    names = {c.rules for c in candidates(Layout())}
    assert names == {()}
    assert {c.rules for c in candidates(Layout(tensor=2))} == {(), ("pipelined products",), ("half batches",)}
    two_ways = Layout(tensor=4, sequence_parallel=True, overlap_ring="bidirectional")
    assert {c.layout.overlap_ring for c in candidates(two_ways)} == {"bidirectional"}
    assert {c.rules for c in candidates(Layout(replicate=2))} == {(), ("hierarchical sums",)}
    assert {c.rules for c in candidates(Layout(shard=2))} == {(), ("prefetch",)}
    assert {c.rules for c in candidates(Layout(shard=2, zero=1))} == {()}


def test_a_size_of_buckets_that_was_given_stays():
    assert {c.layout.bucket_mib for c in candidates(replace(LAYOUT, bucket_mib=3.0))} == {3.0}


def test_other_rules_compose_alike():
    twice = Rule("twice", lambda layout: (replace(layout, prefetch=2 * layout.prefetch),))
    more = Rule("once more", lambda layout: (replace(layout, prefetch=layout.prefetch + 1),))
    found = {c.rules: c.layout.prefetch for c in candidates(Layout(prefetch=3), [twice, more])}
    assert found == {(): 3, ("twice",): 6, ("once more",): 4, ("twice", "once more"): 7}


def test_chunks_are_those_that_double():
    assert CHUNKS == (1, 2, 4, 8)

"""What `overlap = auto` chooses, and why: prices by the timeline, or given by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from meshwright.account import Ledger, Timeline
from meshwright.config.files import load_job
from meshwright.config.tree import Cluster, Device, Job, Layout, Link, Model, Training
from meshwright.planner.overlap import Decision, decide, described, priced, resolve, summary
from meshwright.planner.step import formula

MODEL = Model(layers=8, d_model=512, d_ff=1408, heads=8, kv_heads=8, head_dim=64, vocab_size=4096)


def cluster(inter: Link, intra: Link, *, flops: float = 2e11, per_host: int = 2) -> Cluster:
    device = Device(peak_flops={"float32": flops})
    return Cluster(device=device, hosts=2, devices_per_host=per_host, intra=intra, inter=inter)


def job(layout: Layout, on: Cluster, **training: int) -> Job:
    batch = layout.batch_ranks
    return Job(
        model=MODEL, layout=layout, cluster=on, training=Training(batch=batch, seq_len=256, device="cpu", **training)
    )


def best_by_rules(decision: Decision) -> dict[tuple[str, ...], float]:
    best: dict[tuple[str, ...], float] = {}
    for option in decision.options:
        best[option.rules] = min(best.get(option.rules, math.inf), option.seconds)
    return best


def test_a_composition_is_chosen_where_neither_rule_alone_wins() -> None:
    """10 ms a call between hosts. Sums by tiers of one large bucket expose three stages one after the other; smaller
    buckets expose more calls. Small buckets whose stages run beside each other do neither."""
    on = cluster(inter=Link(1e-2, 1e9), intra=Link(1e-4, 1e10))
    decision = decide(job(Layout(replicate=4, bucket_mib="auto"), on))
    best = best_by_rules(decision)
    unsplit = best[()]
    assert best["hierarchical sums",] > unsplit
    assert best["buckets",] > unsplit
    assert best["hierarchical sums", "buckets"] < 0.99 * unsplit
    assert decision.chosen.rules == ("hierarchical sums", "buckets")
    assert decision.chosen.seconds <= min(best.values()) * 1.005


def test_products_are_cut_where_the_wire_is_slow_and_calls_are_cheap() -> None:
    layout = Layout(tensor=4, sequence_parallel=True)
    slow = cluster(inter=Link(1e-6, 1e9), intra=Link(1e-6, 1e9))
    decision = decide(job(layout, slow))
    assert decision.chosen.rules == ("pipelined products",)
    assert decision.chosen.exposed_seconds < 0.5 * decision.unsplit.exposed_seconds


def test_products_are_left_whole_where_a_call_costs_more_than_it_hides() -> None:
    layout = Layout(tensor=4, sequence_parallel=True)
    decision = decide(job(layout, cluster(inter=Link(5e-3, 1e12), intra=Link(5e-3, 1e12), flops=1e13)))
    assert decision.chosen is decision.unsplit
    assert len(decision.options) > 1
    assert min(option.seconds for option in decision.options[1:]) > decision.unsplit.seconds


def test_more_pieces_pay_until_calls_cost_more() -> None:
    """Of the seconds by the number of pieces, none rises before it falls."""
    on = cluster(inter=Link(2e-4, 2e8), intra=Link(2e-4, 2e8), flops=4e10)
    decision = decide(job(Layout(tensor=2), on))
    seconds = [o.seconds for o in decision.options if o.job.layout.overlap_ring == "unidirectional" and o.rules]
    turns = [b > a for a, b in itertools.pairwise(seconds)]
    assert turns == sorted(turns)


def test_nothing_is_priced_where_nothing_is_exposed_or_known() -> None:
    alone = decide(job(Layout(), cluster(inter=Link(1, 1), intra=Link(1, 1))))
    assert len(alone.options) == 1
    unknown = replace(job(Layout(tensor=2), cluster(inter=Link(), intra=Link())), cluster=Cluster())
    decision = decide(unknown)
    assert len(decision.options) == 1
    assert decision.chosen.job.layout.overlap == "none"
    assert summary(decision) == "overlap: nothing cut; no time is known on this cluster"


def test_what_was_given_stays() -> None:
    for overlap in ("none", "pipelined"):
        given = job(Layout(tensor=2, overlap=overlap), cluster(inter=Link(1e-6, 1e9), intra=Link(1e-6, 1e9)))
        assert resolve(given) is given
        assert [option.job for option in decide(given).options] == [given]


def test_a_resolved_job_is_resolved() -> None:
    auto = job(Layout(tensor=2, replicate=2), cluster(inter=Link(1e-6, 1e8), intra=Link(1e-6, 1e8)))
    once = resolve(auto)
    assert once.layout.overlap == "pipelined"
    assert resolve(once) is once


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(tensor=4, sequence_parallel=True), Layout(replicate=4)])
def test_candidates_send_the_same_over_each_axis(layout: Layout) -> None:
    """Up to rounding; sums by tiers send what `schemes.hierarchical` declares, over axes of their own."""
    decision = decide(job(layout, cluster(inter=Link(1e-5, 1e8), intra=Link(1e-5, 1e8))))
    sent = by_axis(decision.unsplit.account.ledger)
    compared = 0
    for option in decision.options[1:]:
        if option.job.layout.hierarchical:
            continue
        compared += 1
        for axis, nbytes in by_axis(option.account.ledger).items():
            assert nbytes == pytest.approx(sent[axis], rel=1e-4)
    assert compared or layout.replicate > 1


def by_axis(ledger: Ledger) -> dict[str, int]:
    return {axis: ledger.wire_bytes(axis) for axis in ledger.axes()}


def price_of(seconds: dict[str, float], memory: dict[str, int] | None = None):
    """Prices given by hand, by what is described."""

    def price(job: Job):
        what = described(job.layout)
        account = formula(job)
        timeline = Timeline(seconds.get(what, 9.0), {("tensor", "forward"): seconds.get(what, 9.0) / 2}, 1.0)
        footprint = account.footprint
        if memory is not None:
            footprint = replace(footprint, bytes={"parameters": memory.get(what, 0)})
        return replace(account, timeline=timeline, footprint=footprint)

    return price


def test_of_near_equals_the_simplest() -> None:
    on = cluster(inter=Link(1e-5, 1e8), intra=Link(1e-5, 1e8))
    found = decide(
        job(Layout(tensor=2), on),
        price_of({"nothing cut": 2.0, "products in 2 chunks": 1.001, "products in 8 chunks": 1.0}),
    )
    assert described(found.chosen.job.layout) == "products in 2 chunks"
    found = decide(job(Layout(tensor=2), on), price_of({"nothing cut": 1.004, "products in 8 chunks": 1.0}))
    assert found.chosen is found.unsplit


def test_what_does_not_fit_loses() -> None:
    on = cluster(inter=Link(1e-5, 1e8), intra=Link(1e-5, 1e8))
    on = replace(on, device=replace(on.device, memory_bytes=100))
    seconds = {"nothing cut": 2.0, "products in 4 chunks": 1.0, "products in 8 chunks": 1.5}
    found = decide(job(Layout(tensor=2), on), price_of(seconds, {"products in 4 chunks": 101}))
    assert described(found.chosen.job.layout) == "products in 8 chunks"


def test_the_account_keeps_choice_and_prices() -> None:
    auto = job(Layout(tensor=2), cluster(inter=Link(1e-6, 1e8), intra=Link(1e-6, 1e8)))
    decision = decide(auto)
    kept = decision.account().to_json()["overlap"]
    assert kept["chosen"] in kept["candidates"]
    assert kept["chosen"]["overlap"] == "pipelined"
    assert len(kept["candidates"]) == len(decision.options) == 5
    assert kept["candidates"][0]["rules"] == []
    assert all(row["step_seconds"] > row["exposed_seconds"] > 0 for row in kept["candidates"])


def test_descriptions() -> None:
    both = Layout(tensor=4, overlap="pipelined", overlap_chunks=1, overlap_ring="bidirectional", hierarchical=True)
    assert described(both) == "products in 1 chunk, both ways around + hierarchical sums"
    assert described(Layout(bucket_mib=8.0, prefetch=2)) == "buckets of 8 MiB + 2 units ahead"
    quickstart = load_job(
        "quickstart", [("layout.tensor", "2"), ("layout.overlap", "none"), ("training.device", "cpu")]
    )
    assert summary(decide(quickstart)).startswith("overlap: nothing cut, ")
    assert priced(quickstart).timeline.step_seconds == decide(quickstart).chosen.seconds

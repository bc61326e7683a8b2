"""The size of a bucket: the one that is set, or the best for the links of the job's cluster."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from meshwright.config.tree import Cluster, Device, Job, Layout, Link, Model, Training
from meshwright.planner.buckets import bucket_bytes
from meshwright.planner.flops import backward_seconds
from meshwright.planner.step import formula
from meshwright.rehearsal.rehearse import rehearse_job
from meshwright.schemes.params import num_parameters
from meshwright.units import MIB
from meshwright.verify.agreement import differences_of

MODEL = Model(layers=4, d_model=64, d_ff=192, heads=4, kv_heads=4, head_dim=16, vocab_size=128)
CLUSTER = Cluster(hosts=4, devices_per_host=2, intra=Link(1e-6, 1e9), inter=Link(1e-4, 1e8))


def job(layout: Layout, cluster: Cluster = CLUSTER) -> Job:
    training = Training(batch=8, seq_len=32, device="cpu")
    return Job(model=MODEL, layout=replace(layout, bucket_mib="auto"), cluster=cluster, training=training)


def test_a_size_that_is_set() -> None:
    assert bucket_bytes(Job(layout=Layout(replicate=2, bucket_mib=1.5))) == 3 * MIB // 2


@pytest.mark.parametrize(
    ("layout", "wire_per_byte", "link"),
    [
        (Layout(replicate=2), 1.0, CLUSTER.intra),  # an all-reduce sends 2(n-1)/n of its payload
        (Layout(replicate=8), 2 * 7 / 8, CLUSTER.inter),
        (Layout(replicate=4, tensor=2), 2 * 3 / 4, CLUSTER.inter),
        (Layout(shard=4, zero=1), 2 * 3 / 4, CLUSTER.inter),  # a reduce-scatter (n-1)/n, twice that over gloo
        (Layout(replicate=2, shard=2, zero=1, tensor=2), 2 * 1 / 2, CLUSTER.inter),
    ],
)
def test_automatic_size_is_the_models_for_the_link(layout: Layout, wire_per_byte: float, link: Link) -> None:
    """A CPU without a known peak computes as long as there is to send: sqrt(s·w·o), in whole buckets."""
    found = bucket_bytes(job(layout))
    nbytes = 4 * num_parameters(MODEL, 32) // layout.tensor
    ideal = math.sqrt(nbytes * (link.bandwidth / wire_per_byte) * link.latency_seconds)
    assert found == pytest.approx(nbytes / max(1, round(nbytes / ideal)), rel=0.2)


@pytest.mark.parametrize(
    ("intra", "seconds_per_byte"),
    [
        (Link(1e-6, 1e9), 2 * 3 / 4 / 2 / 1e8),  # half of a bucket goes between 4 hosts
        (Link(1e-6, 1e7), 3 * 1 / 2 / 1e7),  # gloo sends a reduce-scatter twice, and the gather once
    ],
)
def test_automatic_size_of_sums_by_tiers(intra: Link, seconds_per_byte: float) -> None:
    """The slower tier sets the pace, all three calls cost their latency."""
    own = job(Layout(replicate=8, hierarchical=True), replace(CLUSTER, intra=intra))
    nbytes, latency = 4 * num_parameters(MODEL, 32), 2 * intra.latency_seconds + CLUSTER.inter.latency_seconds
    ideal = math.sqrt(nbytes / seconds_per_byte * latency)
    assert bucket_bytes(own) == pytest.approx(nbytes / max(1, round(nbytes / ideal)), rel=0.2)


def test_a_fast_device_has_less_to_hide_under() -> None:
    """Once backward is shorter than the transfer: n* = sqrt(t_bwd/o)."""
    fast = replace(CLUSTER, device=Device(peak_flops={"float32": 2e12}))
    own = job(Layout(replicate=8), fast)
    seconds = backward_seconds(own)
    assert seconds is not None
    num_buckets = max(1, round(math.sqrt(seconds / CLUSTER.inter.latency_seconds)))
    assert bucket_bytes(own) == -(-4 * num_parameters(MODEL, 32) // num_buckets)
    assert bucket_bytes(own) > bucket_bytes(job(Layout(replicate=8)))


@pytest.mark.parametrize("hierarchical", [False, True])
def test_formula_and_rehearsal_take_the_same_buckets(hierarchical: bool) -> None:
    own = job(Layout(replicate=8, hierarchical=hierarchical))
    planned, rehearsed = formula(own), rehearse_job(own)
    assert sum(key.site.startswith("bucket.") for key in planned.ledger.rows) > 3
    assert not list(differences_of(planned, rehearsed))

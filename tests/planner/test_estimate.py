"""Time by formula: tiers, costs by hand, and what is not known stays unknown."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.account import Compute, Issue, LedgerKey, StepAccount, Trace, Wait
from meshwright.config.tree import AXES, Cluster, Device, Job, Layout, Link, Training
from meshwright.planner.estimate import JobCosts, estimate, mfu
from meshwright.planner.wire import call_seconds, collective_seconds, tier

DEVICE = Device(name="toy", kind="cuda", peak_flops={"bf16": 1000.0}, memory_bandwidth=50.0)
PRODUCT = Compute("matmul", 5000, 0, "forward", "")
CLUSTER = Cluster(device=DEVICE, devices_per_host=8, intra=Link(1.0, 100.0), inter=Link(2.0, 10.0, links=6))


def toy(layout: Layout, *events: Compute | Issue | Wait, cluster: Cluster = CLUSTER) -> tuple[StepAccount, Job]:
    job = Job(layout=layout, cluster=cluster, training=Training(precision="bf16"))
    account = StepAccount.of(Trace(events), source="formula", rank=0, world=layout.world)
    return estimate(account, job), job


def test_a_step_on_the_timeline() -> None:
    """2 hosts of 8. Forward 5000 FLOPs at half of 1000/s: 10 s. Backward 10000: 20 s. A sum of 400 B at 50 B/s: 8 s.

    Forward all-reduce over tensor 8 of 800 B: 2·7/8·800 = 1400 B at 100 B/s + 1 s = 15 s, waited for at once.
    Two all-reduces over replicate 2 of 30 B: 2·1/2·30 = 30 B at 10 B/s + 2 s = 5 s each; of the second, sent at the
    end of backward, nothing is hidden. Together 10 + 15 + 20 + 5 + 8 s.
    """
    gradient = Issue("all_reduce", "replicate", 2, "float32", 30, "backward", "w", 2)
    account, _ = toy(
        Layout(replicate=2, tensor=8),
        Compute("matmul", 5000, 0, "forward", ""),
        Issue("all_reduce", "tensor", 8, "bfloat16", 800, "forward", "x", 1),
        Wait(1, "forward", "x"),
        Compute("matmul", 5000, 0, "backward", ""),
        gradient,
        Compute("attention", 5000, 0, "backward", ""),
        gradient._replace(ticket=3),
        Wait(2, "backward", "w"),
        Wait(3, "backward", "w"),
        Compute("elementwise", 0, 400, "optimiser", ""),
    )
    assert account.time_model == "timeline"
    assert account.timeline.step_seconds == pytest.approx(58)
    assert account.timeline.compute_seconds == pytest.approx(38)
    assert account.timeline.exposed == pytest.approx({("tensor", "forward"): 15, ("replicate", "backward"): 5})
    spans = account.timeline.spans
    assert [(s.lane, s.phase, round(s.start_seconds), round(s.end_seconds)) for s in spans] == [
        ("compute", "forward", 0, 10),
        ("tensor:intra", "forward", 10, 25),
        ("compute", "backward", 25, 35),
        ("replicate:inter", "backward", 35, 40),
        ("compute", "backward", 35, 45),
        ("replicate:inter", "backward", 45, 50),
        ("compute", "optimiser", 50, 58),
    ]


def test_without_a_memory_bandwidth_only_products_take_time() -> None:
    unknown = replace(CLUSTER, device=replace(DEVICE, memory_bandwidth=0.0))
    account, _ = toy(Layout(), Compute("elementwise", 0, 400, "forward", ""), cluster=unknown)
    assert account.timeline.step_seconds == 0


def test_efficiency_is_the_devices() -> None:
    half, full = (replace(CLUSTER, device=replace(DEVICE, efficiency=share)) for share in (0.5, 1.0))
    seconds = [toy(Layout(), PRODUCT, cluster=cluster)[0].timeline.step_seconds for cluster in (half, full)]
    assert seconds == pytest.approx([10, 5])


def test_gloo_sends_a_reduce_scatter_twice() -> None:
    """1 s and 7/8·800 B at 100 B/s: 7 s with NCCL, 14 s with gloo."""
    event = Issue("reduce_scatter", "tensor", 8, "float32", 800, "forward", "x", 1)
    job = Job(layout=Layout(tensor=8), cluster=CLUSTER, training=Training(precision="bf16"))
    seconds = []
    for device in ("cuda", "cpu"):
        on = replace(job, training=replace(job.training, device=device))
        seconds.append(JobCosts.of(on).transfer(event).seconds)
    assert seconds == pytest.approx([8, 15])


def test_a_part_of_an_axis_is_on_the_lane_of_its_name() -> None:
    job = Job(layout=Layout(replicate=16), cluster=CLUSTER, training=Training(precision="bf16"))
    costs = JobCosts.of(job)
    for axis, link_name in (("replicate:intra", "intra"), ("replicate:inter", "inter")):
        found = costs.transfer(Issue("all_reduce", axis, 2, "float32", 8, "backward", "w", 1))
        assert (found.lane, found.link) == (axis, link_name)


def test_a_tree_has_fewer_hops_and_sends_more() -> None:
    """8 ranks. Ring: 14 hops, 2·7/8 of 800 B at 100 B/s; tree: 6 hops, twice 800 B."""
    key = LedgerKey("all_reduce", "tensor", 8, "forward", "", "bfloat16", 800)
    assert call_seconds(key, CLUSTER.intra) == pytest.approx(1 + 14)
    assert call_seconds(key, CLUSTER.intra, algorithm="tree") == pytest.approx(6 / 14 + 16)
    assert call_seconds(key, CLUSTER.intra, algorithm="auto") == pytest.approx(15)
    small = key._replace(payload_bytes=8)
    assert call_seconds(small, CLUSTER.intra, algorithm="auto") == pytest.approx(6 / 14 + 0.16)
    gather = key._replace(operation="all_gather")
    assert call_seconds(gather, CLUSTER.intra, algorithm="tree") == call_seconds(gather, CLUSTER.intra)


def test_a_hierarchical_sum_crosses_hosts_with_a_part() -> None:
    """2 hosts of 8, 1600 B: inside 2 × (1 s + 7/8·1600 B at 100 B/s), between hosts 2 s + 200 B at 10 B/s."""
    key = LedgerKey("all_reduce", "replicate", 16, "backward", "", "float32", 1600)
    seconds = {
        algorithm: collective_seconds(key, Layout(replicate=16), CLUSTER, backend="nccl", algorithm=algorithm)
        for algorithm in ("ring", "hierarchical")
    }
    assert seconds == pytest.approx({"ring": 2 + 300, "hierarchical": 2 * (1 + 14) + 2 + 20})


def test_of_a_torus_one_link_counts() -> None:
    key = LedgerKey("shift", "ring", 4, "forward", "", "bfloat16", 100)
    assert call_seconds(key, replace(CLUSTER.inter, links=1)) == call_seconds(key, CLUSTER.inter) == 2 + 100 / 10


def test_without_a_peak_there_is_no_time() -> None:
    unknown = replace(CLUSTER, device=replace(DEVICE, peak_flops={"float32": 1.0}))
    account, _ = toy(Layout(), Compute("matmul", 1, 0, "forward", ""), cluster=unknown)
    assert (account.timeline.step_seconds, account.timeline.spans) == (None, ())


def test_without_a_bandwidth_there_is_no_time() -> None:
    unknown = replace(CLUSTER, inter=Link())
    issue = Issue("all_reduce", "replicate", 16, "float32", 8, "backward", "w", 1)
    account, _ = toy(Layout(replicate=16), issue, cluster=unknown)
    assert account.timeline.step_seconds is None


def test_a_link_that_nobody_uses_may_be_unknown() -> None:
    issue = Issue("all_reduce", "tensor", 8, "float32", 8, "backward", "w", 1)
    account, _ = toy(Layout(tensor=8), issue, cluster=replace(CLUSTER, inter=Link()))
    assert account.timeline.step_seconds is not None


@pytest.mark.parametrize(
    ("axis", "size", "layout", "expected"),
    [
        ("tensor", 8, Layout(tensor=8, replicate=8), "intra"),
        ("replicate", 8, Layout(tensor=8, replicate=8), "inter"),
        ("tensor", 16, Layout(tensor=16), "inter"),
        ("tensor", 4, Layout(tensor=16), "intra"),  # a subgroup of neighbours, such as shared KV heads
        ("replicate", 4, Layout(replicate=4, tensor=2), "intra"),
        ("tensor", 3, Layout(tensor=3, replicate=4), "inter"),  # ranks 6, 7, 8 are on two hosts
        ("tensor", 3, Layout(tensor=3, replicate=2), "intra"),  # but six ranks have one host
        ("shard*ring", 8, Layout(replicate=2, shard=4, ring=2), "intra"),
        ("shard*ring", 8, Layout(shard=4, ring=2, tensor=2), "inter"),
        ("?", 2, Layout(replicate=16), "inter"),
        ("world", 16, Layout(replicate=16), "inter"),
        ("replicate:intra", 8, Layout(replicate=16), "intra"),
        ("replicate:inter", 2, Layout(replicate=16), "inter"),
    ],
)
def test_tier(axis: str, size: int, layout: Layout, expected: str) -> None:
    assert tier(axis, size, layout, CLUSTER) == expected


@given(
    st.lists(st.integers(1, 4), min_size=6, max_size=6).filter(lambda degrees: math.prod(degrees) <= 256),
    st.integers(1, 12),
    st.sampled_from(AXES),
)
def test_tier_is_where_the_ranks_are(degrees: list[int], per_host: int, axis: str) -> None:
    """Against the definition: list every group and look at the hosts of its ranks."""
    layout = Layout(**dict(zip(AXES, degrees, strict=True)))
    if layout.degree(axis) == 1:
        return
    groups: dict[tuple[tuple[str, int], ...], set[int]] = {}
    for rank in range(layout.world):
        others = tuple((a, c) for a, c in layout.coordinates(rank).items() if a != axis)
        groups.setdefault(others, set()).add(rank // per_host)
    expected = "intra" if all(len(hosts) == 1 for hosts in groups.values()) else "inter"
    assert tier(axis, layout.degree(axis), layout, replace(CLUSTER, devices_per_host=per_host)) == expected


def test_mfu_is_a_share_of_the_peak() -> None:
    assert mfu(360, 2.0, DEVICE, "bf16") == pytest.approx(360 / 2000)


@pytest.mark.parametrize(
    ("seconds", "device", "precision"), [(None, DEVICE, "bf16"), (2.0, None, "bf16"), (2.0, DEVICE, "float32")]
)
def test_mfu_of_the_unknown_is_unknown(seconds: float | None, device: Device | None, precision: str) -> None:
    assert mfu(360, seconds, device, precision) is None

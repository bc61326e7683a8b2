"""The independent witness of the ledger: what interfaces count in a step is its wire bytes, times the backend's factor.

Formula, rehearsal and run might share a mistake; the kernel's counters know nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ranked_witness

from meshwright.account import Ledger
from meshwright.comm.lab_ranks import LabRanks
from meshwright.config.backends import backend_factor
from meshwright.config.tree import Cluster, Job, Layout, Model, Training
from meshwright.lab import Lab, obstacle

MODEL = Model(layers=3, d_model=128, d_ff=384, heads=4, kv_heads=4, head_dim=32, vocab_size=512)
"""0.8 million parameters: 3 MB of gradients."""
TOLERANCE = 0.03
LEAST_BYTES = 1_000_000

LAYOUTS = {
    "naive": Layout(replicate=2, gradients="naive"),
    "flat": Layout(replicate=2, gradients="flat"),
    "per_parameter": Layout(replicate=2, gradients="per_parameter"),
    "bucketed": Layout(replicate=2, bucket_mib=0.5),
    "zero 1": Layout(shard=2, zero=1, bucket_mib=0.5),
    "zero 2": Layout(shard=2, zero=2),
    "zero 3": Layout(shard=2, zero=3),
    "tensor": Layout(tensor=2),
    "tensor, sequence parallel": Layout(tensor=2, sequence_parallel=True),
    "ulysses": Layout(ulysses=2),
    "ring": Layout(ring=2),
    "ring, recomputed": Layout(ring=2, recompute="full"),
}


@pytest.fixture(scope="module")
def lab_ranks() -> Iterator[tuple[Lab, LabRanks]]:
    if (why := obstacle()) is not None:
        pytest.skip(why)
    with Lab(hosts=2) as lab, LabRanks(lab, timeout_seconds=60.0) as ranks:
        yield lab, ranks


def expected_bytes(ledger: Ledger) -> float:
    """What a rank sends in a step by its ledger."""
    return sum(n * key.wire_bytes * backend_factor("gloo", key.operation) for key, n in ledger.rows.items())


@pytest.mark.parametrize("name", LAYOUTS)
def test_interfaces_count_what_the_ledger_says(name: str, lab_ranks: tuple[Lab, LabRanks]) -> None:
    lab, ranks = lab_ranks
    training = Training(batch=2, seq_len=512, device="cpu")
    job = Job(name=name, model=MODEL, layout=LAYOUTS[name], training=training)
    ledgers = ranks.run(ranked_witness.prepare, job)
    before = lab.counters()
    ranks.run(ranked_witness.step_once, job)
    after = lab.counters()
    for host, ledger in enumerate(ledgers):
        expected = expected_bytes(ledger)
        sent = after[host]["eth0"].sent_bytes - before[host]["eth0"].sent_bytes
        assert expected >= LEAST_BYTES
        assert sent == pytest.approx(expected, rel=TOLERANCE), f"host {host}: {sent / expected:.4f}"


@pytest.fixture(scope="module")
def two_by_two() -> Iterator[tuple[Lab, LabRanks]]:
    if (why := obstacle()) is not None:
        pytest.skip(why)
    with Lab(hosts=2) as lab, LabRanks(lab, per_host=2, timeout_seconds=60.0) as ranks:
        yield lab, ranks


@pytest.mark.parametrize(
    ("tier", "interface"), [pytest.param("intra", "lo", marks=pytest.mark.slow), ("inter", "eth0")]
)
def test_each_tier_goes_over_its_own_interface(tier: str, interface: str, two_by_two: tuple[Lab, LabRanks]) -> None:
    """Ranks of a host talk over its loopback; between hosts goes what the ledger's rows of that tier say."""
    lab, ranks = two_by_two
    layout = Layout(replicate=4, bucket_mib=0.5, hierarchical=True)
    training, cluster = Training(batch=4, seq_len=64, device="cpu"), Cluster(hosts=2, devices_per_host=2)
    job = Job(tier, MODEL, layout, cluster, training)
    ledgers = ranks.run(ranked_witness.prepare, job)
    before = lab.counters()
    ranks.run(ranked_witness.step_once, job)
    after = lab.counters()
    for host in range(2):
        own = [_of_tier(ledger, tier) for ledger in ledgers[2 * host : 2 * host + 2]]
        expected = sum(map(expected_bytes, own))
        sent = after[host][interface].sent_bytes - before[host][interface].sent_bytes
        assert expected >= LEAST_BYTES
        assert sent == pytest.approx(expected, rel=TOLERANCE), f"host {host}: {sent / expected:.4f}"


def _of_tier(ledger: Ledger, tier: str) -> Ledger:
    return Ledger({key: n for key, n in ledger.rows.items() if key.axis == f"replicate:{tier}"})

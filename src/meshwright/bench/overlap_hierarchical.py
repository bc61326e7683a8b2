"""Sums over hosts of several ranks: by one ring of all, and by tiers; both are our own rings (`parallel.hierarchical`).

Links between hosts are slow, those inside them as fast as the machine. A ring of all n ranks sends 2(n-1)/n·P over
every link; by tiers the ranks of a host together send 2(h-1)/h·P. The ratio of the two is the limit: 1.5 with 2 hosts ×
2 ranks, 1.75 with 2 × 4.

Each is measured whole and in segments, in which a ring keeps its wire busy while it adds, and compared at its best.

    P elements   n ranks   h hosts
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, Literal

import torch
import torch.distributed as dist

from meshwright.account import Ledger
from meshwright.audit.recorder import Recorder
from meshwright.bench import record
from meshwright.bench.overlap_rows import NOTE
from meshwright.bench.pairs import ratio_row
from meshwright.comm.lab_ranks import LabRanks
from meshwright.comm.mesh import World
from meshwright.comm.ranks import RankError
from meshwright.config.tree import Layout
from meshwright.lab import Lab
from meshwright.parallel.hierarchical import hierarchical_ring_all_reduce, ring_all_reduce

HOSTS = 2
RANKS_PER_HOST = (2, 4)
RATE = "50mbit"
PAYLOAD_BYTES = 4 * 2**20
TARGETS = {2: 1.35, 4: 1.5}
SITE = "bench"
WARM_UP = 1

Way = Literal["flat", "hierarchical"]
WAYS: tuple[Way, ...] = ("flat", "hierarchical")
SEGMENTS = (1, 4)
SUBJECTS = tuple((way, segments) for segments in SEGMENTS for way in WAYS)


def limit(hosts: int, per_host: int) -> float:
    """Bytes of a host's link: of a ring of all its ranks, over those by tiers."""
    ranks = hosts * per_host
    return (2 * (ranks - 1) / ranks) / (2 * (hosts - 1) / hosts)


def expected_seconds(samples: int) -> float:
    """Of both labs, about."""
    wire = PAYLOAD_BYTES * 8 / 50e6
    both = len(SEGMENTS) * (samples + WARM_UP) * wire
    return sum(both * (1.1 + limit(HOSTS, per_host)) + 5 for per_host in RANKS_PER_HOST)


def measure(samples: int, *, quick: bool, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """For each lab a row for each way and number of segments, and the ratio of the best of each way."""
    rows = []
    payload = PAYLOAD_BYTES // (8 if quick else 1)
    for per_host in RANKS_PER_HOST[:1] if quick else RANKS_PER_HOST:
        about: dict[str, Any] = {"hosts": HOSTS, "ranks_per_host": per_host, "link": RATE, "note": NOTE}
        about["payload_bytes"] = payload
        report(f"hierarchical, {HOSTS} hosts × {per_host}")
        try:
            rows += _rows(per_host, payload, samples, {"part": "hierarchical", **about})
        except RankError as error:
            why = f"rank {error.rank}: {error.reason.strip().splitlines()[-1]}"
            rows.append(record.row(part="lost", failed=why, **about))
    return rows


def _rows(per_host: int, payload: int, samples: int, about: dict[str, Any]) -> list[dict[str, Any]]:
    seconds: dict[tuple[Way, int], list[float]] = {subject: [] for subject in SUBJECTS}
    with Lab(HOSTS, RATE) as lab, closing(LabRanks(lab, per_host, timeout_seconds=300.0)) as ranks:
        sent = {subject: ranks.run(check, *subject, payload, per_host)[0].wire_bytes() for subject in SUBJECTS}
        for index in range(-WARM_UP, samples):
            for subject in reversed(SUBJECTS) if index % 2 else SUBJECTS:
                found = max(ranks.run(sample, *subject, payload, per_host))
                if index >= 0:
                    seconds[subject].append(found)
    rows = [
        record.row(subject=way, segments=segments, samples=s, unit="s", wire_bytes=sent[way, segments], **about)
        for (way, segments), s in seconds.items()
    ]
    best: dict[str, list[float]] = {
        way: min((seconds[way, n] for n in SEGMENTS), key=statistics.median) for way in WAYS
    }
    target, most = TARGETS[per_host], limit(HOSTS, per_host)
    return [*rows, ratio_row("flat", "hierarchical", best, {}, target=target, limit=most, **about)]


# --- on a rank --------------------------------------------------------------------------------------------------------


def check(way: Way, segments: int, payload_bytes: int, per_host: int) -> Ledger:
    """Sum once, and see that it is the sum; what was sent. Collective."""
    reduce, ranks = _way(way, segments, per_host), dist.get_world_size()
    tensor_P = torch.full((payload_bytes // 4,), float(dist.get_rank() + 1))
    with Recorder() as recorder:
        reduce(tensor_P)
    expected = ranks * (ranks + 1) / 2
    if not bool((tensor_P == expected).all()):
        raise ValueError(f"{way} does not sum to {expected}")
    return Ledger.of(recorder.trace())


def sample(way: Way, segments: int, payload_bytes: int, per_host: int) -> float:
    """Seconds of one sum. Collective."""
    reduce, tensor_P = _way(way, segments, per_host), torch.zeros(payload_bytes // 4)
    dist.barrier()
    began = time.perf_counter()
    reduce(tensor_P)
    return time.perf_counter() - began


def _way(way: Way, segments: int, per_host: int) -> Callable[[torch.Tensor], object]:
    world = World.create(Layout(replicate=dist.get_world_size()), torch.device("cpu"))
    axis, tiers = world.axes["replicate"], world.tiers("replicate", per_host)
    if way == "flat":
        return lambda tensor_P: ring_all_reduce(tensor_P, axis, site=SITE, segments=segments)
    return lambda tensor_P: hierarchical_ring_all_reduce(tensor_P, tiers, site=SITE, segments=segments)

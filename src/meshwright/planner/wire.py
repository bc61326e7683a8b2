"""What one collective costs on a cluster: over which tier it goes, and its seconds alone.

A collective runs at the speed of its slowest link: its tier is `intra` where every group of its axis lies in one host,
else `inter`. Of a torus one link counts, since a ring sends to one neighbour, over the link that joins them.

With α the latency of the tier, β its bandwidth, p the payload and w the bytes that a ring sends of it (`account`):

    ring          α + w/β. α is the fixed cost of one call as calibrated, whatever the number of ranks: it is not
                  multiplied by the hops
    tree          α·h + m/β for all-reduce, broadcast and reduce; the others are as in a ring. h is the tree's hops over
                  the ring's, 2·log2(n) over 2(n-1) for all-reduce, log2(n) over n-1 for the other two; m is 2p, or p:
                  as an inner node sends all it has up, and down again
    hierarchical  an all-reduce between hosts of which each has k > 1 ranks of the group: reduce-scatter inside the
                  host, all-reduce of p/k between hosts, all-gather inside
    auto          the cheaper of ring and tree, as NCCL chooses
    a shift       α + p/β, whatever the algorithm
"""

from __future__ import annotations

import math
from typing import Literal

from meshwright.account import UNKNOWN_AXIS, WORLD_AXIS, LedgerKey
from meshwright.config.backends import backend_factor
from meshwright.config.tree import Cluster, Layout, Link

Tier = Literal["intra", "inter"]
Algorithm = Literal["ring", "tree", "hierarchical", "auto"]

_TREE_PASSES = {"all_reduce": 2, "broadcast": 1, "reduce": 1}


def tier(axis: str, group_size: int, layout: Layout, cluster: Cluster) -> Tier:
    """Whether all groups of an axis lie within hosts; `axis` may be flattened, such as `shard*ring`.

    A part of an axis may be named with its tier, `replicate:intra`. Else its groups divide aligned blocks of
    consecutive ranks among them, so they do if whole blocks fill a host, or if there is only one host.
    """
    named = named_tier(axis)
    if named is not None:
        return named
    if layout.world <= cluster.devices_per_host:
        return "intra"
    if axis in (UNKNOWN_AXIS, WORLD_AXIS):
        return "inter"
    block = _stride(axis, layout) * group_size
    return "intra" if cluster.devices_per_host % block == 0 else "inter"


def named_tier(axis: str) -> Tier | None:
    """The tier in the name of a part of an axis, `replicate:intra`."""
    suffix = axis.rpartition(":")[2] if ":" in axis else ""
    return "intra" if suffix == "intra" else "inter" if suffix == "inter" else None


def _stride(axis: str, layout: Layout) -> int:
    """Distance in ranks between neighbours of a group, which varies fastest along the last of a flattened name."""
    return layout.stride(axis.rpartition("*")[2])


def link(axis: str, group_size: int, layout: Layout, cluster: Cluster) -> Link:
    """The link of that tier."""
    return cluster.intra if tier(axis, group_size, layout, cluster) == "intra" else cluster.inter


def call_seconds(key: LedgerKey, over: Link, *, algorithm: Algorithm = "ring", factor: float = 1.0) -> float:
    """One collective on its own, on one link; `factor` is what the backend sends over what a ring would.

    `hierarchical` needs two links (`collective_seconds`): on one, it is a ring.
    """
    ring = over.latency_seconds + factor * key.wire_bytes / over.bandwidth
    passes = _TREE_PASSES.get(key.operation)
    if algorithm in ("ring", "hierarchical") or passes is None or key.group_size == 1:
        return ring
    hops = math.ceil(math.log2(key.group_size)) / (key.group_size - 1)
    tree = over.latency_seconds * hops + passes * key.payload_bytes / over.bandwidth
    return tree if algorithm == "tree" else min(ring, tree)


def collective_seconds(
    key: LedgerKey, layout: Layout, cluster: Cluster, *, backend: str, algorithm: Algorithm = "ring"
) -> float:
    """One collective on its own, where its ranks are."""
    over = link(key.axis, key.group_size, layout, cluster)
    members = _members_in_a_host(key.axis, key.group_size, layout, cluster)
    factor = backend_factor(backend, key.operation)
    if algorithm != "hierarchical" or key.operation != "all_reduce" or members == 1 or not cluster.intra.bandwidth:
        return call_seconds(key, over, algorithm=algorithm, factor=factor)
    inside = [key._replace(operation=operation, group_size=members) for operation in ("reduce_scatter", "all_gather")]
    part = -(-key.payload_bytes // members)
    between = key._replace(group_size=key.group_size // members, payload_bytes=part)
    return call_seconds(between, over, factor=factor) + sum(
        call_seconds(step, cluster.intra, factor=backend_factor(backend, step.operation)) for step in inside
    )


def _members_in_a_host(axis: str, group_size: int, layout: Layout, cluster: Cluster) -> int:
    """How many ranks of each group share a host, of a group that spans several; 1 where hosts have unequal shares."""
    if axis in (UNKNOWN_AXIS, WORLD_AXIS) or named_tier(axis) or tier(axis, group_size, layout, cluster) == "intra":
        return 1
    stride = _stride(axis, layout)
    members = cluster.devices_per_host // stride
    return members if members and cluster.devices_per_host % stride == 0 and group_size % members == 0 else 1

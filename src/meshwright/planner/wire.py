"""What one collective costs on a cluster: over which tier it goes, and its seconds alone.

A collective runs at the speed of its slowest link: its tier is `intra` where every group of its axis lies in one host,
else `inter`. Of a torus one link counts, since a ring sends to one neighbour, over the link that joins them.
"""

from __future__ import annotations

from typing import Literal

from meshwright.account import UNKNOWN_AXIS, LedgerKey
from meshwright.config.tree import Cluster, Layout, Link

Tier = Literal["intra", "inter"]


def tier(axis: str, group_size: int, layout: Layout, cluster: Cluster) -> Tier:
    """Whether all groups of an axis lie within hosts; `axis` may be flattened, such as `shard*ring`.

    Its groups divide aligned blocks of consecutive ranks among them, so they do if whole blocks fill a host, or if
    there is only one host.
    """
    if layout.world <= cluster.devices_per_host:
        return "intra"
    if axis == UNKNOWN_AXIS:
        return "inter"
    block = layout.stride(axis.rpartition("*")[2]) * group_size
    return "intra" if cluster.devices_per_host % block == 0 else "inter"


def link(axis: str, group_size: int, layout: Layout, cluster: Cluster) -> Link:
    """The link of that tier."""
    return cluster.intra if tier(axis, group_size, layout, cluster) == "intra" else cluster.inter


def call_seconds(key: LedgerKey, over: Link) -> float:
    """One collective on its own."""
    return over.latency_seconds + key.wire_bytes / over.bandwidth

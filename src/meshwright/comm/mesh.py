"""The world as one rank sees it: its device, its coordinates, and an `Axis` for every mesh axis of its layout.

An `Axis` is one process group with the name it has in the account. Collectives are its methods (`comm.collectives`
implements them); on an axis of one rank they do nothing and leave no row in the ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from meshwright.account import UNKNOWN_AXIS, WORLD_AXIS
from meshwright.comm import torch_private
from meshwright.comm.collectives import Axis
from meshwright.config.tiers import groups, on_hosts, tiers
from meshwright.config.tree import AXES, Layout

_MESH_PREFIX = "mesh_"


class Tiers(NamedTuple):
    """Of an axis, the ranks that share this rank's host, and those with its place on each host."""

    intra: Axis
    inter: Axis


@dataclass(frozen=True)
class World:
    """This rank's place: rank, layout, device, and its axes by name (mesh axes and the flattened groups)."""

    rank: int
    layout: Layout
    device: torch.device
    axes: dict[str, Axis] = field(default_factory=dict)

    @classmethod
    def create(cls, layout: Layout, device: torch.device) -> World:
        """Make the groups of a layout. Collective: every rank of the initialised default group must call it.

        Must be called outside fake tensor mode. Raises ValueError if the layout's world is not the group's.
        """
        if layout.world == 1:
            return cls.single(device)
        if not dist.is_initialized():
            raise ValueError(f"a world of {layout.world} ranks needs an initialised process group")
        if dist.get_world_size() != layout.world:
            raise ValueError(f"the layout has {layout.world} ranks, the process group {dist.get_world_size()}")
        names = tuple(axis for axis in AXES if layout.degree(axis) > 1)
        degrees = tuple(layout.degree(axis) for axis in names)
        key = (device.type, names, degrees)
        mesh = _reused(key, lambda: init_device_mesh(device.type, degrees, mesh_dim_names=names))
        axes = {axis: _axis(axis, mesh[axis]) if axis in names else Axis(axis) for axis in AXES}
        for flattened in (layout.token_axes, layout.state_axes):
            if len(flattened) > 1:
                name = "*".join(flattened)
                axes[name] = _flat(name, flattened, mesh, key)
        return cls(dist.get_rank(), layout, device, axes)

    @classmethod
    def single(cls, device: torch.device) -> World:
        """One device: every axis has one rank, whether or not there is a process group."""
        return cls(0, Layout(), device, {axis: Axis(axis) for axis in AXES})

    @property
    def gradient_axis(self) -> Axis:
        """The axis over which gradients, losses and token counts are summed: the gradient group."""
        return self.axes[self.layout.gradient_axis or "replicate"]

    @property
    def state_axis(self) -> Axis:
        """The axis over which states are sharded; of one rank where they are not."""
        return self.axes[self.layout.state_axis] if self.layout.state_axes else Axis("shard")

    @property
    def replica_axis(self) -> Axis:
        """Of the gradient group, the ranks that hold the same part of the states."""
        return self.axes["replicate"] if self.layout.state_axes else self.gradient_axis

    def neighbours(self, axis: str, size: int) -> Axis:
        """The subgroup of `size` consecutive ranks of `axis` that this rank is in; keeps the axis's name.

        Collective over the whole world. Only `tensor`, the innermost axis, has consecutive ranks.
        """
        assert axis == "tensor" and self.layout.degree(axis) % size == 0, (axis, size)
        key = f"{axis}/{size}"
        if key not in self.axes:
            if size in (1, self.layout.degree(axis)):
                self.axes[key] = self.axes[axis] if size > 1 else Axis(axis)
            else:
                group = _reused((axis, size), lambda: dist.new_subgroups(size)[0])
                self.axes[key] = Axis(axis, size, dist.get_rank(group), group)
        return self.axes[key]

    def tiers(self, axis: str, devices_per_host: int) -> Tiers:
        """The two subgroups of `axis`, perhaps flattened, that this rank is in.

        They are called `AXIS:intra` and `AXIS:inter`. Ranks fill hosts of `devices_per_host` one after another; the
        axis must have the same number of ranks, more than one, on each of several. Collective over the whole world.
        """
        axes = axis.split("*")
        assert tiers(self.layout, axes, devices_per_host) is not None, (axis, devices_per_host)
        by_host = [on_hosts(group, devices_per_host) for group in groups(self.layout, axes)]
        members = {
            "intra": [ranks for hosts in by_host for ranks in hosts],
            "inter": [ranks for hosts in by_host for ranks in zip(*hosts, strict=True)],
        }
        return Tiers(*(self._subgroup(f"{axis}:{tier}", ranks) for tier, ranks in members.items()))

    def _subgroup(self, name: str, members: Sequence[tuple[int, ...]]) -> Axis:
        """This rank's group of a partition of the world."""
        key = tuple(members)
        group = _reused(key, lambda: dist.new_subgroups_by_enumeration([[*ranks] for ranks in members])[0])
        return Axis(name, group.size(), group.rank(), group)


@dataclass
class _Made:
    """Meshes and groups that were made under one default group: each opens connections and keeps threads."""

    under: dist.ProcessGroup | None = None
    by_key: dict[Any, Any] = field(default_factory=dict)


_made = _Made()


def _reused(key: Any, make: Callable[[], Any]) -> Any:
    """What was made under this key before in the present default group, or is made now; collective."""
    if _made.under is not dist.group.WORLD:
        _made.under, _made.by_key = dist.group.WORLD, {}
    if key not in _made.by_key:
        with torch_private.inherited_timeout():
            _made.by_key[key] = make()
    return _made.by_key[key]


def _flat(name: str, flattened: tuple[str, ...], mesh: DeviceMesh, key: tuple[Any, ...]) -> Axis:
    """Several axes as one."""
    return _axis(name, _reused((*key, name), lambda: mesh[flattened]._flatten(name)))


def _axis(name: str, mesh: DeviceMesh) -> Axis:
    group = mesh.get_group()
    return Axis(name, group.size(), group.rank(), group)


def mesh_of(axis: Axis, device: torch.device) -> DeviceMesh:
    """An axis as the one-dimensional DeviceMesh that torch's own parallelisms take; makes no group."""
    assert axis.group is not None, axis.name
    return DeviceMesh.from_group(axis.group, device.type, mesh_dim_names=(axis.name,))


def axis_name(group: dist.ProcessGroup) -> str:
    """The mesh axis of another program's group: as its DeviceMesh named it, else `world` or unknown.

    Ours say it themselves (`comm.scope`): one group may be an axis of several layouts.
    """
    description = group.group_desc
    if group is dist.group.WORLD:
        return WORLD_AXIS
    return description.removeprefix(_MESH_PREFIX) if description.startswith(_MESH_PREFIX) else UNKNOWN_AXIS

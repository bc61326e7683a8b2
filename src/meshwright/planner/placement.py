"""Where everything is: rank → host and mesh coordinates, and which part of each parameter a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meshwright.config.tree import Job, Layout
from meshwright.schemes.fsdp import own_rows
from meshwright.schemes.params import ParamSpec, param_specs


@dataclass(frozen=True)
class Place:
    """One rank."""

    rank: int
    host: int
    coordinates: dict[str, int]


@dataclass(frozen=True)
class Placement:
    """All ranks and all parameters of a legal job."""

    job: Job
    places: tuple[Place, ...]
    specs: tuple[ParamSpec, ...]

    @classmethod
    def of(cls, job: Job) -> Placement:
        """Ranks fill one host after another; hosts are added if the cluster has too few."""
        layout, per_host = job.layout, job.cluster.devices_per_host
        places = (Place(rank, rank // per_host, layout.coordinates(rank)) for rank in range(layout.world))
        return cls(job, tuple(places), param_specs(job.model, layout, job.training.seq_len))

    def to_json(self) -> dict[str, Any]:
        """A parameter's part depends on one coordinate only, so it is written once for each, not for each rank.

        `ranges[coordinates[axis]]` is what a rank holds of a parameter along `dim`: first and past-the-last global
        index, padding left out. `axis`, `dim` and `ranges` are null where every rank holds all of it.

        `states` says over which axis what is sharded besides; with zero 2 and 3 a rank has `state_rows[coordinate on
        that axis]` of its part's rows, else `state_rows` is null.
        """
        layout = self.job.layout
        return {
            "job": self.job.name,
            "world": self.job.layout.world,
            "hosts": self.places[-1].host + 1,
            "devices_per_host": self.job.cluster.devices_per_host,
            "ranks": [vars(place) for place in self.places],
            "states": {"zero": layout.zero_stage, "axis": layout.state_axis or None, "ranks": layout.state_group_size},
            "parameters": [_parameter(spec, layout) for spec in self.specs],
        }


def _parameter(spec: ParamSpec, layout: Layout) -> dict[str, Any]:
    split, ranks = spec.split, layout.state_group_size
    return {
        "name": spec.name,
        "global_shape": list(spec.shape),
        "local_shape": list(spec.local_shape),
        "axis": split.axis if split else None,
        "dim": split.dim if split else None,
        "ranges": [list(spec.span(c)) for c in range(split.degree)] if split else None,
        "state_rows": [list(own_rows(spec, ranks, c)) for c in range(ranks)] if layout.zero_stage >= 2 else None,
    }

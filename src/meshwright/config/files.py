"""A job from a file or the catalog, and back to a file that replays it exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from meshwright import catalog
from meshwright.config import toml
from meshwright.config.hardware import cluster_table, load_cluster, load_device
from meshwright.config.overrides import apply_overrides
from meshwright.config.ranges import job_mistakes
from meshwright.config.tree import Job
from meshwright.config.values import structure
from meshwright.errors import UserError

__all__ = ["dump_job", "load_cluster", "load_device", "load_job"]

DEFAULT_CLUSTER = "laptop"


def load_job(source: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Job:
    """The job of a TOML file or of a catalog model, with `overrides` such as `("layout.tensor", "2")` applied.

    `cluster`, and the `device` in it, may be a table, a catalog name, or a file (relative to the job's own folder).
    Ranges are checked last, on the result; whether the parts fit each other is `legality.violations`.
    """
    raw = toml.read("models", source)
    named = isinstance(source, str) and source in catalog.names("models")
    folder = Path() if named else Path(source).parent
    raw["cluster"] = cluster_table(raw.get("cluster", DEFAULT_CLUSTER), folder)
    if isinstance(raw.get("model"), dict):
        raw["model"] = {"name": raw["name"], **raw["model"]}
    job = apply_overrides(structure(raw, Job, str(source)), overrides)
    if mistakes := job_mistakes(job):
        raise UserError("\n".join(mistakes))
    return job


def dump_job(job: Job) -> str:
    """TOML text of every field, cluster and device spelt out: `load_job` of it gives an equal job on any machine."""
    table = asdict(job)
    cluster = table.pop("cluster")
    head = toml.dumps({"name": table.pop("name")}) + toml.dumps_inline("cluster", cluster)
    return f"{head}\n{toml.dumps(table)}"

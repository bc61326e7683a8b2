"""Devices and clusters by catalog name or file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meshwright.config import toml
from meshwright.config.ranges import cluster_mistakes, device_mistakes
from meshwright.config.tree import Cluster, Device
from meshwright.config.values import structure
from meshwright.errors import UserError


def load_device(source: str | Path) -> Device:
    """A device of the catalog, or of a TOML file."""
    device = structure(toml.read("devices", source), Device, str(source))
    _refuse(device_mistakes(device), source)
    return device


def load_cluster(source: str | Path) -> Cluster:
    """A cluster of the catalog, or of a TOML file."""
    cluster = structure(cluster_table(source), Cluster, str(source))
    _refuse(cluster_mistakes(cluster), source)
    return cluster


def cluster_table(cluster: Any, folder: Path = Path()) -> Any:
    """A cluster as one table: each catalog name or file (relative to `folder`) replaced by what it holds."""
    if isinstance(cluster, str | Path):
        folder, cluster = (folder / cluster).parent, toml.read("clusters", cluster, folder)
    if isinstance(cluster, dict) and isinstance(cluster.get("device"), str):
        return {**cluster, "device": toml.read("devices", cluster["device"], folder)}
    return cluster


def _refuse(mistakes: list[str], source: str | Path) -> None:
    if mistakes:
        raise UserError("\n".join(f"{source}: {mistake}" for mistake in mistakes))

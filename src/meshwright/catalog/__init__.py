"""Data that ships with the package: models, devices and clusters as TOML files, each with its source."""

from __future__ import annotations

from importlib import resources
from typing import Literal

Kind = Literal["models", "devices", "clusters"]


def names(kind: Kind) -> list[str]:
    """Names of one part of the catalog, sorted."""
    folder = resources.files(__name__) / kind
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def read(kind: Kind, name: str) -> str:
    """TOML text of one entry, which must exist."""
    return (resources.files(__name__) / kind / f"{name}.toml").read_text(encoding="utf-8")

"""Where the published figures lie that tests compare with: not part of the repository, so they may be absent."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

BESIDE_CHECKOUT = Path(__file__).parents[2] / "shared/data/published"


def published(name: str) -> Path:
    """A file of published figures, in $MESHWRIGHT_DATA or beside the checkout. Skips the test where there is none."""
    folder = Path(os.environ.get("MESHWRIGHT_DATA") or BESIDE_CHECKOUT)
    if not (folder / name).is_file():
        pytest.skip(f"no {name} in {folder}: name the folder of published figures in MESHWRIGHT_DATA")
    return folder / name


def published_rows(name: str) -> list[dict[str, str]]:
    """Its rows by column, without the comment lines that say where they are from."""
    lines = published(name).read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))

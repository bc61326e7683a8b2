"""Run folders: new each time, complete, and refused in one line where they cannot be."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from training.tiny import job

from meshwright.config.files import load_job
from meshwright.errors import UserError
from meshwright.planner.step import formula
from meshwright.training.run_folder import RunFolder


def test_never_overwritten(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: RunFolder.create(tmp_path / "runs", job()), range(8)))
    names = {folder.path.name for folder in folders}
    assert names == {"tiny", *(f"tiny-{number}" for number in range(2, 9))}


def test_the_job_can_be_replayed(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, job())
    assert load_job(folder.job_file) == job()


def test_accounts(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, job())
    account = formula(job())
    folder.write_account("plan", account)
    assert folder.read_account("plan") == account.to_json()
    assert sorted(path.name for path in folder.path.iterdir()) == ["job.toml", "plan.json"]


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(UserError) as caught:
        RunFolder.create(tmp_path / "runs", job())
    assert f"{tmp_path}/runs/tiny cannot be written: " in str(caught.value)
    assert "\n" not in str(caught.value)

"""What a run leaves on disk: `runs/NAME`, or `runs/NAME-2` where that exists; never overwritten.

job.toml                            the resolved job, replayable
plan.json, rehearsal.json, run.json the three accounts of a step
metrics.jsonl                       a line a step (see `training.metrics`)
unsplit/                            job.toml, plan.json and rehearsal.json of the layout with nothing cut, until a trial
                                    has judged (`training.trial`): a run may fall back to them
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.account import StepAccount
from meshwright.config.files import dump_job, load_job
from meshwright.config.tree import Job, Layout
from meshwright.errors import UserError


@dataclass(frozen=True)
class RunFolder:
    """One run's folder."""

    path: Path

    @classmethod
    def create(cls, runs: Path, job: Job) -> RunFolder:
        """Claim a new folder in `runs` and write job.toml. Raises UserError if that is not possible.

        `mkdir` either makes a folder or fails, so of two runs that start at once each gets its own.
        """
        try:
            runs.mkdir(parents=True, exist_ok=True)
            for number in itertools.count(1):
                path = runs / (job.name if number == 1 else f"{job.name}-{number}")
                try:
                    path.mkdir()
                except FileExistsError:
                    continue
                folder = cls(path)
                folder.write_job(job)
                return folder
        except OSError as error:
            raise UserError(
                f"the run folder {runs / job.name} cannot be written: {error.strerror} (a run keeps its job, "
                f"accounts and metrics there): name a folder of yours"
            ) from None
        raise AssertionError("count() does not end")

    @property
    def job_file(self) -> Path:
        """The job as it runs."""
        return self.path / "job.toml"

    @property
    def metrics_file(self) -> Path:
        """One line a step."""
        return self.path / "metrics.jsonl"

    @property
    def fallback(self) -> RunFolder:
        """Where a layout waits for a trial to fail."""
        return RunFolder(self.path / "unsplit")

    def exists(self) -> bool:
        """Whether anything was prepared here."""
        return self.job_file.exists()

    def layout(self) -> Layout:
        """That of the job."""
        return load_job(self.job_file).layout

    def write_job(self, job: Job) -> None:
        """The job, in a folder that may not exist yet."""
        self.path.mkdir(exist_ok=True)
        self.job_file.write_text(dump_job(job), encoding="utf-8")

    def settle(self, trial: Mapping[str, Any], *, fall_back: bool) -> None:
        """Keep a trial's figures with the plan of what runs, which is the fallback or not, and forget the other."""
        kept = self.fallback if fall_back else self
        plan = kept.read_account("plan")
        self._write("plan", plan | {"overlap": plan["overlap"] | {"trial": dict(trial)}})
        if fall_back:
            os.replace(kept.path / "rehearsal.json", self.path / "rehearsal.json")
            os.replace(kept.job_file, self.job_file)  # last: until then the folder is that of what was chosen
        shutil.rmtree(self.fallback.path)

    def write_account(self, name: str, account: StepAccount) -> None:
        """Write `name`.json whole or not at all: a reader never sees half an account."""
        self._write(name, account.to_json())

    def _write(self, name: str, account: Mapping[str, Any]) -> None:
        temporary = self.path / f".{name}.json"
        temporary.write_text(json.dumps(account, indent=1), encoding="utf-8")
        os.replace(temporary, self.path / f"{name}.json")

    def read_account(self, name: str) -> dict[str, Any]:
        """The plain data of an account that was written."""
        return json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))

"""Every command block of the README, and the Python of the docs, is run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = Path(sys.executable).parent
PATIENCE_SECONDS = 240


def blocks(file: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


COMMANDS = [line for block in blocks("README.md", "sh") for line in block.splitlines() if line and line[0] != "#"]
MAKE, OWN = [c for c in COMMANDS if c.startswith("make ")], [c for c in COMMANDS if not c.startswith("make ")]


def run(command: list[str], folder: Path) -> str:
    environment = os.environ | {"PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"}
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False, cwd=folder, env=environment
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


def test_there_are_commands() -> None:
    assert {"make run", "make test"} <= set(MAKE)
    assert len(OWN) >= 6


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_exist(command: str) -> None:
    assert run([*shlex.split(command), "--dry-run"], ROOT)


def test_make_run_trains_and_reports_agreement(tmp_path: Path) -> None:
    """The recipe of `make run`, with fewer steps."""
    recipe = run(["make", "run", "--dry-run", "--no-print-directory"], ROOT).splitlines()[-1]
    assert recipe.startswith(".venv/bin/meshwright train quickstart")
    program, *arguments = shlex.split(recipe)
    shortened = ["--training.steps", "3", "--training.heldout_sequences", "2"]
    output = run([Path(program).name, *arguments, *shortened], tmp_path)
    assert re.search(r"ledger: \d+ rows agree among formula, rehearsal and run", output)
    assert {"job.toml", "plan.json", "rehearsal.json", "run.json", "metrics.jsonl"} <= {
        file.name for file in (tmp_path / "runs" / "quickstart").iterdir()
    }


@pytest.mark.parametrize("command", OWN)
def test_commands_of_the_readme(command: str, tmp_path: Path) -> None:
    assert run(shlex.split(command), tmp_path)


@pytest.mark.parametrize("code", [*blocks("README.md", "python"), *blocks("docs/account.md", "python")])
def test_python_of_the_docs(code: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    assert run([sys.executable, "example.py"], tmp_path)

"""Whole runs: real ranks under torch's launcher, to the end and to several kinds of untimely end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jobs import sampled
from training.tiny import MODEL, job, write_text

from meshwright.account import Ledger
from meshwright.config.files import dump_job
from meshwright.config.tree import Job, Layout
from meshwright.errors import UserError
from meshwright.launch import checked, exit_code, failure_line, train

TRAIN = """
import sys
from pathlib import Path
from meshwright.config.files import load_job
from meshwright.launch import train
if __name__ == "__main__":
    sys.exit(train(load_job(sys.argv[1]), None, Path(sys.argv[2])))
"""
ENDLESS = 1_000_000
PATIENCE_SECONDS = 120
"""For what takes seconds on a machine that is not busy; nothing may hang."""


def job_file(folder: Path, *, steps: int, layout: Layout, **training: Any) -> Path:
    path = folder / "job.toml"
    path.write_text(dump_job(job(layout, steps=steps, data=write_text(folder / "text"), **training)))
    return path


def commands(file: Path, runs: Path) -> dict[str, Sequence[str]]:
    """The two ways to start a job."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return {
        "train": (sys.executable, "-c", TRAIN, str(file), str(runs)),
        "torchrun": (*launcher, "-m", "meshwright.training", str(file), "--runs", str(runs)),
    }


def check_run(folder: Path, printed: str) -> list[float]:
    """Everything that a run of three steps must leave and say; returns its losses, the held-out one last."""
    names = {"job.toml", "metrics.jsonl", "plan.json", "rehearsal.json", "run.json"}
    assert {path.name for path in folder.iterdir()} == names
    accounts = [json.loads((folder / f"{name}.json").read_text()) for name in ("plan", "rehearsal", "run")]
    assert [account["source"] for account in accounts] == ["formula", "rehearsed", "run"]
    assert accounts[2]["timeline"]["step_seconds"] > 0
    ledgers = [Ledger.from_json(account["ledger"]) for account in accounts]
    assert ledgers[0] == ledgers[1] == ledgers[2]
    lines = printed.splitlines()
    assert lines[-1] == f"ledger: {len(ledgers[0].rows)} rows agree among formula, rehearsal and run"
    assert sum(line.startswith("step ") and "/3 " in line for line in lines) == 3
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert [line["heldout_bits_per_byte"] is None for line in metrics] == [True, True, False]
    assert metrics[0]["loss"] > metrics[2]["loss"]
    return [line["loss"] for line in metrics] + [metrics[-1]["heldout_bits_per_byte"]]


@pytest.mark.slow
def test_two_layouts_at_once(tmp_path: Path) -> None:
    """Both ways to start, at the same time, in one folder: each run is whole, and the losses are the same."""
    running = []
    for how, layout in (("train", Layout(tensor=2)), ("torchrun", Layout(replicate=2))):
        (tmp_path / how).mkdir()
        command = commands(job_file(tmp_path / how, steps=3, layout=layout), tmp_path / "runs")[how]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        ended = [(*process.communicate(timeout=PATIENCE_SECONDS), process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    curves = []
    for printed, errors, code in ended:
        assert code == 0, errors
        folder = Path(next(line.split()[1] for line in printed.splitlines() if line.startswith("run ")))
        curves.append(check_run(folder, printed))
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"tiny", "tiny-2"}
    assert curves[0] == pytest.approx(curves[1], rel=2e-6)


@contextmanager
def running_job(
    tmp_path: Path, how: str = "train", **training: Any
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A job without end that has taken its first steps, and the process numbers of its ranks, in order."""
    file = job_file(tmp_path, steps=ENDLESS, layout=Layout(tensor=2), **training)
    command = commands(file, tmp_path / "runs")[how]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    ranks: list[int] = []
    try:
        while not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        ranks = _children(process.pid)
        assert len(ranks) == 2
        yield process, ranks
    finally:
        process.kill()
        process.communicate()
        for rank in ranks:
            if _is_alive(rank):
                os.kill(rank, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in listed}
    return [child for child, command in commands.items() if b"meshwright.training" in command]


def _is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def _wait_until_gone(pids: Sequence[int], seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while any(map(_is_alive, pids)):
        assert time.monotonic() < deadline, "a rank outlived its job"
        time.sleep(0.02)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")


@needs_proc
def test_a_killed_rank_ends_the_job(tmp_path: Path) -> None:
    with running_job(tmp_path) as (process, ranks):
        os.kill(ranks[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=15)  # what the launcher promises
        assert process.returncode == 137
        assert errors in {failure_line(rank, -signal.SIGKILL, 2) + "\n" for rank in range(2)}
        _wait_until_gone(ranks)


@needs_proc
@pytest.mark.parametrize(
    ("sent", "code"),
    sampled([(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], 3),
)
def test_the_end_of_the_launcher_ends_the_ranks(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    with running_job(tmp_path) as (process, ranks):
        process.send_signal(sent)
        assert process.wait(timeout=PATIENCE_SECONDS) == code
        _wait_until_gone(ranks)
        assert process.stderr is not None
        assert process.stderr.read() == ""


TIMEOUT_SECONDS = 6
GRACE_SECONDS = {"train": 15, "torchrun": 40}
"""For asking who is gone, leaving, and killing who does not leave: torchrun lets that one live for half a minute."""
SLACK_SECONDS = 30
"""For a machine that is busy with other tests."""


@needs_proc
@pytest.mark.slow  # the lab stops a host by default (tests/lab/test_lost_hosts.py)
@pytest.mark.parametrize("how", ["train", "torchrun"])
def test_a_stopped_rank_ends_the_job_within_the_timeout(tmp_path: Path, how: str) -> None:
    """It is alive for its launcher. Who waits for it says which rank, and what for."""
    with running_job(tmp_path, how, timeout_seconds=TIMEOUT_SECONDS) as (process, ranks):
        os.kill(ranks[1], signal.SIGSTOP)
        _, errors = process.communicate(timeout=TIMEOUT_SECONDS + GRACE_SECONDS[how] + SLACK_SECONDS)
        assert process.returncode == 1
        _wait_until_gone(ranks)
        said = [line for line in errors.splitlines() if line.startswith("rank 0: ")]
        assert len(said) == 1, errors
        call = r"(all_reduce|broadcast|all_gather) over tensor in (forward|backward|optimiser) at \S+"
        assert re.fullmatch(
            rf"rank 0: {call} got no answer from rank 1 within 6 s \(training\.timeout_seconds\): its host "
            r"answers and its process does not, it is stopped or hangs; mend that and start the job again",
            said[0],
        )
        if how == "train":
            assert errors.splitlines() == [*said, failure_line(0, 1, 2)]


# --- what is refused --------------------------------------------------------------------------------------------------


def message(refused: Job, processes: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        checked(refused, processes)
    return str(caught.value)


def test_processes_must_be_the_layouts(tmp_path: Path) -> None:
    assert "--processes 3" in message(job(Layout(tensor=2)), 3)


def test_hosts_are_those_on_which_ranks_were_started() -> None:
    """So that sums by tiers, and prices, are of the links there are."""
    given = job(Layout(replicate=4))
    assert given.cluster.devices_per_host == 4
    assert checked(given, 4, local_ranks=2).cluster.devices_per_host == 2
    assert checked(given, 4, local_ranks=4).cluster == given.cluster == checked(given).cluster
    with pytest.raises(
        UserError, match=r"each gradient group on each of several hosts, .* cluster.devices_per_host = 1"
    ):
        checked(job(Layout(replicate=4, hierarchical=True)), 4, local_ranks=1)


def test_an_illegal_layout_names_every_rule() -> None:
    assert len(message(job(Layout(tensor=3, replicate=3))).splitlines()) >= 2


def test_a_model_without_a_vocabulary() -> None:
    assert "model.block = ffn" in message(job(model=replace(MODEL, block="ffn")))


def test_bad_data_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        train(job(data=f"{tmp_path}/nowhere"), None, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [["nowhere.toml"], [], ["--steps"], ["job.toml", "--training.stepz", "3"]])
def test_bad_arguments_of_a_rank(tmp_path: Path, arguments: list[str]) -> None:
    job_file(tmp_path, steps=1, layout=Layout())
    command = [sys.executable, "-m", "meshwright.training", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False, cwd=tmp_path)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1


def test_usage_of_a_rank() -> None:
    command = [sys.executable, "-m", "meshwright.training", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("usage: torchrun --nproc-per-node N -m meshwright.training JOB")


def lone_rank(tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    """Rank 1 of a job whose rank 0 is not there."""
    file = job_file(tmp_path, steps=1, layout=Layout(tensor=2))
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}  # where nobody listens
    command = [sys.executable, "-m", "meshwright.training", str(file), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | place | meeting)


@pytest.mark.slow
def test_what_only_another_rank_finds_is_said(tmp_path: Path) -> None:
    process = lone_rank(tmp_path, "--training.data", f"{tmp_path}/nowhere")
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2
    assert errors.startswith(f"rank 1: training.data = {tmp_path}/nowhere does not exist")
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_joining_ends_at_the_timeout(tmp_path: Path) -> None:
    """Nobody listens where ranks should meet."""
    process = lone_rank(tmp_path, "--training.timeout_seconds", "2")
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1
    assert "rank 1: not all 2 ranks could join within 2 s (training.timeout_seconds): see that every host is" in errors


@pytest.mark.parametrize("refused", sampled(["--runs", "--training.data"], 2))
def test_what_rank_0_finds_ends_the_others_soon(tmp_path: Path, refused: str) -> None:
    """While they wait for it to join: torch's launcher would kill those who stay after 30 s."""
    (tmp_path / "file").touch()
    file = job_file(tmp_path, steps=1, layout=Layout(tensor=2))
    command = [*commands(file, tmp_path / "runs")["torchrun"], refused, str(tmp_path / "file" / "x")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    while str(tmp_path / "file" / "x") not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    began = time.monotonic()
    said += process.communicate(timeout=PATIENCE_SECONDS)[1]
    assert time.monotonic() - began < 15
    assert process.returncode == 1
    assert said.count(str(tmp_path / "file" / "x")) == 1


def test_how_a_rank_ended() -> None:
    assert failure_line(3, -9, 4) == "rank 3 was killed by SIGKILL; the other 3 ranks were ended"
    assert failure_line(0, 1, 1) == "rank 0 failed with exit code 1 (its message is above)"
    assert [exit_code(code) for code in (0, 1, -9, 143)] == [0, 1, 137, 143]

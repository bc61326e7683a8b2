"""A link that is cut and a host that stops, in the middle of a run: the job ends, and says whom it has lost.

Skipped with the reason where no lab can be made.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training.tiny import job, write_text

from meshwright.config.files import dump_job
from meshwright.config.tree import Layout
from meshwright.lab import Lab, names, obstacle, system

TIMEOUT_SECONDS = 10
"""training.timeout_seconds. Ranks also join within it, and rank 0 comes late, since it prepares the run."""
GRACE_SECONDS = 15
"""To find out who is gone, leave, and kill who does not leave."""
SLACK_SECONDS = 30
"""For a machine that is busy with other tests."""
PATIENCE_SECONDS = 90
"""Until the job has taken its first steps."""
CALL = r"\w+ over (replicate|tensor|ring) in (forward|backward|optimiser) at \S+"
WITHIN = r"within 10 s \(training\.timeout_seconds\)"
AGAIN = "mend that and start the job again"
LINK = rf"its host or its link is gone; {AGAIN}"
STOPPED = rf"its host answers and its process does not, it is stopped or hangs; {AGAIN}"

Fault = Callable[[Lab, int], None]


@pytest.fixture(autouse=True, scope="module")
def _possible() -> None:
    if reason := obstacle():
        pytest.skip(reason)


def cut(lab: Lab, host: int) -> None:
    """Take the host's port of the switch down: nobody is told, packets no longer come."""
    system.call("ip", "-n", names.switch(lab.name), "link", "set", f"p{host}", "down")


def stop(lab: Lab, host: int) -> None:
    _signal(lab, host, signal.SIGSTOP)


def kill(lab: Lab, host: int) -> None:
    _signal(lab, host, signal.SIGKILL)


def _signal(lab: Lab, host: int, number: signal.Signals) -> None:
    for pid in system.inside(lab.namespace(host)):
        os.kill(pid, number)


def end_of(folder: Path, layout: Layout, hosts: int, victim: int, fault: Fault) -> tuple[int, list[str]]:
    """Exit code and stderr of a job without end, one rank a host, which a host is lost to once it trains."""
    text = write_text(folder / "text")
    endless = job(layout, data=text, seq_len=24, steps=1_000_000, timeout_seconds=TIMEOUT_SECONDS)
    (folder / "job.toml").write_text(dump_job(endless))
    metrics, began = folder / "runs" / "tiny" / "metrics.jsonl", threading.Event()

    def lose(lab: Lab) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        fault(lab, victim)
        began.set()

    with (folder / "stderr").open("w") as stderr, Lab(hosts) as lab:
        losing = threading.Thread(target=lose, args=(lab,))
        losing.start()
        # The lab itself raises TimeoutError where the job does not end.
        limit = PATIENCE_SECONDS + TIMEOUT_SECONDS + GRACE_SECONDS + SLACK_SECONDS
        command = ["-m", "meshwright.training", str(folder / "job.toml"), "--runs", str(folder / "runs")]
        code = lab.run(command, stdout=subprocess.DEVNULL, stderr=stderr, timeout_seconds=limit)
        assert began.is_set(), "it ended by itself"
        losing.join()
        assert not any(system.inside(lab.namespace(host)) for host in range(hosts))
    said = (folder / "stderr").read_text().splitlines()
    return code, [line for line in said if line.startswith("rank ")]


@pytest.mark.slow
def test_a_cut_link_between_two(tmp_path: Path) -> None:
    """Each has lost the other."""
    code, said = end_of(tmp_path, Layout(replicate=2), 2, 1, cut)
    assert code == 1
    peers = {0: r"rank 1 \(10\.77\.0\.2\)", 1: r"rank 0 \(10\.77\.0\.1\)"}
    assert said
    for line in said:
        rank = int(line[5])
        assert re.fullmatch(rf"rank {rank}: {CALL} got no answer from {peers[rank]} {WITHIN}: {LINK}", line)


@pytest.mark.parametrize(
    ("hosts", "layout", "victim"),
    [
        pytest.param(2, Layout(tensor=2), 0, id="2 hosts"),
        pytest.param(3, Layout(ring=3, ring_order="contiguous"), 2, id="ring of 3", marks=pytest.mark.slow),
        pytest.param(4, Layout(replicate=2, tensor=2), 2, id="2 x 2", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_host_is_named_among_several(tmp_path: Path, hosts: int, layout: Layout, victim: int) -> None:
    """By whoever speaks, also by those whose own collective it takes no part in."""
    code, said = end_of(tmp_path, layout, hosts, victim, stop)
    assert code == 1
    culprit = rf"rank {victim} \(10\.77\.0\.{victim + 1}\)"
    assert said
    for line in said:
        direct = rf"got no answer from {culprit} {WITHIN}"
        held_up = rf"got no answer (?:{WITHIN}|and failed after \S+ s), for those in it wait for {culprit}"
        assert re.fullmatch(rf"rank \d: {CALL} (?:{direct}|{held_up}): {STOPPED}", line)
        assert int(line[5]) != victim


@pytest.mark.slow
def test_a_cut_host_does_not_blame_the_others(tmp_path: Path) -> None:
    """It reaches nobody, so it lets those speak who reach each other."""
    code, said = end_of(tmp_path, Layout(replicate=4), 4, 1, cut)
    assert code == 1
    assert said
    for line in said:
        direct = rf"got no answer from rank 1 \(10\.77\.0\.2\) {WITHIN}"
        assert re.fullmatch(rf"rank [023]: {CALL} {direct}: {LINK}", line)


def test_a_killed_host_is_named_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By the lab, which sees it end; the others have nothing to add."""
    code, said = end_of(tmp_path, Layout(replicate=2), 2, 1, kill)
    assert (code, said) == (137, [])
    assert capfd.readouterr().err == "rank 1 (host 1) was killed by SIGKILL; the other is ended\n"

"""What needs no namespaces: names and owners, what ranks are given, and the lines about what a machine lacks."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from meshwright.cli import main
from meshwright.errors import UserError
from meshwright.lab import names, program, system
from meshwright.lab.running import programs

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch

ADDRESSES = ["10.77.0.1", "10.77.0.2"]


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_tell_labs_and_owners_apart(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(system, "NAMESPACES", tmp_path)
    mine, other = names.new_name(), names.new_name()
    assert mine != other
    with subprocess.Popen(["sleep", "0"]) as ended:
        pass
    pid = os.getpid()
    start = mine.split("-")[2]
    abandoned, reused = f"mw-{ended.pid}-{start}-0", f"mw-{pid}-{int(start) - 1}-0"
    for lab in (mine, abandoned, reused):
        for namespace in (names.host(lab, 0), names.host(lab, 10), names.switch(lab)):
            (tmp_path / namespace).touch()
    for namespace in ("blue", "mw-1-2-3", "mw-1-2-3-h", "xmw-1-2-3-h0", "mw-1-2-3-h0-x"):  # somebody else's
        (tmp_path / namespace).touch()
    found = {lab.name: lab for lab in names.labs()}
    assert {name: lab.abandoned for name, lab in found.items()} == {mine: False, abandoned: True, reused: True}
    assert found[mine].namespaces == [f"{mine}-h0", f"{mine}-h10", f"{mine}-switch"]
    assert found[abandoned].pid == ended.pid


def test_a_zombie_owns_nothing(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(system, "NAMESPACES", tmp_path)
    process = subprocess.Popen(["sleep", "100"])
    start = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    (tmp_path / f"mw-{process.pid}-{start}-0-h0").touch()
    assert [lab.abandoned for lab in names.labs()] == [False]
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet waited for
    assert [lab.abandoned for lab in names.labs()] == [True]
    process.wait()


def test_nobody_is_inside_what_is_no_namespace(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(system, "NAMESPACES", tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "own").symlink_to("/proc/self/ns/net")
    assert [system.inside(name) for name in ("file", "own", "missing")] == [[], [], []]


# --- what runs --------------------------------------------------------------------------------------------------------


def test_ranks_get_what_torchrun_gives(monkeypatch: Patch) -> None:
    for name in ("OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    found = programs(["-m", "meshwright.training", "quickstart"], 2, ADDRESSES, "eth0", bare=False)
    assert [program.host for program in found] == [0, 0, 1, 1]
    assert [program.label for program in found][2] == "rank 2 (host 1)"
    assert {tuple(program.argv) for program in found} == {
        (sys.executable, "-u", "-m", "meshwright.training", "quickstart")
    }
    assert found[3].environment == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "2",
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "eth0",
        "NCCL_HOSTID": "lab-host-1",
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def test_bare_programs_know_their_node() -> None:
    first, second = programs(["sh", "-c", "exit"], 3, ADDRESSES, "eth0", bare=True)
    assert (first.host, second.host) == (0, 1)
    assert first.argv == ["sh", "-c", "exit"]
    expected = {
        "NODE_RANK": "1",
        "NNODES": "2",
        "NPROC_PER_NODE": "3",
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": "29500",
        "PET_NODE_RANK": "1",
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "3",
        "PET_MASTER_ADDR": "10.77.0.1",
        "PET_MASTER_PORT": "29500",
    }
    assert expected.items() <= second.environment.items()
    assert "RANK" not in second.environment


# --- the command line -------------------------------------------------------------------------------------------------


def test_all_behind_the_dashes_is_the_command(monkeypatch: Patch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(program, "run", lambda command, **options: given.update(options, command=command) or 5)
    command = ["-m", "meshwright.training", "quickstart", "--help", "--rate=1", "--", "--hosts", "9", "-h"]
    assert main(["lab", "--hosts", "3", "--ranks=2", "--rate", "400mbit", "--intra_rate", "2gbit", "--", *command]) == 5
    assert given == {
        "command": command,
        "hosts": 3,
        "ranks": 2,
        "rate": "400mbit",
        "intra_rate": "2gbit",
        "bare": False,
    }


RULE = "a number and its unit, kbit, mbit or gbit; kbps, mbps and gbps are bytes, as tc has it"
COMMAND = ("--", "-m", "this")

MISTAKES = {
    (): "lab needs a COMMAND, after -- and its own options: give it one, like -- -m meshwright.training quickstart",
    ("--bare", "--"): (
        "lab needs a COMMAND, after -- and its own options: give it one, like "
        "-- torchrun -m meshwright.training quickstart"
    ),
    ("--", "train.py"): (
        "COMMAND = train.py is not a Python file (ranks run what torchrun takes, -m MODULE or FILE.py): "
        "give one, or --bare to start a program once on each host"
    ),
    ("--bare", "--", "torchrum"): (
        "COMMAND = torchrum is not a program (it is not in PATH, or not executable): give one that is"
    ),
    ("--rate", "fast", *COMMAND): f"--rate = 'fast' is not a rate ({RULE}): write it like 400mbit",
    ("--intra-rate", "2gb", *COMMAND): f"--intra-rate = '2gb' is not a rate ({RULE}): write it like 400mbit",
    ("--hosts", "0", *COMMAND): "--hosts = 0 is not a whole number above 0",
    ("--ranks", "0", *COMMAND): "--ranks = 0 is not a whole number above 0",
    ("--ranks", "257", *COMMAND): "ranks = 257 is out of range (a host has 1 to 256): choose a number in it",
    ("--hosts", "251", *COMMAND): "hosts = 251 is out of range (a lab has 1 to 250): choose a number in it",
    ("-m", "this"): ("--m is not an option of lab: use one of --hosts, --ranks, --rate, --intra-rate, --bare, --clean"),
    ("--clean", *COMMAND): "--clean runs nothing, and a COMMAND was given: leave out one of them",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes(arguments: tuple[str, ...], capsys: Capture) -> None:
    code = main(["lab", *arguments])
    assert (code, capsys.readouterr().err) == (2, MISTAKES[arguments] + "\n")


@pytest.mark.parametrize("arguments", [("--rate", "1gbit", *COMMAND), ("--clean",)])
def test_what_a_machine_lacks(arguments: tuple[str, ...], capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(sys, "platform", "linux")
    found = {"tc": None, "ip": "/sbin/ip"}
    monkeypatch.setattr(shutil, "which", lambda name, path: found.get(name))
    assert main(["lab", *arguments]) == 2
    found["ip"] = None
    assert main(["lab", *arguments]) == 2
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["lab", *arguments]) == 2
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main(["lab", *arguments]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "a lab needs iproute2 (tc not found): run apt-get install iproute2",
        "a lab needs iproute2 (ip and tc not found): run apt-get install iproute2",
        "a lab needs root to make network namespaces, and this is user 1000: "
        "run it as sudo $(which meshwright) lab ..., or in a container with CAP_NET_ADMIN and CAP_SYS_ADMIN",
        "a lab needs Linux (network namespaces), and this is darwin: run it on a Linux machine",
    ]


def test_what_the_kernel_refuses(tmp_path: Path, monkeypatch: Patch) -> None:
    refusing = tmp_path / "ip"
    refusing.write_text(
        "#!/bin/sh\necho 'mount --make-shared /run/netns failed: Operation not permitted' >&2\nexit 1\n"
    )
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError) as error:
        system.call("ip", "netns", "add", "x")
    assert str(error.value) == (
        "the kernel refused `ip netns add x` (mount --make-shared /run/netns failed: Operation not permitted): a lab "
        "needs CAP_NET_ADMIN and CAP_SYS_ADMIN, and a kernel with network namespaces, veth, bridge and tbf (sch_tbf)"
    )


# --- the page ---------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "lab.md").read_text(encoding="utf-8")
SHOWN = [line.removeprefix("$ meshwright ") for line in PAGE.splitlines() if line.startswith("$ ")]


@pytest.mark.parametrize("line", SHOWN)
def test_commands_of_the_page(line: str, monkeypatch: Patch) -> None:
    asked: list[int] = []

    def run(command: list[str], *, hosts: int, ranks: int, rate: str, intra_rate: str | None, bare: bool) -> int:
        asked.append(hosts * ranks)
        assert (command[0] == "-m") is not bare
        return 0

    monkeypatch.setattr(program, "run", run)
    monkeypatch.setattr(program, "remove_abandoned", lambda: asked.append(0) or 0)
    assert main(shlex.split(line)) == 0
    assert len(asked) == 1

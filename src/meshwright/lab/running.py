"""What runs on the hosts: its arguments and environment, and that all of it ends when one part fails.

Ranks are started here rather than by one torchrun a host: they get the variables that torchrun sets, the exit code and
the message are the rank's own, and no second process per host imports torch on cores that all hosts share. With `bare`,
torchrun itself may be the program: it finds its options in the environment.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.errors import UserError
from meshwright.lab import system

GRACE_SECONDS = 5.0
"""What a process that was asked to end has for it; then it is killed."""
MASTER_PORT = 29500
"""Free in every lab, for its namespaces are new."""
MOST_RANKS = 256
"""On one host."""

_POLL_SECONDS = 0.05

Stop = Callable[[], int | None]
"""Says which signal to end by, or None to go on."""


def never() -> None:
    """A `Stop` that goes on."""


@dataclass(frozen=True)
class Program:
    """One process to start."""

    host: int
    label: str
    """What messages call it."""
    argv: Sequence[str]
    environment: Mapping[str, str]


def programs(
    command: Sequence[str], ranks: int, addresses: Sequence[str], interface: str, *, bare: bool
) -> list[Program]:
    """The processes of a run: `ranks` on each host, in rank order, or one a host if `bare`.

    `addresses` are the hosts', `interface` is their link's name. Raises UserError.
    """
    check(command, ranks, bare=bare)
    found = []
    for host in range(len(addresses)):
        common = _common(host, addresses[0], interface)
        if bare:
            found.append(
                Program(host, f"host {host}", command, common | _for_bare(host, len(addresses), ranks, addresses[0]))
            )
            continue
        for local_rank in range(ranks):
            rank = host * ranks + local_rank
            argv = [sys.executable, "-u", *command]  # unbuffered, so that lines of ranks come as they are printed
            environment = common | _for_rank(rank, local_rank, host, ranks, len(addresses))
            found.append(Program(host, f"rank {rank} (host {host})", argv, environment))
    return found


def check(command: Sequence[str], ranks: int, *, bare: bool) -> None:
    """Raise UserError if no such command can be started."""
    if not 1 <= ranks <= MOST_RANKS:
        raise UserError(f"ranks = {ranks} is out of range (a host has 1 to {MOST_RANKS}): choose a number in it")
    if not command:
        example = "-- torchrun -m meshwright.training quickstart" if bare else "-- -m meshwright.training quickstart"
        raise UserError(f"lab needs a COMMAND, after -- and its own options: give it one, like {example}")
    first = command[0]
    if bare and system.tool(first) is None:
        raise UserError(f"COMMAND = {first} is not a program (it is not in PATH, or not executable): give one that is")
    if not bare and first not in ("-m", "-c") and not Path(first).is_file():
        raise UserError(
            f"COMMAND = {first} is not a Python file (ranks run what torchrun takes, -m MODULE or FILE.py): "
            "give one, or --bare to start a program once on each host"
        )


def _common(host: int, master: str, interface: str) -> dict[str, str]:
    return {
        "MASTER_ADDR": master,
        "MASTER_PORT": str(MASTER_PORT),
        "GLOO_SOCKET_IFNAME": interface,  # ranks of one host still talk over lo, where a host's own address leads
        "NCCL_SOCKET_IFNAME": interface,
        "NCCL_HOSTID": f"lab-host-{host}",  # or NCCL would see one machine, and go through its shared memory
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # Hosts have addresses and no names, which c10d warns of at every connection.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }


def _for_rank(rank: int, local_rank: int, host: int, ranks: int, hosts: int) -> dict[str, str]:
    numbers = {
        "RANK": rank,
        "WORLD_SIZE": hosts * ranks,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": ranks,
        "GROUP_RANK": host,
        "GROUP_WORLD_SIZE": hosts,
    }
    return {name: str(number) for name, number in numbers.items()}


def _for_bare(host: int, hosts: int, ranks: int, master: str) -> dict[str, str]:
    """The node's place, and the same under the names by which torchrun takes its options from the environment."""
    place = {"NODE_RANK": str(host), "NNODES": str(hosts), "NPROC_PER_NODE": str(ranks)}
    options = {**place, "MASTER_ADDR": master, "MASTER_PORT": str(MASTER_PORT)}
    return place | {f"PET_{name}": value for name, value in options.items()}


# --- to the end -------------------------------------------------------------------------------------------------------


def wait(
    processes: Sequence[subprocess.Popen[Any]], labels: Sequence[str], stop: Stop, timeout_seconds: float | None
) -> int:
    """Until all have ended well, or one has not, or `stop` says so: the exit code. It ends nobody.

    Raises TimeoutError.
    """
    deadline = time.monotonic() + timeout_seconds if timeout_seconds is not None else float("inf")
    while True:
        codes = [process.poll() for process in processes]
        if (number := stop()) is not None:
            return 128 + number
        for label, code in zip(labels, codes, strict=True):
            if code:  # neither running nor well
                print(_failure(label, code, codes.count(None)), file=sys.stderr, flush=True)
                return 128 - code if code < 0 else code
        if None not in codes:
            return 0
        if time.monotonic() > deadline:
            running = ", ".join(label for label, code in zip(labels, codes, strict=True) if code is None)
            raise TimeoutError(f"still running after {timeout_seconds:g} s: {running}")
        time.sleep(_POLL_SECONDS)


def end(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """SIGTERM to those that still run and to what they started; SIGKILL after the grace."""
    deadline = time.monotonic() + GRACE_SECONDS
    _signal(processes, signal.SIGTERM)
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    kill(processes)


def kill(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """SIGKILL to those that still run and to what they started in their groups."""
    _signal(processes, signal.SIGKILL)
    for process in processes:
        process.wait()


def _signal(processes: Sequence[subprocess.Popen[Any]], number: int) -> None:
    for process in processes:
        if process.poll() is None:  # it leads a group, which exists until it has been waited for
            os.killpg(process.pid, number)


def _failure(label: str, code: int, running: int) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    others = f"; the {running} still running are ended" if running > 1 else "; the other is ended" if running else ""
    return f"{label} {how}{others}"

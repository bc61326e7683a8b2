"""Real ranks on the hosts of an emulated cluster: the same pool as `comm.ranks`, but ranks talk over the lab's links.

    with Lab(hosts=2, rate="400mbit") as lab, LabRanks(lab, per_host=2) as ranks:
        results = ranks.run(function, *arguments)

Ranks fill one host after another. Nothing but gloo's traffic goes over the links: functions, results and the
rendezvous go through pipes and files of the machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from meshwright.comm.ranks import Ranks, serve
from meshwright.lab.cluster import INTERFACE, Lab


class LabRanks(Ranks):
    """A pool over all hosts of a lab, `per_host` ranks on each."""

    def __init__(self, lab: Lab, per_host: int = 1, *, timeout_seconds: float = 300.0) -> None:
        self._lab, self._per_host = lab, per_host
        super().__init__(lab.hosts * per_host, timeout_seconds=timeout_seconds)

    def _start(self, context: Any) -> None:
        store = str(Path(self._folder.name) / "store")
        environment = {"GLOO_SOCKET_IFNAME": INTERFACE, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            words = map(str, (theirs.fileno(), rank, self.world, store, self.timeout_seconds))
            process = self._lab.popen(
                rank // self._per_host,
                [sys.executable, "-m", "meshwright.comm.lab_ranks", *words],
                environment,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
            theirs.close()
            self._processes.append(_Process(process))
            self._pipes.append(ours)


class _Process:
    """A program, asked as `multiprocessing.Process` is."""

    def __init__(self, program: subprocess.Popen[Any]) -> None:
        self._program = program

    @property
    def exitcode(self) -> int | None:
        return self._program.poll()

    def is_alive(self) -> bool:
        return self._program.poll() is None

    def kill(self) -> None:
        self._program.kill()

    def join(self, timeout: float | None = None) -> None:
        try:
            self._program.wait(timeout)
        except subprocess.TimeoutExpired:
            return


def main(words: list[str]) -> None:
    """Serve as one rank of the pool that started this program."""
    descriptor, rank, world, store, timeout_seconds = words
    serve(int(rank), int(world), store, Connection(int(descriptor)), float(timeout_seconds))


if __name__ == "__main__":
    main(sys.argv[1:])

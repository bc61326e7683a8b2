"""Real ranks on this machine: forkserver processes with torch preloaded, joined by gloo, used again and again.

On GPUs each rank has its own, and NCCL joins them.

    with Ranks(4) as ranks:
        results = ranks.run(function, *arguments)      # function(*arguments) on every rank; results in rank order

The function must be importable. A rank that raises ends the call with its traceback, one that hangs or dies ends it at
the deadline; either way every rank is gone afterwards. No ports are used: ranks meet through a file.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_STOP = None


BYTES_OF_A_RANK = 200 * 2**20
"""Resident memory of a rank that has imported torch and done nothing yet, generously."""


def available_memory() -> int:
    """Bytes that this machine can still give to processes: free memory and what the page cache would give back."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (kibibytes,) = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return kibibytes * 1024


def available_gpu_memory() -> int:
    """Free bytes of this process's GPU."""
    import torch

    return int(torch.cuda.mem_get_info()[0])


class RankError(RuntimeError):
    """A rank failed: its number, and its traceback or how it ended."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} failed:\n{reason}")
        self.rank, self.reason = rank, reason

    def __reduce__(self) -> Any:
        return type(self), (self.rank, self.reason)


class Ranks:
    """A pool of `world` ranks with a process group over all of them, on the CPU or with a GPU each."""

    def __init__(self, world: int, *, timeout_seconds: float = 300.0, on_gpus: bool = False) -> None:
        self.world, self.timeout_seconds, self.on_gpus = world, timeout_seconds, on_gpus
        self._folder = tempfile.TemporaryDirectory(prefix="meshwright-")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed"])
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        with _deaf_to_interrupts():
            self._start(context)

    def _start(self, context: Any) -> None:
        store = Path(self._folder.name) / "store"
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve,
                args=(rank, self.world, str(store), theirs, self.timeout_seconds, self.on_gpus),
                daemon=True,
                name=f"rank{rank}",
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the pool can still run something."""
        return bool(self._pipes) and all(process.is_alive() for process in self._processes)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(*arguments)` on every rank at once.

        Raises RankError with the first failing rank's traceback, or after the pool's timeout; the pool is closed then.
        """
        assert self._pipes, "the pool is closed"
        results: dict[int, Any] = {}
        try:
            for rank, pipe in enumerate(self._pipes):
                _send(pipe, rank, (function, arguments))
            deadline = time.monotonic() + self.timeout_seconds
            while len(results) < self.world:
                self._collect(results, deadline)
        except BaseException:
            self.close(kill=True)
            raise
        return [results[rank] for rank in range(self.world)]

    def _collect(self, results: dict[int, Any], deadline: float) -> None:
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            slow = min(waiting.values())
            raise RankError(
                slow, f"no answer within {self.timeout_seconds:g} s (ranks waited for: {sorted(waiting.values())})"
            )
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                succeeded, value = pipe.recv()
            except (EOFError, OSError):
                self._processes[rank].join(timeout=5)
                raise RankError(rank, f"the process ended with code {self._processes[rank].exitcode}") from None
            if not succeeded:
                raise RankError(rank, value)
            results[rank] = value

    def close(self, *, kill: bool = False) -> None:
        """End all ranks: politely, or at once."""
        for rank, pipe in enumerate(self._pipes):
            if not kill:
                with suppress(RankError):
                    _send(pipe, rank, _STOP)
            pipe.close()
        for process in self._processes:
            if kill:
                process.kill()
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
        self._pipes, self._processes = [], []
        self._folder.cleanup()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which a terminal sends to all: this process ends them."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _send(pipe: Connection, rank: int, message: Any) -> None:
    try:
        pipe.send(message)
    except OSError as error:
        raise RankError(rank, f"the process is gone: {error}") from None


def serve(rank: int, world: int, store: str, pipe: Connection, timeout_seconds: float, on_gpus: bool = False) -> None:
    """Be one rank of a pool: join its group through the file `store`, and call what comes through `pipe`."""
    import torch
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # torch's modules live for ever: collections need not walk them
    torch.set_num_threads(1)
    if on_gpus:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_seconds),
    )
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            break  # the parent is gone
        if message is _STOP:
            break
        function, arguments = message
        try:
            answer = (True, function(*arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
    dist.destroy_process_group()

"""This process as one rank: what the launcher says of it, and how it leaves.

The environment, that of the launcher and Triton's, is read here and nowhere else. torch is not imported, so that
signals are handled before anything slow begins. A rank leaves in one of these ways:

    the end             the process group is taken down, exit code 0
    SIGTERM, SIGINT     `Ended` is raised wherever the rank is, exit code 128 + signal, no traceback; a rank that is
                        joining the others waits outside of Python, and is ended by the signal itself
    a user's mistake    rank 0 says it at once; the others, who mostly find the same, wait for the launcher's SIGTERM
                        and say it only if that does not come; exit code 2
    a peer is lost      a collective fails. Who does not answer is named at once, in one line, for no launcher of this
                        host can know (`training.lost`). Of a rank that ended, its launcher knows, and is ending
                        everybody: wait for its SIGTERM and stay silent, or say it if that does not come; exit code 1
    the launcher dies   the kernel ends the rank (Linux), for nobody else would
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

PEER_GRACE_SECONDS = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass(frozen=True)
class Place:
    """Where the launcher put this rank. `launched` is false for a process started without one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    launched: bool = False
    master: str = ""
    """The host where ranks meet."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
        """Read the variables that torch's launcher sets."""
        if "RANK" not in environment:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, world, local_rank, local_world = (int(environment[name]) for name in names)
        master = environment.get("MASTER_ADDR", "")
        return cls(rank, world, local_rank, local_world, launched=True, master=master)


TRITON_INTERPRET = "TRITON_INTERPRET"


def interprets_triton(environment: Mapping[str, str]) -> bool:
    """Whether Triton's kernels run in its interpreter, on a CPU; Triton reads the same variable when it is imported."""
    return environment.get(TRITON_INTERPRET, "0").lower() in ("1", "true", "on", "y", "yes")


class Ended(BaseException):
    """A signal asked this rank to leave."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


_signal: int | None = None
"""The first signal that came. Kept, because an exception raised inside a destructor is lost."""


def end_on_signals() -> None:
    """From now on SIGTERM and SIGINT raise `Ended`, and the rank does not outlive its launcher."""
    for number in _SIGNALS:
        signal.signal(number, _on_signal)
    if Place.of(os.environ).launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _on_signal(number: int, frame: Any) -> None:
    global _signal
    _signal = _signal or number
    raise Ended(_signal)


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT end the process by themselves: it waits in C++, where `Ended` cannot be raised.

    For the time before there is anything to clean up.
    """
    leave_if_asked()
    before = {number: signal.signal(number, signal.SIG_DFL) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_if_asked() -> None:
    """Raise `Ended` if a signal came and its exception was lost."""
    if _signal is not None:
        raise Ended(_signal)


def wait_to_be_ended() -> None:
    """Where another rank may be the culprit: give the launcher time to end this one, by `Ended`."""
    leave_if_asked()
    time.sleep(PEER_GRACE_SECONDS)

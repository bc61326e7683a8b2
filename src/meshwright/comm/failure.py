"""A collective that fails because a peer is lost: what it was, and who takes part in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch.distributed as dist

_SIGNS_OF_GLOO = ("gloo", "Application timeout caused pair closure", "Connection closed by peer")
"""Its errors have no type of their own, and not all name the file they come from."""


class Call(NamedTuple):
    """What was put on the wire, for those who time it or say that it failed."""

    operation: str
    axis: str
    site: str
    phase: str
    """As in the account, when it was issued."""
    group: dist.ProcessGroup | None
    """None for the default group."""
    peers: tuple[int, ...] = ()
    """Ranks of the group that a shift sends to and receives from; empty for what the whole group takes part in."""
    issued_seconds: float = 0.0
    """Of `time.perf_counter`."""

    def __str__(self) -> str:
        return f"{self.operation} over {self.axis} in {self.phase} at {self.site}"

    def others(self) -> list[int]:
        """The global ranks besides this one that take part."""
        members = dist.get_process_group_ranks(self.group or dist.group.WORLD)
        taking_part = {members[peer] for peer in self.peers} if self.peers else set(members)
        return sorted(taking_part - {dist.get_rank()})


class CollectiveError(RuntimeError):
    """A peer of a collective is lost; the backend's own error is the cause."""

    def __init__(self, call: Call, seconds: float, reason: str) -> None:
        super().__init__(f"{call} failed after {seconds:.1f} s: {reason}")
        self.call = call
        self.seconds = seconds
        """Since it was issued."""


@contextmanager
def failing_as(call: Call | None, *, accepted: bool = False) -> Iterator[None]:
    """What the backend raises inside for a lost peer is raised as the failure of `call`; None leaves it as it is.

    `accepted`: it was put on the wire without complaint, so nothing but a peer can have failed since.
    """
    try:
        yield
    except RuntimeError as error:
        own_fault = "CUDA error" in str(error)  # of a kernel before it, which is only told here
        if call is None or isinstance(error, CollectiveError) or own_fault or not (accepted or is_lost_peer(error)):
            raise
        seconds = time.perf_counter() - call.issued_seconds
        raise CollectiveError(call, seconds, first_line(error)) from error


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exception says that a collective failed, rather than that this rank has a bug."""
    known = isinstance(error, dist.DistError | CollectiveError)
    return known or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS_OF_GLOO))


def first_line(error: BaseException) -> str:
    """An exception's message without the stack of C++ that torch may append."""
    return next(iter(str(error).splitlines()), type(error).__name__)

"""Who is at work: the site and phase that a collective, or any operation, is attributed to.

Executors enter `scope(site, phase)` around their work, in forward and, with the site they kept, in backward. A recorder
reads `current()` when an operation reaches it, and is told of waits through `observe`. Per thread, because autograd
runs CUDA backward passes on threads of its own.

Observers make waits settle everything that memory is followed by, which takes time; a `Clock` changes nothing that it
measures. Both hear of every thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol


class Scope(NamedTuple):
    """A module's name, a phase, and the axis that a collective is about; None leaves it to the recorder."""

    site: str | None = None
    phase: str | None = None
    axis: str | None = None


class Observer(Protocol):
    """What a recorder implements to learn of the events that no dispatcher sees."""

    def waited(self, pending: Any) -> None:
        """The program waited for a collective."""


class Clock(Protocol):
    """What learns when the program begins to wait for a collective, and when its result is there, at no cost."""

    def begin(self, call: Any) -> None:
        """The program begins to wait for a `comm.failure.Call`."""

    def end(self, call: Any) -> None:
        """It goes on. Not called where the collective fails."""


_local = threading.local()
_observers: list[Observer] = []
_clocks: list[Clock] = []


def current() -> Scope:
    """The innermost scope of this thread."""
    stack = getattr(_local, "stack", None)
    return stack[-1] if stack else Scope()


@contextmanager
def scope(site: str | None = None, phase: str | None = None, axis: str | None = None) -> Iterator[None]:
    """Attribute what happens inside to `site`, `phase` and `axis`; None keeps the outer one."""
    outer = current()
    if not hasattr(_local, "stack"):
        _local.stack = []
    inner = Scope(site, phase, axis)
    _local.stack.append(Scope(*(old if new is None else new for old, new in zip(outer, inner, strict=True))))
    try:
        yield
    finally:
        _local.stack.pop()


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Tell `observer` of every wait inside."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def unaccounted() -> Iterator[None]:
    """What is executed inside belongs to no account: gloo's copies on this thread, DTensor's derivation of shapes."""
    outer, _local.unaccounted = is_unaccounted(), True
    try:
        yield
    finally:
        _local.unaccounted = outer


def is_unaccounted() -> bool:
    """Whether what this thread executes now belongs to no account."""
    return getattr(_local, "unaccounted", False)


def observed() -> bool:
    """Whether anybody observes."""
    return bool(_observers)


def notify_wait(pending: Any) -> None:
    """Tell all observers that a collective was waited for."""
    for observer in _observers:
        observer.waited(pending)


@contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """Let `clock` hear of every wait inside."""
    _clocks.append(clock)
    try:
        yield
    finally:
        _clocks.remove(clock)


@contextmanager
def waiting(call: Any) -> Iterator[None]:
    """Tell all clocks when what happens inside begins and ends."""
    for clock in _clocks:
        clock.begin(call)
    yield
    for clock in reversed(_clocks):
        clock.end(call)

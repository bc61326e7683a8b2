"""Who is at work: the site and phase that a collective, or any operation, is attributed to.

Executors enter `scope(site, phase)` around their work, in forward and, with the site they kept, in backward. A recorder
reads `current()` when an operation reaches it, and is told of issues and waits through `observe`. Per thread, because
autograd runs CUDA backward passes on threads of its own.
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


_local = threading.local()
_observers: list[Observer] = []


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
def inside_backend() -> Iterator[None]:
    """What is executed inside belongs to the communication backend, and to no account (gloo copies on this thread)."""
    outer, _local.inside_backend = is_inside_backend(), True
    try:
        yield
    finally:
        _local.inside_backend = outer


def is_inside_backend() -> bool:
    """Whether this thread waits inside the communication backend."""
    return getattr(_local, "inside_backend", False)


def observed() -> bool:
    """Whether anybody observes."""
    return bool(_observers)


def notify_wait(pending: Any) -> None:
    """Tell all observers that a collective was waited for."""
    for observer in _observers:
        observer.waited(pending)

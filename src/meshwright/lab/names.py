"""What a lab's namespaces are called, and removing those whose owner is gone.

    mw-4242-813307-0-h1     host 1 of lab 0 of process 4242, which started 813307 clock ticks after the machine
    mw-4242-813307-0-switch the bridge between its hosts

A process id and its start name a process for as long as the machine runs, so names never collide and nothing else has
to be written down: a lab is abandoned if no such process lives.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from meshwright.errors import UserError
from meshwright.lab import system

_PATTERN = re.compile(r"(mw-(\d+)-(\d+)-\d+)-(?:h\d+|switch)")
_count = itertools.count()


def new_name() -> str:
    """The name of this process's next lab."""
    pid = os.getpid()
    return f"mw-{pid}-{_start(pid)}-{next(_count)}"


def host(lab: str, index: int) -> str:
    """The namespace of a host."""
    return f"{lab}-h{index}"


def switch(lab: str) -> str:
    """The namespace of the bridge."""
    return f"{lab}-switch"


@dataclass
class Found:
    """A lab that has namespaces on this machine."""

    name: str
    pid: int
    """Its owner."""
    abandoned: bool
    namespaces: list[str] = field(default_factory=list)


def labs() -> list[Found]:
    """All labs of this machine, by name."""
    found: dict[str, Found] = {}
    for namespace in _namespaces():
        if match := _PATTERN.fullmatch(namespace):
            name, pid, start = match[1], int(match[2]), int(match[3])
            lab = found.setdefault(name, Found(name, pid, abandoned=_start(pid) != start))
            lab.namespaces.append(namespace)
    return [found[name] for name in sorted(found)]


def remove(namespaces: list[str]) -> int:
    """Kill what runs in these namespaces and remove them, with the links they hold. How many processes were killed.

    A namespace that is gone already is no error. Raises UserError if one cannot be removed, after the others were.
    """
    killed = system.kill_inside(namespaces)
    refused = None
    for namespace in namespaces:
        try:
            if (system.NAMESPACES / namespace).exists():
                system.call("ip", "netns", "delete", namespace)
        except UserError as error:
            if (system.NAMESPACES / namespace).exists():  # or else somebody was faster
                refused = error
    if refused is not None:
        raise refused
    return killed


def remove_lab(lab: str) -> None:
    """Remove what has this lab's name, also where only a part of it was made."""
    remove([namespace for namespace in _namespaces() if namespace.startswith(f"{lab}-")])


def clean() -> Iterator[str]:
    """Remove the labs whose process is gone, and say in a line each what was removed or left. Raises UserError."""
    system.require()
    for lab in labs():
        if not lab.abandoned:
            yield f"lab {lab.name} is in use by process {lab.pid}: left alone"
            continue
        killed = remove(lab.namespaces)
        yield f"lab {lab.name} removed: {len(lab.namespaces)} namespaces, {killed} processes killed"


def _namespaces() -> list[str]:
    return sorted(os.listdir(system.NAMESPACES)) if system.NAMESPACES.is_dir() else []


def _start(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None if it has ended."""
    try:
        # pid (name) state ppid ...: the name may hold spaces and brackets, and what follows it may not
        values = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if values[0] in "ZX" else int(values[19])

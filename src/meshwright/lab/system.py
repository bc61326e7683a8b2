"""The machine below a lab: what it must have, calling `ip` and `tc`, and who lives in a network namespace.

Commands of iproute2 run in a process group of their own, so that a Ctrl-C in the terminal does not end one half-way.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from meshwright.errors import UserError
from meshwright.lab.rates import Rate

NAMESPACES = Path("/run/netns")
"""Where `ip netns` keeps names; it is a part of its interface."""

_COMMAND_SECONDS = 30
_KILL_SECONDS = 5.0


def require() -> None:
    """Raise UserError if this machine, or this user, can have no lab. Makes nothing, so the kernel may still refuse."""
    if sys.platform != "linux":
        raise UserError(
            f"a lab needs Linux (network namespaces), and this is {sys.platform}: run it on a Linux machine"
        )
    if os.geteuid() != 0:
        raise UserError(
            f"a lab needs root to make network namespaces, and this is user {os.geteuid()}: "
            "run it as sudo $(which meshwright) lab ..., or in a container with CAP_NET_ADMIN and CAP_SYS_ADMIN"
        )
    if missing := [name for name in ("ip", "tc") if tool(name) is None]:
        raise UserError(f"a lab needs iproute2 ({' and '.join(missing)} not found): run apt-get install iproute2")


def tool(name: str) -> str | None:
    """The path of a program. Root's own folders count even where PATH leaves them out."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))


def call(name: str, *arguments: str, text: str | None = None) -> str:
    """Run `ip` or `tc` with `text` on stdin; its stdout. Raises UserError with what the kernel answered."""
    path = tool(name)
    if path is None:
        raise UserError(f"a lab needs iproute2 ({name} not found): run apt-get install iproute2")
    done = subprocess.run(
        [path, *arguments], input=text or "", capture_output=True, text=True, timeout=_COMMAND_SECONDS, process_group=0
    )
    if done.returncode != 0:
        answer = next(iter(done.stderr.splitlines()), f"exit code {done.returncode}")
        raise UserError(
            f"the kernel refused `{name} {' '.join(arguments)}` ({answer}): a lab needs CAP_NET_ADMIN and "
            "CAP_SYS_ADMIN, and a kernel with network namespaces, veth, bridge and tbf (sch_tbf)"
        )
    return done.stdout


def batch(name: str, namespace: str, lines: Iterable[str]) -> None:
    """Let `ip` or `tc` do all of these lines in a namespace, in one process; it stops at the first that fails."""
    if text := "\n".join(lines):
        call(name, "-n", namespace, "-batch", "-", text=text + "\n")


def set_queue(namespace: str, interfaces: Sequence[str], rate: Rate | None) -> None:
    """Limit what these interfaces send, or, with None, no longer."""
    if rate is not None:
        batch("tc", namespace, [f"qdisc replace dev {name} root {rate.qdisc()}" for name in interfaces])
        return
    limited = {
        queue["dev"] for queue in json.loads(call("tc", "-n", namespace, "-j", "qdisc", "show")) if _is_ours(queue)
    }
    batch("tc", namespace, [f"qdisc delete dev {name} root" for name in interfaces if name in limited])


def _is_ours(queue: dict[str, Any]) -> bool:
    return bool(queue.get("root")) and queue["kind"] == "tbf"


def quieten(namespace: str) -> None:
    """No IPv6 on links to come: nobody uses it, and its announcements would be counted. It may stay where /proc/sys is
    read-only, as in some containers."""
    switch_off = "echo 1 2>/dev/null >/proc/sys/net/ipv6/conf/default/disable_ipv6 || true"
    call("ip", "netns", "exec", namespace, "sh", "-c", switch_off)


def session(pid: int) -> int | None:
    """The session of a process; None if it has ended."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def inside(namespace: str) -> list[int]:
    """Process ids in a namespace; none if it does not exist. Never those of the caller's own namespace."""
    place = _identity(NAMESPACES / namespace)
    if place is None or place == _identity(Path("/proc/self/ns/net")):
        return []
    found = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]
    return [pid for pid in found if _identity(Path(f"/proc/{pid}/ns/net")) == place]


def kill_inside(namespaces: Iterable[str], spared: Callable[[int], bool] = lambda pid: False) -> int:
    """SIGKILL all processes in these namespaces but the spared ones, until none is left. How many there were."""
    namespaces, killed = list(namespaces), set[int]()
    deadline = time.monotonic() + _KILL_SECONDS
    while pids := [pid for name in namespaces for pid in inside(name) if not spared(pid)]:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed.add(pid)
        if time.monotonic() > deadline:  # it hangs in the kernel; the signal is there and will reach it
            break
        time.sleep(0.01)
    return len(killed)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:  # the process has ended, or is a zombie, which is in no namespace
        return None
    return status.st_dev, status.st_ino

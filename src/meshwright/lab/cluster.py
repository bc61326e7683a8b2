"""`Lab`: hosts that are network namespaces, joined by a switch, each link of a limited rate.

       mw-…-h0                      mw-…-switch                       mw-…-h1
    ┌────────────┐               ┌────────────────┐               ┌────────────┐
    │ ranks      │  → tbf        │   bridge br0   │        tbf ←  │ ranks      │
    │ lo   eth0 ─┼───────────────┼─ p0        p1 ─┼───────────────┼─ eth0   lo │
    │ ↺ tbf      │        tbf ←  │                │  → tbf        │      tbf ↺ │
    └────────────┘               └────────────────┘               └────────────┘

`rate` is what a host sends at most (on eth0) and receives at most (on the switch's port, so that many senders to one
host share it); `intra_rate` is what the ranks of one host send each other at most, all together, which goes over lo.
All links live in namespaces of the lab's own: in the caller's namespace nothing is made, not even for a moment.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import IO, Any, NamedTuple

from meshwright.errors import UserError
from meshwright.lab import names, system
from meshwright.lab.rates import MTU, Rate
from meshwright.lab.running import Stop, end, kill, never, programs, wait

INTERFACE = "eth0"
"""A host's link to the switch."""
MOST_HOSTS = 250


class Counter(NamedTuple):
    """What went through an interface since the lab was made, frames with all their headers."""

    sent_bytes: int
    received_bytes: int


class Lab:
    """An emulated cluster, from construction to `close` or the end of a `with` block.

        with Lab(hosts=2, rate="400mbit") as lab:
            code = lab.run(["-m", "meshwright.training", "quickstart"], ranks=2)

    Raises UserError where the arguments are wrong or the machine can have no lab. What is left by an owner that was
    killed, `meshwright lab --clean` removes.
    """

    def __init__(self, hosts: int, rate: str | None = None, intra_rate: str | None = None) -> None:
        """Rates are `Rate.parse`'s; None is no limit."""
        if not 1 <= hosts <= MOST_HOSTS:
            raise UserError(f"hosts = {hosts} is out of range (a lab has 1 to {MOST_HOSTS}): choose a number in it")
        limit, intra_limit = _rate(rate, "rate"), _rate(intra_rate, "intra_rate")
        system.require()
        self.hosts = hosts
        self.name = names.new_name()
        self._owner = os.getpid()
        self._running: list[subprocess.Popen[Any]] = []
        atexit.register(self.close)
        try:
            self._make()
            if limit is not None:
                self._limit(limit)
            if intra_limit is not None:
                self._limit_intra(intra_limit)
        except BaseException:
            self.close()
            raise

    def namespace(self, host: int) -> str:
        """The name of a host's network namespace, for `ip netns exec`."""
        assert 0 <= host < self.hosts
        return names.host(self.name, host)

    def address(self, host: int) -> str:
        """The IP address of a host inside the lab."""
        return f"10.77.0.{host + 1}"

    def set_rate(self, rate: str | None) -> None:
        """Change the rate between hosts, also while something runs. Raises UserError."""
        self._limit(_rate(rate, "rate"))

    def set_intra_rate(self, rate: str | None) -> None:
        """Change the rate inside each host, also while something runs. Raises UserError."""
        self._limit_intra(_rate(rate, "intra_rate"))

    def counters(self) -> list[dict[str, Counter]]:
        """For each host, each interface's counter: `lab.counters()[0]["eth0"].sent_bytes`."""
        return [self._counters(names.host(self.name, host)) for host in range(self.hosts)]

    def popen(
        self, host: int, argv: Sequence[str], env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a program on a host, in a session of its own; `env` adds to this process's environment.

        Other options are those of `subprocess.Popen`. Where `setpriv` is installed it gets SIGTERM if this process
        dies. `close` kills it, and whatever else is then on the host.
        """
        ip = system.tool("ip") or "ip"
        command = [ip, "netns", "exec", self.namespace(host), *argv]
        # The kernel watches the thread that forked, and only the main thread lives as long as the process.
        if threading.current_thread() is threading.main_thread() and (setpriv := system.tool("setpriv")):
            command = [setpriv, "--pdeathsig", "TERM", *command]
        environment = {**os.environ, **(env or {})}
        self._running = [process for process in self._running if process.poll() is None]
        process = subprocess.Popen(command, env=environment, start_new_session=True, **options)
        self._running.append(process)
        return process

    def run(
        self,
        command: Sequence[str],
        ranks: int = 1,
        *,
        bare: bool = False,
        env: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        stop: Stop = never,
    ) -> int:
        """Run `command` to its end on all hosts; the exit code of what failed first, as a shell counts it, or 0.

        `command` is what torchrun takes (`-m MODULE ...` or `FILE.py ...`), run by this Python as `ranks` ranks on each
        host; if `bare`, a program, started once on each host. If one fails, the others get SIGTERM, and SIGKILL a few
        seconds later; a line on stderr says which failed. At the end nothing that it started is left. `stop` is
        asked a few times a second for a signal to end everything by; the exit code is then 128 + it.

        Raises UserError for a command that cannot be started, TimeoutError after `timeout_seconds`.
        """
        if (number := stop()) is not None:  # it came while the lab was made
            return 128 + number
        addresses = [self.address(host) for host in range(self.hosts)]
        started: list[subprocess.Popen[Any]] = []
        todo = programs(command, ranks, addresses, INTERFACE, bare=bare)
        try:
            for program in todo:
                environment = {**program.environment, **(env or {})}
                options = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
                started.append(self.popen(program.host, program.argv, environment, **options))
            return wait(started, [program.label for program in todo], stop, timeout_seconds)
        finally:
            end(started)
            self._kill_but(process for process in self._running if process not in started)

    def close(self) -> None:
        """Kill what runs on the hosts, and remove them. Again is no error; in a forked child it does nothing."""
        if os.getpid() != self._owner:
            return
        kill(self._running)  # by their groups: one that has just been forked is not in its namespace yet
        names.remove_lab(self.name)
        self._running = []
        atexit.unregister(self.close)

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _kill_but(self, others: Iterable[subprocess.Popen[Any]]) -> None:
        """SIGKILL what is left on the hosts, such as a daemon; not what `popen` started besides."""
        sessions = {process.pid for process in others}
        system.kill_inside(self._namespaces(), spared=lambda pid: system.session(pid) in sessions)

    # --- links --------------------------------------------------------------------------------------------------------

    def _namespaces(self) -> list[str]:
        return [self.namespace(host) for host in range(self.hosts)]

    def _make(self) -> None:
        switch = names.switch(self.name)
        for namespace in (switch, *self._namespaces()):
            system.call("ip", "netns", "add", namespace)
            system.quieten(namespace)
        ports = [
            line
            for host, namespace in enumerate(self._namespaces())
            for line in (
                f"link add p{host} mtu {MTU} type veth peer name {INTERFACE} mtu {MTU} netns {namespace}",
                f"link set p{host} master br0 up",
            )
        ]
        system.batch("ip", switch, [f"link add br0 mtu {MTU} type bridge mcast_snooping 0", *ports, "link set br0 up"])
        for host, namespace in enumerate(self._namespaces()):
            lines = [
                f"link set lo mtu {MTU} up",  # its own 65536 is more than a token bucket of a slow link lets pass
                f"address add {self.address(host)}/24 dev {INTERFACE}",
                f"link set {INTERFACE} up",
            ]
            system.batch("ip", namespace, lines)

    def _limit(self, rate: Rate | None) -> None:
        for namespace in self._namespaces():
            system.set_queue(namespace, [INTERFACE], rate)
        system.set_queue(names.switch(self.name), [f"p{host}" for host in range(self.hosts)], rate)

    def _limit_intra(self, rate: Rate | None) -> None:
        for namespace in self._namespaces():
            system.set_queue(namespace, ["lo"], rate)

    def _counters(self, namespace: str) -> dict[str, Counter]:
        links = json.loads(system.call("ip", "-n", namespace, "-s", "-j", "link", "show"))
        return {
            link["ifname"]: Counter(link["stats64"]["tx"]["bytes"], link["stats64"]["rx"]["bytes"])
            for link in links
            if link["ifname"] in ("lo", INTERFACE)  # a kernel with tunnel modules puts idle ones into every namespace
        }


def obstacle() -> str | None:
    """Why no lab can be made here, in one line; None if one can. Makes one and removes it, a tenth of a second."""
    try:
        Lab(hosts=1, rate="1gbit").close()
    except UserError as error:
        return str(error)
    return None


def _rate(text: str | None, name: str) -> Rate | None:
    return None if text is None else Rate.parse(text, name)

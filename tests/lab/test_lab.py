"""A lab on this machine: bytes counted, rates kept, and nothing left behind however it ends.

Skipped with the reason where none can be made (not root, no iproute2, a kernel that refuses).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meshwright.lab import Counter, Lab, names, obstacle, system

MEGABYTE = 10**6
PROGRAM = [sys.executable, "-c", "import sys; from meshwright.cli import main; sys.exit(main(sys.argv[1:]))", "lab"]
DEADLINE_SECONDS = 60


@pytest.fixture(autouse=True, scope="module")
def _possible() -> None:
    if reason := obstacle():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _untouched() -> Iterator[None]:
    """No test changes a link of the machine's own, or leaves a namespace of this process's."""
    before = links()
    yield
    assert links() == before
    assert not namespaces(os.getpid())


def links() -> Any:
    """The machine's own links: all but what a link's state changes."""
    keys = ("ifindex", "ifname", "mtu", "qdisc", "link_type", "address")
    return [{key: link.get(key) for key in keys} for link in json.loads(system.call("ip", "-j", "link", "show"))]


def namespaces(pid: int) -> list[str]:
    """Those of a process's labs."""
    return [name for lab in names.labs() if lab.pid == pid for name in lab.namespaces]


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def growth(before: list[dict[str, Counter]], after: list[dict[str, Counter]], interface: str) -> list[Counter]:
    """What went through an interface of each host in between."""
    pairs = [(old[interface], new[interface]) for old, new in zip(before, after, strict=True)]
    return [Counter(b.sent_bytes - a.sent_bytes, b.received_bytes - a.received_bytes) for a, b in pairs]


# --- what is emulated -------------------------------------------------------------------------------------------------

TRANSFER = """
import os, socket, sys, time
sender, receiver, size = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
node, address = int(os.environ["NODE_RANK"]), "10.77.0.%d" % (receiver + 1)
def receive(server):
    with server.accept()[0] as connection:
        left = size
        while left:
            left -= len(connection.recv(min(left, 1 << 20)) or sys.exit(1))
def send():
    for _ in range(500):
        try:
            with socket.create_connection((address, 5000)) as connection:
                return connection.sendall(bytes(size))
        except ConnectionRefusedError:
            time.sleep(0.02)
    sys.exit(1)
if sender == receiver == node:
    server = socket.create_server((address, 5000))
    if os.fork():
        receive(server)
        sys.exit(os.wait()[1])
    send()
elif node == receiver:
    receive(socket.create_server((address, 5000)))
elif node == sender:
    send()
"""


def transfer(lab: Lab, sender: int, receiver: int, size: int = MEGABYTE) -> None:
    command = [sys.executable, "-S", "-c", TRANSFER, str(sender), str(receiver), str(size)]
    assert lab.run(command, bare=True, timeout_seconds=DEADLINE_SECONDS) == 0


def limits(lab: Lab, namespace: str, interface: str) -> tuple[float, bool]:
    """Bytes a second that an interface may send (0: no limit), and whether something had to wait for that."""
    shown = system.call("tc", "-n", namespace, "-s", "-j", "qdisc", "show", "dev", interface)
    found = next((queue for queue in json.loads(shown) if queue["kind"] == "tbf"), None)
    return (found["options"]["rate"], found["overlimits"] > 0) if found else (0, False)


def test_bytes_between_hosts_and_inside_one() -> None:
    with Lab(3, rate="200mbit", intra_rate="400mbit") as lab:
        idle = lab.counters()
        assert [set(host) for host in idle] == [{"lo", "eth0"}] * 3
        assert [host["lo"] for host in idle] == [Counter(0, 0)] * 3
        transfer(lab, 2, 0)
        between = lab.counters()
        to, aside, of = growth(idle, between, "eth0")
        assert MEGABYTE < of.sent_bytes < 1.03 * MEGABYTE
        assert MEGABYTE < to.received_bytes < 1.03 * MEGABYTE
        assert max(of.received_bytes, to.sent_bytes) < 0.03 * MEGABYTE  # acknowledgements
        assert max(aside) < 1000  # a broadcast that asks for an address
        assert growth(idle, between, "lo") == [Counter(0, 0)] * 3
        transfer(lab, 1, 1)
        inside = lab.counters()
        own = growth(between, inside, "lo")
        assert MEGABYTE < own[1].sent_bytes == own[1].received_bytes < 1.03 * MEGABYTE
        assert (own[0], own[2]) == (Counter(0, 0), Counter(0, 0))
        assert max(growth(between, inside, "eth0")[1]) < 1000
        # both senders had to wait for their limits
        assert [limits(lab, lab.namespace(2), "eth0"), limits(lab, lab.namespace(1), "lo")] == [
            (25e6, True),
            (50e6, True),
        ]
        # what many send to one host at once is held back before it, here what one sends without a limit of its own
        system.set_queue(lab.namespace(2), ["eth0"], None)
        transfer(lab, 2, 0)
        assert limits(lab, names.switch(lab.name), "p0") == (25e6, True)


def test_rates_change_on_a_living_lab() -> None:
    with Lab(2) as lab:
        ways = [(lab.namespace(0), "eth0"), (lab.namespace(1), "eth0"), (lab.namespace(1), "lo")]
        ways += [(names.switch(lab.name), port) for port in ("p0", "p1")]

        def rates() -> list[float]:
            return [limits(lab, *way)[0] for way in ways]

        assert rates() == [0] * 5
        lab.set_rate("400mbit")
        assert rates() == [50e6, 50e6, 0, 50e6, 50e6]
        lab.set_rate("100mbit")
        lab.set_intra_rate("1gbit")
        assert rates() == [12.5e6, 12.5e6, 125e6, 12.5e6, 12.5e6]
        transfer(lab, 0, 1, size=MEGABYTE // 4)
        lab.set_rate(None)
        lab.set_intra_rate(None)
        lab.set_rate(None)
        assert rates() == [0] * 5


ALL_REDUCE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
tensor = torch.full((2**20,), float(dist.get_rank()))
dist.all_reduce(tensor)
assert tensor.unique().tolist() == [6.0]
dist.destroy_process_group()
"""


def test_ranks_reduce_over_both_tiers(tmp_path: Path) -> None:
    program = tmp_path / "all_reduce.py"
    program.write_text(ALL_REDUCE)
    with Lab(2, rate="400mbit", intra_rate="1gbit") as lab:
        assert lab.run([str(program)], ranks=2, timeout_seconds=DEADLINE_SECONDS) == 0
        counters = lab.counters()
    wire_bytes = 2 * 3 / 4 * 4 * 2**20  # of a ring of 4: on each host, one rank sends to the other, which sends on
    for host in counters:
        assert wire_bytes < host["eth0"].sent_bytes < 1.03 * wire_bytes
        assert wire_bytes < host["eth0"].received_bytes < 1.03 * wire_bytes
        assert wire_bytes < host["lo"].sent_bytes < 1.03 * wire_bytes


def test_two_labs_at_once_do_not_meet() -> None:
    with Lab(1) as first, Lab(1) as second:
        assert first.name != second.name
        assert len(namespaces(os.getpid())) == 4
        server = first.popen(0, ["sleep", "100"])
        second.close()
        assert server.poll() is None
        assert len(namespaces(os.getpid())) == 2


# --- how it ends ------------------------------------------------------------------------------------------------------


def test_what_fails_first_ends_all(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with Lab(3) as lab:
        script = "if [ $NODE_RANK = 1 ]; then exit 7; fi; exec sleep 100"
        assert lab.run(["sh", "-c", script], bare=True) == 7
        assert not any(system.inside(lab.namespace(host)) for host in range(3))
        program = tmp_path / "killed.py"
        program.write_text("import os, time\nif os.environ['RANK'] == '3': os.kill(os.getpid(), 9)\ntime.sleep(100)\n")
        assert lab.run([str(program)], ranks=2) == 137
    assert capfd.readouterr().err.splitlines() == [
        "host 1 failed with exit code 7; the 2 still running are ended",
        "rank 3 (host 1) was killed by SIGKILL; the 5 still running are ended",
    ]


def test_a_run_ends_what_it_started_and_nothing_else() -> None:
    with Lab(2) as lab:
        mine = lab.popen(1, ["sleep", "100"])
        assert lab.run(["sh", "-c", "setsid sleep 100 & exit 0"], bare=True) == 0
        assert system.inside(lab.namespace(0)) == []
        assert system.inside(lab.namespace(1)) == [mine.pid]
        with pytest.raises(TimeoutError, match=r"still running after 0\.1 s: host 0, host 1"):
            lab.run(["sleep", "100"], bare=True, timeout_seconds=0.1)
        assert system.inside(lab.namespace(1)) == [mine.pid]
    assert mine.returncode == -signal.SIGKILL


def test_closing_does_not_wait_for_what_has_just_started() -> None:
    for _ in range(3):
        with Lab(1) as lab:
            process = lab.popen(0, ["sleep", "100"])
        assert process.returncode == -signal.SIGKILL


def test_an_error_while_it_is_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(namespace: str, interfaces: object, rate: object) -> None:
        assert len(namespaces(os.getpid())) == 3
        raise KeyboardInterrupt

    monkeypatch.setattr(system, "set_queue", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Lab(2, rate="1gbit")
    assert namespaces(os.getpid()) == []


SLEEPERS = "trap '' HUP; setsid sleep 100 & echo up; exec sleep 100"


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`meshwright lab` with a program that is up on both hosts, and has a daemon."""
    command = [*PROGRAM, "--hosts", "2", "--rate", "1gbit", *arguments, "--bare", "--", "sh", "-c", SLEEPERS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
        assert len(namespaces(process.pid)) == 3
        yield process
    finally:
        process.kill()
        process.communicate()
        names.remove(namespaces(process.pid))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGQUIT, 131)]
)
def test_signals_leave_nothing(number: signal.Signals, code: int) -> None:
    with started() as process:
        inside = [pid for name in namespaces(process.pid) for pid in system.inside(name)]
        assert len(inside) >= 4
        process.send_signal(number)
        process.send_signal(number)  # whoever presses Ctrl-C presses it twice
        process.wait(DEADLINE_SECONDS)
        assert process.returncode == code
        assert namespaces(process.pid) == []
        assert not any(alive(pid) for pid in inside)


def test_clean_removes_what_a_killed_lab_left(capsys: pytest.CaptureFixture[str]) -> None:
    from meshwright.cli import main

    with started() as process, Lab(1) as living:
        (lab,) = [lab.name for lab in names.labs() if lab.pid == process.pid]
        inside = [pid for name in namespaces(process.pid) for pid in system.inside(name)]
        process.kill()
        process.wait(DEADLINE_SECONDS)
        assert len(namespaces(process.pid)) == 3
        until(lambda: sum(map(alive, inside)) <= 2)  # with their parent gone, all but the daemons end by themselves
        assert main(["lab", "--clean"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"lab {lab} removed: 3 namespaces, 2 processes killed" in lines
        assert f"lab {living.name} is in use by process {os.getpid()}: left alone" in lines
        assert namespaces(process.pid) == []
        assert not any(alive(pid) for pid in inside)
        assert len(namespaces(os.getpid())) == 2


def alive(pid: int) -> bool:
    return names._start(pid) is not None

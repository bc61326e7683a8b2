"""`meshwright lab`: makes a lab, runs a command in it, and leaves nothing behind, whatever signal comes.

While it runs, a signal is only noted: it is acted upon where nothing is half made or half removed.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from meshwright.lab.cluster import Lab
from meshwright.lab.names import clean
from meshwright.lab.rates import Rate
from meshwright.lab.running import Stop, check

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def run(command: Sequence[str], *, hosts: int, ranks: int, rate: str | None, intra_rate: str | None, bare: bool) -> int:
    """The command's exit code, or 128 + the signal that ended it. What goes where is said on stderr.

    Raises UserError, before anything is made, for what is wrong with the arguments or this machine.
    """
    check(command, ranks, bare=bare)
    for text, name in ((rate, "--rate"), (intra_rate, "--intra-rate")):
        if text is not None:
            Rate.parse(text, name)
    with _noted() as stop, Lab(hosts, rate, intra_rate) as lab:
        limits = f"{_limit(rate)} between hosts, {_limit(intra_rate)} inside one"
        _say(f"lab {lab.name}: {_shape(hosts, ranks, bare)}; {limits}")
        code = lab.run(command, ranks, bare=bare, stop=stop)
        for host, counters in enumerate(lab.counters()):
            seen = (f"{name} sent {c.sent_bytes:,} B, received {c.received_bytes:,} B" for name, c in counters.items())
            _say(f"host {host}: {'; '.join(seen)}")
        return code


def remove_abandoned() -> int:
    """`meshwright lab --clean`: a line for each lab. Raises UserError."""
    for line in list(clean()) or ["no labs: nothing to remove"]:
        print(line)
    return 0


@contextmanager
def _noted() -> Iterator[Stop]:
    """Signals to end by are kept, and the first is handed out."""
    seen: list[int] = []
    numbers = [number for number in _SIGNALS if number != signal.SIGHUP or _heeded(number)]

    def note(number: int, frame: Any) -> None:
        seen.append(number)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: seen[0] if seen else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _heeded(number: signal.Signals) -> bool:
    """Whether the starter left a signal on: nohup switches SIGHUP off."""
    return signal.getsignal(number) is not signal.SIG_IGN


def _shape(hosts: int, ranks: int, bare: bool) -> str:
    each = "1 program" if bare else f"{ranks} rank{'s' if ranks > 1 else ''}"
    return f"{hosts} host{'s' if hosts > 1 else ''} with {each} each" if hosts > 1 else f"1 host with {each}"


def _limit(rate: str | None) -> str:
    return rate if rate is not None else "no limit"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""Who is still there: every rank of a job answers questions on a thread and a socket of its own.

After a collective has failed, the backend's connections are useless, and its message mostly does not say who was
missing: all ranks of a ring wait for their neighbours. So whoever fails asks the others, each by a connection of its
own, what they are doing:

    alive        it answers: what it waits for, and whom it has lost itself
    mute         its host accepts the connection, but the process does not answer: it is stopped
    unreachable  nothing comes back: the host or a link is gone
    ended        its host says that nobody listens there any more
    unknown      it has no address that another host could ask

Nothing is sent while all is well, so that a run's traffic is its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch.distributed as dist

from meshwright.comm.failure import Call
from meshwright.comm.scope import scope

State = Literal["alive", "mute", "unreachable", "ended", "unknown"]
ANSWER_SECONDS = 3.0
"""A thread answers at once, and TCP repeats a lost first packet after a second."""
_TELL_SECONDS = 1.0
_RETRY_SECONDS = 0.05
_MOST_BYTES = 1 << 16


@dataclass(frozen=True)
class Answer:
    """What is known of a rank that was asked."""

    state: State
    doing: str = ""
    """The collective it waits for; empty where it is not in one."""
    seconds: float = 0.0
    """For how long it has been doing so."""
    lost: tuple[int, ...] = ()
    """Ranks that it has found to be gone."""


class Endpoint(NamedTuple):
    """Where a rank answers; an empty host where others cannot reach it."""

    host: str
    port: int


class Lifeline:
    """This rank's thread that answers, and the addresses of the others'. A `comm.scope.Clock`: it knows each wait."""

    def __init__(self, rank: int, host: str) -> None:
        self.rank = rank
        self._host = host
        self._listener = socket.create_server((host, 0), backlog=1024)
        self._token = os.urandom(8).hex()
        self._endpoints: Sequence[Endpoint] = ()
        self._call: Call | None = None
        self._since = time.monotonic()
        self._lost: set[int] = set()
        self._closed = False

    @classmethod
    def join(cls, rank: int, world: int, host: str) -> Lifeline:
        """Exchange addresses with the others. Collective over the default group."""
        lifeline = cls(rank, host)
        found: list[Any] = [None] * world
        with scope(phase="control"):
            dist.all_gather_object(found, (lifeline.endpoint, lifeline._token))
        lifeline.meet([Endpoint(*endpoint) for endpoint, _ in found], token=found[0][1])
        return lifeline

    @property
    def endpoint(self) -> Endpoint:
        """Where this rank answers."""
        return Endpoint(self._host, self._listener.getsockname()[1])

    def meet(self, endpoints: Sequence[Endpoint], token: str) -> None:
        """Know all ranks, and begin to answer; the token tells this job from others."""
        self._endpoints, self._token = endpoints, token
        threading.Thread(target=self._serve, name="lifeline", daemon=True).start()

    def address(self, rank: int) -> str:
        """A rank's host; empty where that says nothing."""
        host = self._endpoints[rank].host
        return "" if host.startswith("127.") else host

    def close(self) -> None:
        """Answer no more."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._listener.close()

    # --- answering ----------------------------------------------------------------------------------------------------

    def begin(self, call: Call | None) -> None:
        """As `comm.scope.Clock` says."""
        self._call, self._since = call, time.monotonic()

    def end(self, call: Call | None) -> None:
        """As `comm.scope.Clock` says."""
        self._call, self._since = None, time.monotonic()

    @property
    def told(self) -> frozenset[int]:
        """Ranks that others have found to be gone, and said so before they left."""
        return frozenset(self._lost)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(_RETRY_SECONDS)  # a caller that hung up, or too many open files: not the end of this rank
                continue
            with connection, suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                connection.settimeout(1.0)
                question = json.loads(connection.makefile("rb").readline(_MOST_BYTES))
                if question["token"] == self._token:
                    self._lost |= set(question["lost"])
                    call, seconds = self._call, time.monotonic() - self._since
                    answer = {
                        "doing": "" if call is None else str(call),
                        "seconds": seconds,
                        "lost": sorted(self._lost),
                    }
                    connection.sendall(json.dumps(answer).encode() + b"\n")

    # --- asking -------------------------------------------------------------------------------------------------------

    def ask(self, ranks: Iterable[int]) -> dict[int, Answer]:
        """What each is doing, within `ANSWER_SECONDS`."""
        return asyncio.run(self._ask_all(list(ranks), (), ANSWER_SECONDS))

    def tell(self, ranks: Iterable[int], lost: Iterable[int]) -> None:
        """Before leaving: say who is lost, so that nobody takes this rank for the culprit."""
        asyncio.run(self._ask_all(list(ranks), tuple(lost), _TELL_SECONDS))

    async def _ask_all(self, ranks: Sequence[int], lost: tuple[int, ...], seconds: float) -> dict[int, Answer]:
        answers = await asyncio.gather(*(self._ask(self._endpoints[rank], lost, seconds) for rank in ranks))
        return dict(zip(ranks, answers, strict=True))

    async def _ask(self, endpoint: Endpoint, lost: tuple[int, ...], seconds: float) -> Answer:
        if not endpoint.host:
            return Answer("unknown")
        writer = None
        try:
            async with asyncio.timeout(seconds):
                reader, writer = await asyncio.open_connection(*endpoint)
                writer.write(json.dumps({"token": self._token, "lost": lost}).encode() + b"\n")
                line = await reader.readline()
        except TimeoutError:
            return Answer("unreachable" if writer is None else "mute")
        except (ConnectionRefusedError, ConnectionResetError, BrokenPipeError):
            return Answer("ended")
        except OSError:  # no route to it
            return Answer("unreachable")
        finally:
            if writer is not None:
                writer.close()
        try:
            said = json.loads(line)
            return Answer("alive", said["doing"], said["seconds"], tuple(said["lost"]))
        except (ValueError, KeyError, TypeError, RecursionError):  # it hung up, or somebody else listens there now
            return Answer("ended")


def own_address(master: str, *, one_host: bool) -> str:
    """The address of this host by which the others reach it; empty where none is known.

    It is that from which this host speaks to `master`, where ranks meet.
    """
    if one_host:
        return "127.0.0.1"
    for host in (master, socket.gethostname()):
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # of a datagram socket: sends nothing, asks for the route
            address = str(probe.getsockname()[0])
            if not address.startswith("127."):
                return address
    return ""

"""Run on ranks: messages both ways, posted in either order."""

from __future__ import annotations

import torch
import torch.distributed as dist

from meshwright.account import Issue, Wait
from meshwright.audit.recorder import Recorder
from meshwright.comm.collectives import Pending


def recorded(order: str) -> list[tuple[str, int]]:
    """Two messages each way, waited for in reverse: what the recorder saw, with its tickets."""
    peer = 1 - dist.get_rank()
    sent, received = torch.ones(2, 2), torch.zeros(2, 2)
    with Recorder() as recorder:
        works = []
        for out, into in zip(sent.unbind(), received.unbind(), strict=True):
            works.append([dist.irecv(into, peer) if post == "r" else dist.isend(out, peer) for post in order])
        for own, into in zip(reversed(works), reversed(received.unbind()), strict=True):
            for work in own:
                assert work is not None
                work.wait()
            recorder.waited(Pending(into))
    assert bool((received == 1).all())
    events = (event for event in recorder.trace().expanded() if isinstance(event, Issue | Wait))
    return [("issue" if isinstance(event, Issue) else "wait", event.ticket) for event in events]

"""A shift receives before it sends: else gloo would let one of two ranks send only after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ranked_shift
import torch

from meshwright.comm import collectives
from meshwright.comm.collectives import Axis
from meshwright.comm.ranks import Ranks


def test_the_receive_is_posted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    posted: list[tuple[Any, ...]] = []
    monkeypatch.setattr(collectives.dist, "P2POp", lambda op, tensor, **_: (op, tensor))
    monkeypatch.setattr(collectives.dist, "batch_isend_irecv", lambda operations: posted.extend(operations) or [])
    sent, received = torch.ones(2), torch.zeros(2)
    Axis("ring", 2, 0).shift(sent, send_to=1, receive_from=1, into=received, site="test")
    assert [operation for operation, _ in posted] == [collectives.dist.irecv, collectives.dist.isend]
    assert [tensor.data_ptr() for _, tensor in posted] == [received.data_ptr(), sent.data_ptr()]


@pytest.mark.parametrize("order", ["rs", "sr"])
def test_waiting_for_what_comes_ends_what_was_sent_beside_it(order: str, ranks: Callable[[int], Ranks]) -> None:
    """Whichever is posted first: ours receive first, other programs may not."""
    for events in ranks(2).run(ranked_shift.recorded, order):
        assert events == [("issue", 1), ("issue", 2), ("wait", 2), ("wait", 1)]

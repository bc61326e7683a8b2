"""The clock of exposed communication: sums by hand, and steps of real ranks that it fills."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ranked_exposed
import torch
from training.tiny import job, write_text

from meshwright.account import COMPUTE_LANE, Span
from meshwright.comm import exposed, failure, scope
from meshwright.comm.collectives import Pending
from meshwright.comm.exposed import WaitClock
from meshwright.comm.failure import Call
from meshwright.comm.ranks import Ranks
from meshwright.config.tree import Layout
from meshwright.planner.step import formula
from meshwright.training.progress import Outcome, timeline

CPU = torch.device("cpu")
TOLERANCE = 0.02
"""compute + exposed + idle = step: what the issue asks for."""


def call(axis: str, phase: str, issued_seconds: float) -> Call:
    return Call("all_reduce", axis, f"site of {axis}", phase, None, issued_seconds=issued_seconds)


class Hand:
    """A clock that is set by hand."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Hand:
    hand = Hand()
    monkeypatch.setattr(exposed, "time", hand)
    return hand


def test_sums_and_spans(hand: Hand) -> None:
    """Two collectives on the wire of one axis, one after another; one of another axis that is there before its wait."""
    early, late, hidden = (
        call("replicate", "backward", 101.0),
        call("replicate", "backward", 102.0),
        call("tensor", "forward", 100.5),
    )
    with WaitClock(CPU) as clock:
        for waited, began, ended in ((early, 103.0, 104.0), (late, 104.0, 106.0), (hidden, 107.0, 107.0)):
            hand.now = began
            with scope.scope(phase=waited.phase), scope.waiting(waited):
                hand.now = ended
        hand.now = 110.0
    reading = clock.reading()
    assert reading is not None
    assert reading.exposed == {("replicate", "backward"): 3.0, ("tensor", "forward"): 0.0}
    assert (reading.compute_seconds, reading.exposed_seconds) == (7.0, 3.0)
    wire = [
        Span("replicate", "all_reduce", "backward", "site of replicate", *when) for when in ((1.0, 4.0), (4.0, 6.0))
    ]
    assert [span for span in reading.spans if span.lane == "replicate"] == wire
    lane = [span for span in reading.spans if span.lane == COMPUTE_LANE]
    assert [(span.name, span.end_seconds) for span in lane] == [
        *(("compute", 3.0), ("wait", 4.0), ("compute", 4.0), ("wait", 6.0), ("compute", 7.0), ("wait", 7.0)),
        ("compute", 10.0),
    ]
    assert [span.start_seconds for span in lane] == [0.0, *(span.end_seconds for span in lane[:-1])]


def test_waits_that_overlap_do_not_add_up(hand: Hand) -> None:
    """The sum is a check: a lane that waits twice at once is longer than the step."""
    with WaitClock(CPU) as clock:
        hand.now = 101.0
        with scope.waiting(call("ring", "forward", 100.0)), scope.waiting(call("ring", "forward", 100.0)):
            hand.now = 105.0
    reading = clock.reading()
    assert reading is not None
    assert reading.compute_seconds + reading.exposed_seconds == pytest.approx(2 * 4.0 + 1.0)


def slow_work(seconds: float) -> Any:
    return SimpleNamespace(wait=lambda: time.sleep(seconds))


def test_a_pending_is_clocked_and_not_observed() -> None:
    """`observed()` would make every wait settle what memory is followed by."""
    with WaitClock(CPU) as clock:
        assert not scope.observed()
        waited = call("tensor", "forward", time.perf_counter())
        with scope.scope(phase="recompute"):
            Pending(torch.ones(1), (slow_work(0.05), slow_work(0.05)), call=waited).wait()
        Pending(torch.ones(1)).wait()  # nothing was on the wire
    Pending(torch.ones(1), (slow_work(0.0),), call=waited).wait()  # nobody's
    reading = clock.reading()
    assert reading is not None
    assert list(reading.exposed) == [("tensor", "recompute")]
    assert reading.exposed_seconds >= 0.1


def test_what_another_stream_waits_for_is_not_known() -> None:
    with WaitClock(CPU) as clock:
        cast(Any, clock)._is_on_lane = lambda: setattr(clock, "_aside", True)
        with scope.waiting(call("shard", "forward", 0.0)):
            pass
    assert clock.reading() is None


LAYOUTS = {
    "tensor × replicate": Layout(tensor=2, replicate=2, gradients="naive"),
    "recomputed": Layout(tensor=2, replicate=2, recompute="full", sequence_parallel=True),
    "bucketed": Layout(replicate=4, gradients="bucketed"),
    "zero 1": Layout(shard=4, zero=1),
    "zero 3": Layout(shard=4, zero=3),
    "ring × ulysses": Layout(ring=2, ulysses=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_collective_is_clocked_and_the_step_is_filled(
    name: str, ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    """Call by call what the ledger has; waits where the recorder sees them; compute + exposed + idle = step."""
    # No evaluation falls between these steps: it would wait for parameters that ZeRO-1 left on their way.
    subject = job(LAYOUTS[name], data=write_text(tmp_path / "text"), steps=100)
    ledger = formula(subject).ledger.rows
    planned = Counter[tuple[str, str, str, str]]()
    for key, count in ledger.items():
        planned[key.operation, key.axis, key.phase, key.site] += count
    for outcomes, waits in ranks(4).run(ranked_exposed.timed_steps, subject, 5):
        if name == "zero 1":  # the recorder cannot know what the step before has left on its way
            waits.add(("shard", "forward"))
        for outcome in outcomes:
            assert outcome.lane is not None
            assert set(outcome.lane.exposed) == waits
            wire = [span for span in outcome.lane.spans if span.lane != COMPUTE_LANE]
            assert Counter((span.name, span.lane, span.phase, span.site) for span in wire) == planned
        assert statistics.median(map(unexplained, outcomes)) < TOLERANCE


def unexplained(outcome: Outcome) -> float:
    """The part of a step that is neither computing, nor waiting, nor reading data, or is counted twice."""
    assert outcome.lane is not None
    parts = outcome.lane.compute_seconds + outcome.lane.exposed_seconds + outcome.idle_seconds
    return abs(parts - outcome.seconds) / outcome.seconds


def test_the_typical_step() -> None:
    """Medians, each by itself; what a step did not wait for counts as no wait; spans are the last step's."""
    span = Span("compute", "compute", "forward", "", 0.0, 1.0)
    lanes = [
        exposed.Reading(4.0, {("tensor", "forward"): 1.0}, ()),
        exposed.Reading(6.0, {("tensor", "forward"): 3.0, ("shard", "backward"): 2.0}, ()),
        exposed.Reading(5.0, {("tensor", "forward"): 2.0}, (span,)),
    ]
    steps = [Outcome(3 + i, 1.0, 1.0, 0.1, 10.0 + i, 0.5, lane) for i, lane in enumerate(lanes)]
    typical = timeline(steps)
    assert (typical.step_seconds, typical.compute_seconds) == (11.0, 5.0)
    assert typical.exposed == {("shard", "backward"): 0.0, ("tensor", "forward"): 2.0}
    assert typical.spans == (span,)
    assert timeline([steps[0]._replace(lane=None)]).to_json()["compute_seconds"] is None


def test_a_call_says_what_it_is() -> None:
    failed = failure.CollectiveError(call("tensor", "backward", 0.0), 5.0, "Connection closed by peer")
    assert str(failed) == (
        "all_reduce over tensor in backward at site of tensor failed after 5.0 s: Connection closed by peer"
    )

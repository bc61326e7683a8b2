"""The timeline on schedules worked by hand, and its loops against the same events one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.account import Compute, Event, Issue, Memory, Repeat, Span, Timeline, Trace, Wait
from meshwright.planner.timeline import Transfer, simulate
from meshwright.schemes.bucketing import Gradients


class ToyCosts:
    """A FLOP takes a second; a byte takes a second, on the link that the axis ends with, after `latency`."""

    def __init__(self, latency: float = 0.0) -> None:
        self.latency = latency

    def compute_seconds(self, event: Compute) -> float:
        return event.flops

    def transfer(self, event: Issue) -> Transfer:
        return Transfer(event.axis, event.axis[-1], self.latency + event.payload_bytes)


def compute(seconds: float, phase: str = "backward", site: str = "") -> Compute:
    return Compute("matmul", seconds, 0, phase, site)  # type: ignore[arg-type]  # fractions of a toy FLOP


def issue(ticket: int, seconds: float, axis: str = "a", phase: str = "backward", site: str = "") -> Issue:
    return Issue("all_reduce", axis, 2, "float32", seconds, phase, site, ticket)  # type: ignore[arg-type]


def wait(ticket: int, phase: str = "backward") -> Wait:
    return Wait(ticket, phase, "")


def timed(*events: Event, latency: float = 0.0) -> Timeline:
    return simulate(Trace(events), ToyCosts(latency))


def edges(timeline: Timeline, lane: str) -> list[tuple[float, float]]:
    return [(span.start_seconds, span.end_seconds) for span in timeline.spans if span.lane == lane]


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_a_wait_right_after_its_issue_blocks() -> None:
    timeline = timed(compute(3, "forward"), issue(1, 2), wait(1, "forward"), compute(4))
    assert timeline.step_seconds == 9
    assert timeline.compute_seconds == 7
    assert timeline.exposed == {("a", "forward"): 2}
    assert edges(timeline, "compute") == [(0, 3), (5, 9)]
    assert edges(timeline, "a") == [(3, 5)]


def test_two_buckets_under_backward() -> None:
    """The first is sent at 3 and hidden, done at 7; the second is sent at 6, starts at 7, and is waited for from 8."""
    timeline = timed(compute(3), issue(1, 4), compute(3), issue(2, 5), compute(2), wait(1), wait(2))
    assert edges(timeline, "a") == [(3, 7), (7, 12)]
    assert timeline.exposed == {("a", "backward"): 4}
    assert timeline.step_seconds == 12


def test_exposed_time_is_its_axis_and_the_phase_of_the_wait() -> None:
    timeline = timed(issue(1, 2, "a"), issue(2, 3, "b"), wait(2, "recompute"), wait(1, "optimiser"))
    assert timeline.exposed == {("b", "recompute"): 3}


def test_axes_of_one_tier_share_its_link_and_others_do_not() -> None:
    """Axes `ax` and `bx` are on link x: one after the other. `ay` is on link y, beside them."""
    shared = timed(issue(1, 2, "ax"), issue(2, 3, "bx"), wait(1), wait(2))
    apart = timed(issue(1, 2, "ax"), issue(2, 3, "ay"), wait(1), wait(2))
    assert (shared.step_seconds, apart.step_seconds) == (5, 3)
    assert shared.exposed == {("ax", "backward"): 2, ("bx", "backward"): 3}
    assert apart.exposed == {("ax", "backward"): 2, ("ay", "backward"): 1}


def test_what_nobody_waits_for_is_exposed_where_it_outlasts_the_step() -> None:
    timeline = timed(issue(1, 1, "a", "forward"), compute(2), issue(2, 7, "b", "optimiser"), compute(3))
    assert timeline.exposed == {("b", "optimiser"): 4}
    assert timeline.step_seconds == 9


def test_prefetch_across_iterations() -> None:
    """Each of 5 iterations computes 4 and waits for what the one before has sent, which takes 6: 2 s exposed each."""
    body = (wait(1, "forward"), issue(1, 6), compute(4))
    timeline = timed(issue(1, 6), Repeat(4, body), wait(1, "forward"), compute(4))
    assert timeline.exposed == {("a", "forward"): 6 + 4 * 2}
    assert timeline.step_seconds == 6 + 4 * 6 + 4


def test_waits_of_a_ticket_match_its_issues_in_order() -> None:
    timeline = timed(issue(1, 2), issue(1, 5), wait(1), compute(1), wait(1))
    assert timeline.exposed == {("a", "backward"): 2 + 4}


def test_a_wait_before_its_issue_is_for_the_step_before() -> None:
    """9 s of gathers, sent after the optimiser, run under 4 s of the next forward."""
    timeline = timed(compute(4, "forward"), wait(1, "forward"), compute(10), issue(1, 9, "a", "optimiser"))
    assert timeline.step_seconds == 4 + 5 + 10
    assert timeline.exposed == {("a", "forward"): 5}
    assert edges(timeline, "a") == [(0, 9)]


def test_control_and_groups_of_one_take_no_time() -> None:
    alone = issue(1, 5)._replace(group_size=1)
    timeline = timed(alone, wait(1), issue(2, 5, phase="control"), wait(2), Memory("logits", 8, "forward", ""))
    assert (timeline.step_seconds, timeline.spans) == (0, ())


def test_spans_are_of_the_first_two_iterations_and_the_last() -> None:
    timeline = timed(Repeat(9, (compute(2, site="layers.*"), issue(1, 1, site="layers.*"), wait(1)), first=8, step=-1))
    assert [span.site for span in timeline.spans if span.lane == "compute"] == ["layers.8", "layers.7", "layers.0"]
    assert edges(timeline, "a") == [(2, 3), (5, 6), (26, 27)]
    assert timeline.step_seconds == 27


def test_neighbours_of_a_kind_and_site_are_one_span() -> None:
    timeline = timed(compute(1, site="x"), compute(2, site="x"), compute(3, site="y"))
    assert timeline.spans == (
        Span("compute", "matmul", "backward", "x", 0, 3),
        Span("compute", "matmul", "backward", "y", 3, 6),
    )


# --- the closed forms of schemes/bucketing.py -------------------------------------------------------------------------


def _buckets(step: Gradients, n: int, *, call: list[Event], transfer: float) -> Iterator[Event]:
    """A bucket is ready after each n-th of backward."""
    for bucket in range(n):
        yield compute(step.backward_seconds / n)
        yield from call
        yield issue(bucket + 1, transfer)
    yield from (wait(bucket + 1) for bucket in range(n))


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_hidden_buckets_expose_what_the_closed_form_says(n: int) -> None:
    """A call holds backward up, its transfer does not."""
    step = Gradients(3 * 2**20, 0.125, 2**20, 8.0)
    assert step.regime == "hidden"
    call: list[Event] = [compute(step.seconds_per_call)]
    timeline = timed(*_buckets(step, n, call=call, transfer=step.transfer_seconds / n))
    assert timeline.step_seconds is not None
    assert timeline.step_seconds - step.backward_seconds == pytest.approx(step.exposed_seconds(n), rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_buckets_on_a_busy_wire_expose_what_the_closed_form_says(n: int) -> None:
    """A call holds the wire up."""
    step = Gradients(12 * 2**20, 0.125, 2**20, 8.0)
    assert step.regime == "wire"
    timeline = timed(*_buckets(step, n, call=[], transfer=step.transfer_seconds / n), latency=step.seconds_per_call)
    assert sum(timeline.exposed.values()) == pytest.approx(step.exposed_seconds(n), rel=1e-9)
    assert timeline.step_seconds == pytest.approx(step.backward_seconds + step.exposed_seconds(n), rel=1e-9)


# --- loops against the same events one by one -------------------------------------------------------------------------

SECONDS = st.integers(0, 6).map(lambda n: n / 4)
TICKETS = st.integers(1, 3)
LEAVES = st.one_of(
    st.builds(compute, SECONDS, st.sampled_from(["forward", "backward"])),
    st.builds(issue, TICKETS, SECONDS, st.sampled_from(["ax", "bx", "ay"])),
    st.builds(wait, TICKETS, st.sampled_from(["forward", "backward"])),
)


def loops_of(inner: st.SearchStrategy[Event]) -> st.SearchStrategy[Event]:
    return st.tuples(st.integers(0, 9), st.lists(inner, max_size=5)).map(
        lambda drawn: Repeat(drawn[0], tuple(drawn[1]))
    )


LOOPS = st.one_of(LEAVES, loops_of(LEAVES), loops_of(st.one_of(LEAVES, loops_of(LEAVES))))


@given(st.lists(LOOPS, max_size=6).map(tuple))
def test_a_loop_takes_as_long_as_its_iterations(events: tuple[Event, ...]) -> None:
    folded = simulate(Trace(events), ToyCosts())
    unrolled = simulate(Trace(tuple(Trace(events).expanded())), ToyCosts())
    assert folded.step_seconds == unrolled.step_seconds
    assert folded.exposed == unrolled.exposed
    assert folded.compute_seconds == unrolled.compute_seconds
    for lane in ("ax", "bx", "ay"):
        assert set(edges(folded, lane)) <= set(edges(unrolled, lane))


@given(st.lists(LOOPS, max_size=6).map(tuple))
def test_compute_and_exposed_add_up_to_the_step(events: tuple[Event, ...]) -> None:
    timeline = simulate(Trace(events), ToyCosts())
    assert timeline.idle_seconds == 0
    for lane in {span.lane for span in timeline.spans}:
        spans = edges(timeline, lane)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
        assert spans[-1][1] <= (timeline.step_seconds or 0)


def test_a_long_loop_is_not_run_iteration_by_iteration() -> None:
    """So many iterations would never end."""
    n = 10**7
    loop = Repeat(n, (compute(1), issue(1, 2), Repeat(n, (compute(1),)), wait(1)))
    assert timed(loop).step_seconds == n * (1 + n)

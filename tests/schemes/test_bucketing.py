"""The bucketing model against every number of buckets tried, and against the schedules that its formulas describe."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import UserError
from meshwright.schemes.bucketing import Gradients, bucket_bytes, text, worksheet

HIDDEN = Gradients(gradient_bytes=1_600_000_000, seconds_per_call=1e-4, bandwidth=10e9, backward_seconds=0.25)
WIRE = Gradients(gradient_bytes=1_600_000_000, seconds_per_call=1e-4, bandwidth=10e9, backward_seconds=0.09)

seconds = st.floats(1e-7, 1.0)
steps = st.builds(Gradients, st.integers(1, 300), seconds, st.floats(1.0, 1e6), seconds)
hidden_steps = steps.filter(lambda step: step.regime == "hidden")
wire_steps = steps.filter(lambda step: step.regime == "wire")
numbers = st.integers(1, 60)


def played(step: Gradients, n: int, calls_hold_up: str) -> float:
    """Exposed seconds of a schedule, bucket by bucket: a call occupies backward or the wire, a transfer the wire."""
    backward = wire = 0.0
    for _ in range(n):
        backward += step.backward_seconds / n
        if calls_hold_up == "backward":
            backward += step.seconds_per_call
        ready = max(backward, wire)
        wire = ready + (step.seconds_per_call if calls_hold_up == "wire" else 0) + step.transfer_seconds / n
    return max(backward, wire) - step.backward_seconds


# --- the two regimes --------------------------------------------------------------------------------------------------


@given(hidden_steps, numbers)
def test_hidden_is_the_schedule_whose_calls_hold_up_backward(step: Gradients, n: int) -> None:
    assert step.exposed_seconds(n) == pytest.approx(played(step, n, "backward"), rel=1e-6, abs=1e-12)


@given(wire_steps, numbers)
def test_wire_is_the_schedule_whose_calls_hold_up_the_wire(step: Gradients, n: int) -> None:
    assert step.exposed_seconds(n) == pytest.approx(played(step, n, "wire"), rel=1e-6, abs=1e-12)


def test_closed_forms() -> None:
    s, o, w, t = vars(HIDDEN).values()
    assert (HIDDEN.regime, WIRE.regime) == ("hidden", "wire")
    assert HIDDEN.ideal_num_buckets() == pytest.approx(math.sqrt(s / (w * o))) == pytest.approx(40)
    assert bucket_bytes(s, o, w, t) == round(math.sqrt(s * w * o)) == 40_000_000
    assert HIDDEN.exposed_seconds(40) == pytest.approx(0.008)
    assert WIRE.ideal_num_buckets() == pytest.approx(math.sqrt(0.09 / o)) == pytest.approx(30)
    assert bucket_bytes(s, o, w, 0.09) == math.ceil(s / 30)
    assert WIRE.exposed_seconds(30) == pytest.approx(30 * o + s / w - 0.09 * 29 / 30)


@given(steps, numbers)
def test_they_meet_at_the_crossover(step: Gradients, n: int) -> None:
    """At s/w = t_bwd, exactly and from either side; and both are the one formula with h."""
    s, o, w, _ = vars(step).values()
    at = [Gradients(s, o, w, s / w * side) for side in (1 - 1e-9, 1, 1 + 1e-9)]
    assert [step.regime for step in at] == ["wire", "hidden", "hidden"]
    below, exact, above = (step.exposed_seconds(n) for step in at)
    assert below == pytest.approx(exact, rel=1e-7) and above == pytest.approx(exact, rel=1e-7)
    one = n * o + step.transfer_seconds - step.hideable_seconds * (n - 1) / n
    assert step.exposed_seconds(n) == pytest.approx(one, rel=1e-6, abs=1e-12)


# --- the best number --------------------------------------------------------------------------------------------------


def best_of_all(step: Gradients) -> float:
    return min(step.exposed_seconds(n) for n in range(1, step.gradient_bytes + 1))


@given(hidden_steps)
def test_best_number_of_all_where_hidden(step: Gradients) -> None:
    assert step.exposed_seconds(step.best_num_buckets()) == pytest.approx(best_of_all(step), rel=1e-12)


@given(wire_steps)
def test_best_number_of_all_on_the_wire(step: Gradients) -> None:
    assert step.exposed_seconds(step.best_num_buckets()) == pytest.approx(best_of_all(step), rel=1e-12)


@pytest.mark.parametrize(("step", "best"), [(HIDDEN, 40), (WIRE, 30)])
def test_best_number_of_the_examples(step: Gradients, best: int) -> None:
    assert min(range(1, 2000), key=step.exposed_seconds) == step.best_num_buckets() == best


@given(steps)
def test_at_the_ideal_number_calls_cost_what_stays_exposed(step: Gradients) -> None:
    ideal = step.ideal_num_buckets()
    assert ideal is not None
    assert ideal * step.seconds_per_call == pytest.approx(step.hideable_seconds / ideal, rel=1e-9)


@given(steps)
def test_buckets_hold_all_bytes(step: Gradients) -> None:
    size = bucket_bytes(*vars(step).values())
    assert 1 <= size <= step.gradient_bytes
    assert size * step.best_num_buckets() >= step.gradient_bytes > (size - 1) * step.best_num_buckets()


def test_ends() -> None:
    s, o, w, t = vars(HIDDEN).values()
    assert bucket_bytes(s, 0.0, w, t) == 1  # calls cost nothing
    assert bucket_bytes(s, o, w, 0.0) == bucket_bytes(s, 0.0, w, 0.0) == s  # nothing to hide under
    assert bucket_bytes(s, 1e6, w, t) == s  # a call costs more than all
    assert bucket_bytes(s, o, w) == 40_000_000  # backward is long enough
    assert bucket_bytes(1, o, w, t) == 1
    assert Gradients(s, 0.0, w, t).ideal_num_buckets() is None
    assert Gradients(s, o, w, 0.0).ideal_num_buckets() == 0
    assert Gradients(3, 1e-9, 1.0, 100.0).best_num_buckets() == 3  # no more buckets than bytes


# --- the worksheet ----------------------------------------------------------------------------------------------------


def figures(**changed: Any) -> dict[str, Any]:
    return worksheet(**(vars(HIDDEN) | changed))["figures"]


def test_worksheet() -> None:
    found = worksheet(**vars(HIDDEN))
    assert (found["name"], found["inputs"]) == ("bucket", vars(HIDDEN))
    assert (found["figures"]["num_buckets"], found["figures"]["bucket_bytes"]) == (40, 40_000_000)
    assert found["figures"]["bucket_mib"] == 40_000_000 / 2**20
    for row in found["figures"]["by_num_buckets"]:
        assert row["exposed_seconds"] == HIDDEN.exposed_seconds(row["num_buckets"])
        assert row["exposed_seconds"] == row["calls_seconds"] + row["exposed_transfer_seconds"]
    assert [row["num_buckets"] for row in found["figures"]["by_num_buckets"]] == [1, 10, 20, 39, 40, 41, 80, 160]
    assert figures(seconds_per_call=0.0)["ideal_num_buckets"] is None
    assert figures(backward_seconds=0.0)["num_buckets"] == 1


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "n* = sqrt(s/(w·o)) = 40, bucket = sqrt(s·w·o) = 40,000,000 B."),
        ({"backward_seconds": 0.09}, "n* = sqrt(t_bwd/o) = 30, bucket = s·sqrt(o/t_bwd) = 53,333,333 B."),
        ({"backward_seconds": 0.0}, "n* = sqrt(t_bwd/o) = 0: one bucket, 1.49 GiB: a second would hide no more than"),
        ({"seconds_per_call": 0.0}, "Calls cost nothing: the more buckets the better, one for each gradient."),
    ],
)
def test_text(changed: dict[str, Any], expected: str) -> None:
    derivation = text(**(vars(HIDDEN) | changed))
    assert expected in derivation
    assert derivation.count("   least") == 1


def test_mistakes_come_at_once() -> None:
    with pytest.raises(UserError) as error:
        worksheet(gradient_bytes=0, bandwidth=0.5, seconds_per_call=-1.0, backward_seconds=1e7)
    assert str(error.value).splitlines() == [
        "--gradient-bytes 0 must be between 1 and 2**40: use 1",
        "--bandwidth 0.5 must be between 1 and 1e+24: use 1",
        "--seconds-per-call -1.0 must be between 0 and 1000000.0: use 0",
        "--backward-seconds 10000000.0 must be between 0 and 1000000.0: use 1000000.0",
    ]

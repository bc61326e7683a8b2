"""FSDP's roofline against its closed form, a published bound and seconds added up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import published_rows

from meshwright.errors import UserError
from meshwright.schemes.fsdp_roofline import critical_intensity, text, worksheet

ASKED = {"tokens": 4_194_304, "width": 16384, "chips": 1024, "peak_flops": 275e12, "bandwidth": 100e9}

asked_for = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 2**30),
        "width": st.integers(1, 2**17),
        "chips": st.integers(1, 2**16),
        "peak_flops": st.floats(1e9, 1e16),
        "bandwidth": st.floats(1e6, 1e13),
    }
)


def figures(**changed: Any) -> dict[str, Any]:
    return worksheet(**(ASKED | changed))["figures"]


def test_figures_of_the_exercise() -> None:
    found = figures()
    assert found["critical_flops_per_byte"] == 2750
    assert found["flops_per_chip"] == 2 * 4_194_304 * 16384**2 / 1024
    assert found["bytes_per_chip"] == 2 * 16384**2
    assert found["flops_per_byte"] == found["tokens_per_chip"] == 4096
    assert (found["critical_tokens"], found["most_chips"], found["hidden"]) == (2750 * 1024, 1525, True)


def test_hidden_exceeds() -> None:
    """At exactly 2750 tokens a chip both take the same time; one token more and communication is the shorter."""
    at, beyond = figures(tokens=2750 * 1024), figures(tokens=2750 * 1024 + 1)
    assert (at["hidden"], beyond["hidden"]) == (False, True)
    assert at["forward"]["compute_seconds"] == pytest.approx(at["forward"]["communication_seconds"], rel=1e-12)
    assert at["most_chips"] == 1023
    assert figures(tokens=2750 * 1024, chips=1023)["hidden"]


@given(asked_for)
def test_ratio_does_not_depend_on_the_width(asked: dict[str, Any]) -> None:
    found = worksheet(**asked)["figures"]
    assert found["flops_per_byte"] == asked["tokens"] / asked["chips"]
    assert found["flops_per_byte"] == pytest.approx(found["flops_per_chip"] / found["bytes_per_chip"], rel=1e-12)
    for name, ratio in (("forward", 1), ("backward", 1), ("backward_float32_reduction", 2 / 3)):
        phase = found[name]
        assert phase["flops_per_byte"] == pytest.approx(phase["flops"] / phase["bytes"], rel=1e-12)
        assert phase["flops_per_byte"] == pytest.approx(ratio * asked["tokens"] / asked["chips"], rel=1e-12)


@given(asked_for)
def test_hidden_is_when_arithmetic_takes_longer(asked: dict[str, Any]) -> None:
    for name in ("forward", "backward", "backward_float32_reduction"):
        phase = worksheet(**asked)["figures"][name]
        compute, wire = phase["compute_seconds"], phase["communication_seconds"]
        if compute == pytest.approx(wire, rel=1e-12):
            continue
        assert phase["hidden"] == (compute > wire)
        assert phase["exposed_seconds"] == pytest.approx(max(0.0, wire - compute))


def test_published_bound_of_v5p() -> None:
    row = next(row for row in published_rows("closed_form_checks.csv") if row["id"] == "fsdp_compute_bound")
    peak, bandwidth = (float(pair.partition("=")[2]) for pair in row["inputs"].split()[1:])
    assert critical_intensity(peak, bandwidth) == float(row["expected"]) == 2550


def test_text() -> None:
    assert "C/W = 2750 FLOPs a byte. B/N exceeds it: hidden." in text(**ASKED)
    assert "B/N does not exceed it: exposed." in text(**(ASKED | {"tokens": 1024}))


def test_mistakes_come_at_once() -> None:
    with pytest.raises(UserError) as error:
        worksheet(tokens=0, width=-5, chips=2**41, peak_flops=0.0, bandwidth=-1.0)
    assert str(error.value).splitlines() == [
        "--tokens 0 must be between 1 and 2**40: use 1",
        "--width -5 must be between 1 and 2**40: use 1",
        "--chips 2199023255552 must be between 1 and 2**40: use 1099511627776",
        "--peak-flops 0.0 must be between 1 and 1e+24: use 1",
        "--bandwidth -1.0 must be between 1 and 1e+24: use 1",
    ]

"""Rates: what is one, what is none, and the bucket that follows from it."""

from __future__ import annotations

import pytest

from meshwright.errors import UserError
from meshwright.lab import Rate, rate_bytes_per_second
from meshwright.lab.rates import MTU


@pytest.mark.parametrize(
    ("text", "bytes_per_second"),
    [
        ("400mbit", 50e6),
        ("1gbit", 125e6),
        ("1.5Gbit", 187.5e6),
        ("100kbit", 12.5e3),
        ("8000bit", 1e3),
        ("50mbps", 50e6),
        ("1mibit", 131072),
        (" 2gbit ", 250e6),
    ],
)
def test_rates(text: str, bytes_per_second: float) -> None:
    assert rate_bytes_per_second(text) == bytes_per_second


@pytest.mark.parametrize("text", ["", "fast", "400", "400mb", "400 mbit", "-1mbit", "1e3mbit", "mbit", "10%", "٣mbit"])
def test_what_is_no_rate(text: str) -> None:
    rule = "a number and its unit, kbit, mbit or gbit; kbps, mbps and gbps are bytes, as tc has it"
    with pytest.raises(UserError) as error:
        Rate.parse(text, "--rate")
    assert str(error.value) == f"--rate = {text!r} is not a rate ({rule}): write it like 400mbit"


@pytest.mark.parametrize("text", ["7999bit", "0gbit", "1.1tbit"])
def test_what_no_link_has(text: str) -> None:
    with pytest.raises(UserError) as error:
        rate_bytes_per_second(text)
    assert str(error.value) == f"rate = {text!r} is out of range (a link has 8kbit to 1tbit): choose a rate in it"


@pytest.mark.parametrize(
    ("text", "qdisc"),
    [
        ("1mbit", "tbf rate 1000000bit burst 20000 limit 282144"),
        ("80mbit", "tbf rate 80000000bit burst 30000 limit 1030000"),
        ("400mbit", "tbf rate 400000000bit burst 70000 limit 5070000"),
        ("10gbit", "tbf rate 10000000000bit burst 1250000 limit 126250000"),
    ],
)
def test_bucket(text: str, qdisc: str) -> None:
    rate = Rate.parse(text)
    assert rate.qdisc() == qdisc
    assert rate.burst_bytes > 2 * MTU  # a bucket below a packet would stop the link for ever

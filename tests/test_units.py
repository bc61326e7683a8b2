"""Numbers as people read them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright import units


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (units.format_bytes, 0, "0 B"),
        (units.format_bytes, 512, "512 B"),
        (units.format_bytes, 1536, "1.50 KiB"),
        (units.format_bytes, 25 * units.MIB, "25 MiB"),
        (units.format_bytes, 80e9, "74.5 GiB"),
        (units.format_bytes, 1024 * units.GIB - 1, "1.00 TiB"),
        (units.format_bytes, 3 * 2**50, "3072 TiB"),
        (units.format_bandwidth, 450e9, "450 GB/s"),
        (units.format_bandwidth, 3350e9, "3.35 TB/s"),
        (units.format_flops, 989e12, "989 TFLOP/s"),
        (units.format_flops, 0.5, "0.50 FLOP/s"),
        (units.format_count, 768, "768"),
        (units.format_count, 8_030_261_248, "8.03 B"),
        (units.format_count, 999_999, "1.00 M"),
        (units.format_seconds, 0, "0 s"),
        (units.format_seconds, 2.5e-10, "0.25 ns"),
        (units.format_seconds, 10e-6, "10.0 µs"),
        (units.format_seconds, 0.0123, "12.3 ms"),
        (units.format_seconds, 0.99996, "1.00 s"),
        (units.format_seconds, 59.7, "1 min 00 s"),
        (units.format_seconds, 200, "3 min 20 s"),
        (units.format_seconds, 7500, "2 h 05 min"),
    ],
)
def test_examples(function, value, text):
    assert function(value) == text


FACTORS = {"B": 1, "KiB": units.KIB, "MiB": units.MIB, "GiB": units.GIB, "TiB": units.TIB}


@given(st.integers(0, 2**60))
def test_bytes_read_back_within_half_a_per_cent(num_bytes):
    number, unit = re.fullmatch(r"([\d.]+) (\w+)", units.format_bytes(num_bytes)).groups()
    assert float(number) * FACTORS[unit] == pytest.approx(num_bytes, rel=0.0051)
    assert unit == "TiB" or float(number) < 1024

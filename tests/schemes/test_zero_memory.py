"""The paper's account of ZeRO against its figure 1, ours against its definition."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import published_rows

from meshwright.errors import UserError
from meshwright.schemes.zero_memory import OURS, bytes_per_parameter, formula, paper, text, worksheet

FIGURE_1 = {"parameters": 7_500_000_000, "degree": 64, "optimiser_bytes": 12}

degrees = st.integers(1, 4096)


def gb(account: str) -> list[float]:
    return [stage["gb"] for stage in worksheet(**FIGURE_1)["figures"][account].values()]


def test_figure_1_of_the_paper() -> None:
    assert [round(value, 1) for value in gb("paper")] == [120, 31.4, 16.6, 1.9]
    assert [formula(paper(), stage) for stage in range(4)] == ["16", "4 + 12/N", "2 + 14/N", "16/N"]


def test_published_figures() -> None:
    rows = [row for row in published_rows("closed_form_checks.csv") if row["id"].endswith("_7.5B_64")]
    assert len(rows) == 4
    for stage, row in enumerate(rows):
        assert row["id"] == f"zero{stage}_7.5B_64"
        assert gb("paper")[stage] == pytest.approx(float(row["expected"]), abs=0.05)


@given(degrees, st.integers(0, 64))
def test_closed_form_of_the_paper(N: int, K: int) -> None:
    kinds = paper(K)
    expected = [Fraction(4 + K), 4 + Fraction(K, N), 2 + Fraction(2 + K, N), Fraction(4 + K, N)]
    assert [bytes_per_parameter(kinds, stage, N) for stage in range(4)] == expected


@given(degrees)
def test_closed_form_of_ours(N: int) -> None:
    expected = [Fraction(16), 8 + Fraction(8, N), 2 + Fraction(16, N), Fraction(16, N)]
    assert [bytes_per_parameter(OURS, stage, N) for stage in range(4)] == expected


def test_figures_of_ours() -> None:
    assert gb("ours") == [120, 60.9375, 16.875, 1.875]
    assert [formula(OURS, stage) for stage in range(4)] == ["16", "8 + 8/N", "2 + 16/N", "16/N"]


@given(st.integers(1, 10**12), degrees, st.integers(0, 64))
def test_kinds_add_up(P: int, N: int, K: int) -> None:
    figures = worksheet(P, N, K)["figures"]
    for account in ("paper", "ours"):
        for stage in figures[account].values():
            assert stage["bytes_per_parameter"] == pytest.approx(sum(stage["by_kind"].values()), rel=1e-12)
            assert stage["gb"] == pytest.approx(stage["bytes_per_parameter"] * P / 1e9, rel=1e-12)


def test_text_has_both() -> None:
    lines = text(**FIGURE_1).splitlines()
    together = [line.split()[1:] for line in lines if "GB per device" in line]
    assert [row[2:] for row in together] == [["120", "31.41", "16.64", "1.875"], ["120", "60.94", "16.88", "1.875"]]
    assert max(map(len, lines)) <= 105


def test_mistakes_come_at_once() -> None:
    asked: dict[str, Any] = {"parameters": 0, "degree": -1, "optimiser_bytes": 100}
    with pytest.raises(UserError) as error:
        worksheet(**asked)
    assert str(error.value).splitlines() == [
        "--parameters 0 must be between 1 and 2**40: use 1",
        "--degree -1 must be between 1 and 2**40: use 1",
        "--optimiser-bytes 100 must be between 0 and 64: use 64",
    ]

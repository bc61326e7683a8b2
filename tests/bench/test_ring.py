"""`bench ring` on real ranks: its accounts are the formula's, its FLOPs and bytes those that one counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from meshwright.bench import ring
from meshwright.bench.context import Setting, account_rank, formula, time_rank
from meshwright.bench.pairs import ratio_row
from meshwright.bench.record import row
from meshwright.comm.ranks import RankError, Ranks
from meshwright.config.tree import Layout
from meshwright.errors import UserError
from meshwright.intervals import median_interval

SETTING = replace(ring.QUICK, samples=2)

Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    return {row.get("layout") or row["comparison"]: row for row in ring.measure(SETTING)}


def test_the_grid_is_whole_and_nothing_failed(rows: Rows) -> None:
    orders = ("contiguous", "zigzag")
    rings = [f"ring {size} {order}" for size in (2, 4) for order in orders]
    layouts = ["ring 1", *rings, "ulysses 1", "ulysses 2", "ulysses 4", "ring 2 zigzag × ulysses 2"]
    against_one = [f"ring 1 / {name}" for name in layouts[1:]]
    balanced = [f"ring {size} contiguous / ring {size} zigzag" for size in (2, 4)]
    assert sorted(rows) == sorted([*layouts, *against_one, *balanced])
    assert not [row["failed"] for row in rows.values() if "failed" in row]
    assert all(len(row["samples"]) == SETTING.samples for row in rows.values())


def test_peaks_are_those_of_the_formula_on_every_rank(rows: Rows) -> None:
    for name, layout in ring.CASES.items():
        assert len(rows[name]["peak_bytes"]) == layout.world == rows[name]["ranks"]
        assert rows[name]["peak_bytes"] == rows[name]["formula_peak_bytes"]
    # q, out, dout, dq; k, v, dk, dv; k, v, dk, dv for each query head; log-sum-exp
    q, kv, lse = 4 * 512 * 32 * 4, 2 * 512 * 32 * 4, 4 * 512 * 4
    assert rows["ring 1"]["peak_bytes"] == [4 * q + 4 * kv + 4 * q + lse] == [2_629_632]


@pytest.mark.parametrize(
    "sizes", [{"precision": "bf16"}, {"batch": 2, "kv_heads": 1}, {"batch": 2, "precision": "bf16"}], ids=str
)
def test_accounts_of_other_sizes(sizes: dict[str, Any], ranks: Callable[[int], Ranks]) -> None:
    setting = replace(SETTING, seq=64, **sizes)
    for layout in ring.CASES.values():
        if layout.world == 4:
            assert ranks(4).run(account_rank, setting, layout) == formula(setting, layout)


def test_flops_are_balanced_in_zigzag_and_rise_in_contiguous_order(rows: Rows) -> None:
    whole = 4 * 512**2 * 4 * 32
    for size in (2, 4):
        block = whole // size**2
        contiguous, zigzag = rows[f"ring {size} contiguous"], rows[f"ring {size} zigzag"]
        assert contiguous["forward_flops"] == [(rank + 1) * block for rank in range(size)]
        assert zigzag["forward_flops"] == [(size + 1) * block // 2] * size
        assert rows[f"ulysses {size}"]["forward_flops"] == [whole // size] * size
        balance = rows[f"ring {size} contiguous / ring {size} zigzag"]
        assert balance["ideal_by_flops"] == float(Fraction(contiguous["forward_flops"][-1], zigzag["forward_flops"][0]))
    assert rows["ring 2 zigzag × ulysses 2"]["forward_flops"] == [whole * 3 // 16] * 4
    for name in ring.CASES:
        assert rows[name]["backward_flops"] == [flops * 5 // 2 for flops in rows[name]["forward_flops"]]


def test_wire_bytes_by_hand(rows: Rows) -> None:
    # Ring 2: k and v of 256 tokens, 2 heads of 32, float32, hop once forward and once backward; their gradients twice.
    kv = 256 * 2 * 32 * 4
    assert rows["ring 2 zigzag"]["wire_bytes"] == [8 * kv] * 2 == [524_288] * 2
    assert rows["ring 2 contiguous"]["wire_bytes"] == [524_288] * 2
    # Ulysses 2: half of q, k, v and out, and half of their gradients.
    q = 256 * 4 * 32 * 4
    assert rows["ulysses 2"]["wire_bytes"] == [2 * (2 * q + 2 * kv) // 2] * 2 == [393_216] * 2
    assert rows["ring 1"]["wire_bytes"] == rows["ulysses 1"]["wire_bytes"] == [0]


def test_a_limit_is_given_where_each_rank_has_a_core() -> None:
    seconds = {name: [2.0, 4.0] for name in ring.CASES} | {"ring 2 zigzag": [1.0, 2.0]}
    found = {row["comparison"]: row for row in ring.comparisons(seconds, {}, cores=2)}
    assert found["ring 2 contiguous / ring 2 zigzag"]["samples"] == [2.0, 2.0]
    assert found["ring 2 contiguous / ring 2 zigzag"]["limit"] == 4 / 3
    assert "limit" not in found["ring 4 contiguous / ring 4 zigzag"]
    assert "limit" not in found["ring 1 / ulysses 1"]
    assert found["ring 1 / ulysses 4"]["limit"] == 2
    found = {row["comparison"]: row for row in ring.comparisons(seconds, {}, cores=4)}
    assert found["ring 4 contiguous / ring 4 zigzag"]["limit"] == 1.6
    assert found["ring 1 / ulysses 4"]["limit"] == 4


# --- what fails stays in the grid -------------------------------------------------------------------------------------


class Stub:
    """Pools in which ring 4 dies in its third sample, and ulysses 2 holds a byte too many."""

    def __init__(self, *_: Any) -> None:
        self.samples = 0

    def run(self, world: int, function: Any, setting: Setting, layout: Layout) -> list[Any]:
        if function is time_rank:
            self.samples += layout == ring.CASES["ring 4 zigzag"]
            if layout == ring.CASES["ring 4 zigzag"] and self.samples == 3:
                raise RankError(2, "Traceback …\nValueError: no")
            return [0.5] * world
        accounts = formula(setting, layout)
        if layout == ring.CASES["ulysses 2"]:
            accounts[1] = accounts[1]._replace(peak_bytes=accounts[1].peak_bytes + 1)
        return accounts


def test_a_case_that_fails_stays_and_takes_its_comparisons_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "_Pools", Stub)
    found = {row.get("layout") or row["comparison"]: row for row in ring.measure(replace(ring.QUICK, samples=5))}
    failed = {name: row["failed"] for name, row in found.items() if "failed" in row}
    assert failed == {
        "ring 4 zigzag": "rank 2: ValueError: no",
        "ulysses 2": "rank 1: peak_bytes 1052673 where the formula has 1052672",
        "ring 4 contiguous / ring 4 zigzag": "ring 4 zigzag failed",
        "ring 1 / ring 4 zigzag": "ring 4 zigzag failed",
        "ring 1 / ulysses 2": "ulysses 2 failed",
    }
    assert len(found["ring 4 zigzag"]["samples"]) == 2


def test_memory_is_asked_for_before_ranks_start() -> None:
    needed = ring.needed_memory(Setting())
    ring.check_memory(Setting(), needed)
    with pytest.raises(UserError, match=r"bench ring needs about 1\.\d\d GiB .* --seq 4096 or --batch 1$"):
        ring.check_memory(Setting(), needed - 1)


# --- ratios of pairs --------------------------------------------------------------------------------------------------


def test_intervals_of_medians() -> None:
    # By a table of the sign test: for 15 samples the 4th and the 12th, for 6 the first and the last.
    assert median_interval([float(i) for i in range(15)]) == (3.0, 11.0, pytest.approx(0.9648, abs=1e-4))
    assert median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (1.0, 6.0, 0.96875)
    assert median_interval([1.0, 2.0, 4.0]) == (1.0, 4.0, 0.75)
    assert median_interval([7.0]) == (7.0, 7.0, 0.0)


def test_a_ratio_is_of_pairs() -> None:
    found = ratio_row("a", "b", {"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 4.0]}, {}, note="x")
    expected = row(samples=[2.0, 3.0, 1.0], unit="ratio", comparison="a / b", interval=[1.0, 3.0], confidence=0.75)
    assert found == expected | {"note": "x"}

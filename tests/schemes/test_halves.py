"""The schedule of half-batches: the order of stages, what runs under what, and the bytes of the unsplit layout."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from meshwright.account import EXACT_KINDS
from meshwright.planner.step import formula
from meshwright.schemes.halves import ATTENTION, MLP, SCHEDULE, Stage
from meshwright.verify.matrix import all_half_cases

STAGES = [(branch, name) for branch in (ATTENTION, MLP) for name in ("enter", "compute", "leave", "add")]
PRODUCTS = ("compute", "leave")


@pytest.mark.parametrize("half", [0, 1])
def test_each_half_goes_through_both_branches(half):
    assert [(branch, name) for own, branch, name in SCHEDULE if own == half] == STAGES


def hidden(order, sends):
    """Of the calls that stages named `sends` put on the wire, those before whose wait the other half multiplies."""
    found = []
    for start, stage in enumerate(order):
        if stage.name != sends:
            continue
        # A half waits in its own next stage.
        end = next(i for i in range(start + 1, len(order)) if order[i].half == stage.half)
        if any(other.name in PRODUCTS for other in order[start + 1 : end]):
            found.append(stage)
    return found


@pytest.mark.parametrize(
    ("order", "sends", "exposed"),
    [
        (SCHEDULE, "enter", Stage(0, ATTENTION, "enter")),
        (SCHEDULE, "leave", Stage(1, MLP, "leave")),
        (SCHEDULE[::-1], "add", Stage(1, MLP, "add")),
        (SCHEDULE[::-1], "compute", Stage(0, ATTENTION, "compute")),
    ],
    ids=["forward gathers", "forward sums", "backward gathers", "backward sums"],
)
def test_three_of_four_calls_run_under_the_other_half(order, sends, exposed):
    calls = [stage for stage in order if stage.name == sends]
    assert len(calls) == 4
    assert set(calls) - set(hidden(order, sends)) == {exposed}


def sent(account, of):
    """Sum of what `of` says of each call, by row but for the payload."""
    rows = Counter()
    for key, count in account.ledger.rows.items():
        rows[key.axis, key.operation, key.phase, key.site] += of(key) * count
    return rows


def is_halved(row):
    """Whether a call is one of a branch of a block, rather than of a unit, a bucket or the rest of the model."""
    axis, _, _, site = row
    return axis in ("tensor", "ring", "ulysses") and site.count(".") == 2 and site.startswith("layers.")


@pytest.mark.parametrize("case", all_half_cases(), ids=str)
def test_bytes_and_flops_are_those_of_the_unsplit_layout(case):
    """In each row, to the byte: sizes are even. Calls of blocks are twice as many."""
    layouts = (replace(case.job.layout, half_batches=own) for own in (True, False))
    halved, whole = (formula(replace(case.job, layout=layout)) for layout in layouts)
    assert sent(halved, lambda key: key.wire_bytes) == sent(whole, lambda key: key.wire_bytes)
    calls = sent(whole, lambda key: 1)
    assert sent(halved, lambda key: 1) == {row: count * (1 + is_halved(row)) for row, count in calls.items()}
    assert any(map(is_halved, calls))
    for phase, kind in itertools.product(("forward", "backward", "recompute"), EXACT_KINDS):
        assert halved.work.flops(phase=phase, kind=kind) == whole.work.flops(phase=phase, kind=kind)

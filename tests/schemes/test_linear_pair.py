"""The worksheet's figures against closed forms, its schedules step by step, its messages word for word."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import UserError
from meshwright.schemes.linear_pair import PAIRINGS, Conjugate, Product, Sizes, ledger, schedule, text, worksheet

ASKED = Sizes(batch=8, seq=128, d_model=1024, d_ff=4096, tensor=4)

sizes = st.builds(
    lambda batch, seq, e, f, tensor: Sizes(batch, seq, e * tensor, f * tensor, tensor),
    *(st.integers(1, 6) for _ in range(4)),
    st.integers(2, 8),
)


def figures(asked=ASKED):
    return worksheet(*vars(asked).values())["figures"]


def test_expected_figures():
    found = figures()
    assert [found["_".join(p)]["wire_elements_per_rank"] for p in PAIRINGS] == [3145728, 11796480, 11796480, 14155776]
    natural = found["column_row"]
    assert natural["forward"] == {
        "all_reduce_y": {
            "elements": 1048576,
            "bytes": 4194304,
            "wire_elements": 1572864,
            "wire_bytes": 6291456,
        }
    }
    assert [row["elements"] for row in natural["backward"].values()] == [1048576]
    assert found["column_column"]["collectives_more"] == 2
    assert found["row_column"]["wire_bytes_group"] == 4 * 4 * 14155776


def test_local_shapes():
    found = figures()
    assert found["column_column"]["layer_2"] == {
        "weight": [4096, 256],
        "input": [8, 128, 4096],
        "output": [8, 128, 256],
    }
    assert found["row_column"]["layer_1"] == {
        "weight": [256, 4096],
        "input": [8, 128, 256],
        "output": [8, 128, 4096],
    }


def test_schedules():
    names = {
        pairing: [step.name if isinstance(step, Conjugate) else step.weight for step in schedule(pairing, ASKED)]
        for pairing in PAIRINGS
    }
    assert names == {
        ("column", "row"): ["copy_to", "w1", "w2", "reduce_from"],
        ("column", "column"): ["copy_to", "w1", "gather_from", "copy_to", "w2", "gather_from"],
        ("row", "row"): ["scatter_to", "w1", "reduce_from", "scatter_to", "w2", "reduce_from"],
        ("row", "column"): ["scatter_to", "w1", "reduce_from", "copy_to", "w2", "gather_from"],
    }


@given(sizes)
def test_wire_elements_in_closed_form(asked):
    """All-reduces send 2(T-1)/T and all-gathers (T-1)/T of x (or y) and h."""
    T, whole = asked.tensor, asked.batch * asked.seq
    x, h = (whole * width * (T - 1) // T for width in (asked.d_model, asked.d_ff))
    found = figures(asked)
    assert found["column_row"]["wire_elements_per_rank"] == 4 * x
    assert found["column_column"]["wire_elements_per_rank"] == 2 * x + h + 2 * h + x
    assert found["row_row"]["wire_elements_per_rank"] == x + 2 * h + h + 2 * x
    assert found["row_column"]["wire_elements_per_rank"] == x + 2 * h + 2 * h + x


@given(sizes)
def test_ledger_and_figures_are_one_account(asked):
    for pairing in PAIRINGS:
        own = figures(asked)["_".join(pairing)]
        rows = ledger(schedule(pairing, asked), asked.tensor)
        assert rows.wire_bytes() == own["wire_bytes_per_rank"] == 4 * own["wire_elements_per_rank"]
        assert sum(rows.rows.values()) == own["collectives"]


@given(sizes)
def test_weights_are_split_once(asked):
    """T parts of a weight are the weight, whatever the split; a layer's product is legal."""
    for pairing in PAIRINGS:
        products = [step for step in schedule(pairing, asked) if isinstance(step, Product)]
        for product in products:
            assert asked.tensor * math.prod(product.weight_shape) == asked.d_model * asked.d_ff
            assert product.input_shape[-1] == product.weight_shape[0]
            assert product.output_shape[-1] == product.weight_shape[1]


def test_every_leaf_is_an_integer():
    def leaves(tree):
        if isinstance(tree, dict | list):
            for inner in tree.values() if isinstance(tree, dict) else tree:
                yield from leaves(inner)
        else:
            yield tree

    assert {type(leaf) for leaf in leaves(figures())} == {int}


def test_one_rank_sends_nothing():
    found = figures(Sizes(1, 2, 3, 5, 1))
    assert {own["collectives"] for own in found.values()} == {0}
    assert {own["wire_bytes_group"] for own in found.values()} == {0}


def test_text_derives_the_totals_and_says_why():
    derivation = text(*vars(ASKED).values())
    for total in ("3,145,728", "11,796,480", "14,155,776"):
        assert total in derivation
    assert "Against (column, row): +2 collectives, +8,650,752 wire elements per rank." in derivation
    assert "adds    forward all-gather h (gather_from):\n          each rank made its own columns of h" in derivation
    assert max(map(len, derivation.splitlines())) <= 100


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            (8, 128, 1024, 4096, 3),
            "--tensor 3 does not divide --d-model 1024 and --d-ff 4096 "
            "(a column or row split gives each rank an equal part of both widths): use 2 or 4",
        ),
        (
            (8, 128, 6, 9, 2),
            "--tensor 2 does not divide --d-ff 9 "
            "(a column or row split gives each rank an equal part of both widths): use 1 or 3",
        ),
        (
            (8, 128, 6, 9, 100),
            "--tensor 100 does not divide --d-model 6 and --d-ff 9 "
            "(a column or row split gives each rank an equal part of both widths): use 3",
        ),
        ((0, 128, 1024, 4096, -4), "--batch 0 must be at least 1: use 1\n--tensor -4 must be at least 1: use 1"),
    ],
)
def test_bad_input(asked, message):
    with pytest.raises(UserError) as error:
        worksheet(*asked)
    assert str(error.value) == message

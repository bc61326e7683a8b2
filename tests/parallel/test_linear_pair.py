"""The worksheet's schedules on real ranks: values equal to one device's bit for bit, ledgers equal to the formula's."""

from dataclasses import replace

import pytest

from meshwright.errors import UserError
from meshwright.parallel import linear_pair
from meshwright.schemes.linear_pair import PAIRINGS, Sizes, ledger, schedule


@pytest.mark.parametrize("world", [2, 4])
def test_counted_is_the_formula(ranks, world):
    sizes = Sizes(batch=2, seq=3, d_model=8, d_ff=20, tensor=world)
    by_rank = ranks(world).run(linear_pair.measure, sizes)
    for rank in by_rank:
        for pairing, measured in zip(PAIRINGS, rank, strict=True):
            assert measured.wrong == ()
            assert measured.ledger == ledger(schedule(pairing, sizes), world)
            assert sum(measured.ledger.rows.values()) == (2 if pairing == PAIRINGS[0] else 4)


def test_run_and_its_table():
    ran = linear_pair.run(batch=2, seq=3, d_model=4, d_ff=8, tensor=1)
    assert ran["agree"] is True
    assert [pairing["rows"] for pairing in ran["pairings"].values()] == [[], [], [], []]
    assert linear_pair.comparison(ran).count("agree: yes") == 4


def test_what_memory_cannot_hold_is_refused():
    sizes = Sizes(batch=8, seq=128, d_model=100_000_000, d_ff=4096, tensor=4)
    with pytest.raises(UserError) as caught:
        linear_pair.run(*vars(sizes).values())
    assert f"({linear_pair.needed_memory(sizes)} bytes)" in str(caught.value)
    assert "--d-model 100000000" in str(caught.value)
    with pytest.raises(UserError, match=r"and 1 GiB \(1073741824 bytes\) are free"):
        linear_pair.check_memory(sizes, 2**30)
    small = replace(sizes, d_model=64)
    linear_pair.check_memory(small, linear_pair.needed_memory(small))


def test_a_wrong_value_or_row_is_no_agreement(ranks):
    sizes = Sizes(batch=1, seq=2, d_model=4, d_ff=8, tensor=2)
    by_rank = ranks(2).run(linear_pair.measure, sizes)
    assert linear_pair.result(sizes, by_rank)["agree"] is True

    by_rank[1][0] = by_rank[1][0]._replace(wrong=("w1",))
    spoilt = linear_pair.result(sizes, by_rank)
    assert spoilt["pairings"]["column_row"]["wrong"] == ["rank 1: w1"]
    assert (spoilt["agree"], spoilt["pairings"]["row_row"]["agree"]) == (False, True)

    other = replace(sizes, d_ff=16)
    assert linear_pair.result(other, by_rank)["pairings"]["row_column"]["agree"] is False

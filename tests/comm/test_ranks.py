"""The pool of ranks: results in order, failures with their traceback, nobody left behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import ranked_failures

from meshwright.comm.ranks import RankError, Ranks


def test_results_come_in_rank_order(ranks: Callable[[int], Ranks]) -> None:
    assert ranks(2).run(ranked_failures.rank_times, 10) == [0, 10]


def test_a_rank_that_raises_ends_the_call_with_its_traceback() -> None:
    with Ranks(2, timeout_seconds=60) as pool:
        with pytest.raises(RankError, match=r"(?s)rank 1 failed:.*ValueError: planted"):
            pool.run(ranked_failures.fail_on_one)
        assert not pool.alive


def test_a_rank_that_dies_ends_the_call() -> None:
    died = pytest.raises(RankError, match=r"rank 1 failed:\nthe process ended with code 3")
    with Ranks(2, timeout_seconds=60) as pool, died:
        pool.run(ranked_failures.die_on_one)


def test_a_rank_that_hangs_ends_the_call_at_the_deadline() -> None:
    with Ranks(2, timeout_seconds=3) as pool, pytest.raises(RankError, match="no answer within 3 s"):
        pool.run(ranked_failures.hang_on_one)

"""`verify` passes for every way to sum gradients and shard states, and names what is planted into them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from jobs import sampled

from meshwright.comm.ranks import Ranks
from meshwright.verify.matrix import STATE_LAYOUTS, StateCase, all_state_cases
from meshwright.verify.verify import verify_on

Pool = Callable[[int], Ranks]

_turns = (divmod(i, len(STATE_LAYOUTS)) for i in range(len(all_state_cases())))
CASES = [case for case, (turn, layout) in zip(all_state_cases(), _turns, strict=True) if turn == (4 * layout + 1) % 6]
SHORT = [case for case in CASES if case.job.layout.world <= 4][::8]
"""Of eight neighbours in the matrix one; all in `make test-all`."""


@pytest.mark.parametrize("case", sampled(SHORT, 2))
def test_right_states_agree(ranks: Pool, case: StateCase) -> None:
    _assert_agrees(case, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in SHORT], ids=str)
def test_right_states_agree_everywhere(ranks: Pool, case: StateCase) -> None:
    _assert_agrees(case, ranks)


def _assert_agrees(case: StateCase, ranks: Pool) -> None:
    report = verify_on(case.job, ranks(case.job.layout.world))
    assert report.agree, report.text()
    assert report.gradients.checked == len(report_parameters(case)) and report.rows["formula"] == report.rows["run"] > 0


def report_parameters(case: StateCase) -> list[str]:
    """The parameters whose gradients must have been compared."""
    from meshwright.model.build import specs_of

    return [spec.name for spec in specs_of(case.job)]

"""`bench matmul`: limits, what is hidden, what the timeline chooses, what is refused; and that subjects agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshwright.account import Issue
from meshwright.bench import overlap, overlap_hierarchical, overlap_rank, record
from meshwright.bench.fit import Fit
from meshwright.bench.overlap_price import Constants, fitted, rates
from meshwright.bench.overlap_rows import Alone, Measured, alone_row, subject_rows, timeline_rows
from meshwright.bench.overlap_subjects import Problem, Subject
from meshwright.cli import main
from meshwright.cli.show_overlap import show_overlap
from meshwright.comm.ranks import Ranks
from meshwright.errors import UserError
from meshwright.lab import obstacle
from meshwright.units import MIB

ABOUT = {"part": "matmul", "problem": "gather_matmul", "hosts": 2, "ratio": 1.0, "link": "8kbit", "note": "of a test"}
ALONE = Alone(compute=0.4, communication=0.3, forward=0.1)
MEASURED = {
    "unsplit": Measured([0.8, 0.8], [0.30, 0.32], 0.8, 0.3, 1000, 0.0),
    "pipelined 1": Measured([0.66, 0.66], [0.2, 0.2], 0.65, 0.15, 1000, 0.0),
    "pipelined 4": Measured([0.6, 0.64], [0.001, 0.002], 0.55, 0.0, 1000, 1e-7),
}
CHUNKS = {"pipelined 1": 1 / 2, "pipelined 4": 1 / 8}


def rows_of(measured: dict[str, Measured], **about: Any) -> list[dict[str, Any]]:
    chunks = {name: chunk for name, chunk in CHUNKS.items() if name in measured}
    return subject_rows(measured, chunks, ALONE, overlap.MOST_ERROR, {**ABOUT, **about})


def test_limit_and_hidden() -> None:
    """0.3 s could be hidden; the limit is forward, compute and an eighth of those 0.3 s."""
    unsplit, _, four, *ratios = rows_of(MEASURED)
    assert "limit" not in unsplit and unsplit["hideable_seconds"] == 0.3
    assert four["limit"] == pytest.approx(0.1 + 0.4 + 0.3 / 8)
    assert four["hidden_seconds"] == pytest.approx(0.18)
    assert four["hidden_of_hideable"] == pytest.approx(0.6)
    assert [row["comparison"] for row in ratios] == ["unsplit / pipelined 1", "unsplit / pipelined 4"]
    assert not [row for row in rows_of(MEASURED) if "failed" in row]


@pytest.mark.parametrize(("change", "why"), [({"error": 1e-3}, "differ"), ({"wire_bytes": 1002}, "1002 bytes")])
def test_a_subject_that_does_something_else_fails(change: dict[str, Any], why: str) -> None:
    wrong = {**MEASURED, "pipelined 4": MEASURED["pipelined 4"]._replace(**change)}
    (failed,) = (row for row in rows_of(wrong) if "failed" in row)
    assert failed["subject"] == "pipelined 4" and why in failed["failed"]


def test_choice_and_regret() -> None:
    """The timeline takes 4 pieces to be fastest, and so they are; what it says of waits is 25 % off for one."""
    setting, *summary = timeline_rows(rows_of(MEASURED))
    assert setting["predicted_order"] == ["pipelined 4", "pipelined 1", "unsplit"]
    assert (setting["choice"], setting["best"], setting["regret"]) == ("pipelined 4", "pipelined 4", 0.0)
    waits = [0.0, 0.25, (0.31 - 0.3) / 0.31]  # the first are below a hundredth of the step, both
    assert setting["exposed_errors"] == pytest.approx(waits)
    assert {row["figure"]: row["met"] for row in summary} == {
        "median regret": True,
        "worst regret": True,
        "median error of exposed seconds": True,
    }


def test_regret_of_a_wrong_choice() -> None:
    wrong = {**MEASURED, "pipelined 1": MEASURED["pipelined 1"]._replace(predicted_seconds=0.5)}
    setting, _, worst, _ = timeline_rows(rows_of(wrong))
    assert (setting["choice"], setting["best"]) == ("pipelined 1", "pipelined 4")
    assert setting["regret"] == pytest.approx((0.66 / 0.6 + 0.66 / 0.64) / 2 - 1)
    assert worst["value"] == setting["regret"] and worst["met"]  # 6.6 %: more than the median may be, not than any


def test_the_simplest_of_equals_is_chosen() -> None:
    equal = {**MEASURED, "pipelined 1": MEASURED["pipelined 1"]._replace(predicted_seconds=0.551)}
    assert timeline_rows(rows_of(equal))[0]["choice"] == "pipelined 1"


def test_auto_chooses_among_what_a_job_could_be() -> None:
    """`unsplit` is not what a layout runs where there is `none`."""
    none = MEASURED["unsplit"]._replace(seconds=[0.9, 0.9])
    found = timeline_rows(rows_of({"unsplit": none._replace(seconds=[0.1, 0.1]), "none": none}, auto="none"))
    assert (found[0]["choice"], found[0]["best"]) == ("none", "none")


def test_one_chunk_of_each_kind() -> None:
    assert overlap_hierarchical.limit(2, 2) == 1.5 and overlap_hierarchical.limit(2, 4) == 1.75
    subjects = overlap.Setting().subjects(overlap.PROBLEMS["step"][0], 4)
    assert [str(subject) for subject in subjects][:2] == ["unsplit", "none"]
    assert "pipelined 8 bidirectional" in map(str, subjects)
    assert str(overlap.Setting().subjects(overlap.PROBLEMS["buckets"][0], 2)[1]) == "bucketed 2 MiB"


# --- prices -----------------------------------------------------------------------------------------------------------


def test_constants_price_what_they_are_taken_from(ranks: Callable[[int], Ranks]) -> None:
    """Compute alone takes as long as it did, and `unsplit` that and its hops, one after the other."""
    problem = overlap.QUICK_PROBLEMS["matmul"][0]
    compute, unsplit = (
        ranks(2).run(overlap_rank.prepare, problem, Subject(kind))[0]
        for kind in ("compute", "unsplit")  # type: ignore[arg-type]
    )
    ranks(2).run(overlap_rank.forget)
    assert compute.trace is not None and unsplit.trace is not None
    flops, memory = rates(compute.trace, 0.5, 1e10)
    constants = Constants(Fit(1e-3, 1e6, ()), flops, memory)
    job = problem.job(Subject("unsplit"), 2)
    assert constants.price(compute.trace, job).seconds == pytest.approx(0.5)
    hop_bytes = problem.seq // 2 * problem.model.d_model * 4
    assert constants.price(unsplit.trace, job).exposed == pytest.approx(1e-3 + hop_bytes / 1e6)


def test_points_that_tell_nothing_leave_the_link() -> None:
    assert fitted([(1000.0, 0.1)], 5e6) == Fit(0.0, 5e6, ())
    assert fitted([(1e6, 0.5), (4e6, 2.0)], 5e6).bandwidth == pytest.approx(2e6)


def test_auto_of_a_step() -> None:
    """Links so fast that nothing is to be hidden leave a step uncut; slow ones do not."""
    job = overlap.PROBLEMS["step"][0].job(Subject("none"), 2)
    fast, slow = (Constants(Fit(0.0, bandwidth, ()), 5e10, 1e10).auto(job) for bandwidth in (1e13, 1e8))
    assert (fast.overlap, slow.overlap) == ("none", "pipelined")


# --- what ranks do ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", overlap.QUICK_PROBLEMS)
@pytest.mark.parametrize("world", [2, 4])
def test_subjects_agree_in_results_and_bytes(part: str, world: int, ranks: Callable[[int], Ranks]) -> None:
    setting = replace(overlap.QUICK, parts=(part,))
    for problem in setting.problems(part):
        subjects = setting.subjects(problem, world)
        found = [ranks(world).run(overlap_rank.prepare, problem, subject) for subject in subjects]
        ranks(world).run(overlap_rank.forget)
        sent = {one.ledger.wire_bytes() for checked in found for one in checked}
        assert max(one.error for checked in found for one in checked) < overlap.MOST_ERROR
        assert max(sent) - min(sent) <= 1e-3 * min(sent) and min(sent) > 0


def test_compute_alone_sends_nothing(ranks: Callable[[int], Ranks]) -> None:
    for problem in (problem for problems in overlap.QUICK_PROBLEMS.values() for problem in problems):
        for checked in ranks(2).run(overlap_rank.prepare, problem, Subject("compute")):
            assert checked.ledger.wire_bytes() == 0
        ranks(2).run(overlap_rank.forget)


def test_unsplit_waits_for_all_it_sends(ranks: Callable[[int], Ranks]) -> None:
    """Every hop is waited for before anything else is computed or sent."""
    for problem in overlap.QUICK_PROBLEMS["block"]:
        checked = ranks(2).run(overlap_rank.prepare, problem, Subject("unsplit"))[0]
        ranks(2).run(overlap_rank.forget)
        assert checked.trace is not None
        events = [e for e in checked.trace.expanded() if type(e).__name__ in ("Compute", "Issue", "Wait")]
        issued = [index for index, event in enumerate(events) if isinstance(event, Issue)]
        assert issued and all(type(events[index + 1]).__name__ == "Wait" for index in issued)


def test_sums_by_tiers_are_checked(ranks: Callable[[int], Ranks]) -> None:
    for way, segments in overlap_hierarchical.SUBJECTS:
        for ledger in ranks(4).run(overlap_hierarchical.check, way, segments, MIB, 2):
            assert ledger.wire_bytes() == 2 * 3 * MIB // 4


# --- the command ------------------------------------------------------------------------------------------------------


def test_mistakes_are_said_at_once() -> None:
    with pytest.raises(UserError) as error:
        overlap.check(overlap.Setting(parts=("all", "block"), hosts=(1, 7), ratios=(0.0,), samples=0))
    assert str(error.value).splitlines() == [
        '--parts = "all" is no part: use some of matmul,block,step,buckets,hierarchical',
        "--hosts = 1 is out of range (communication needs 2, this lab has 8): use 2,4",
        "--hosts = 7 does not divide the 12 heads of block: use 2,4",
        "--ratios = 0 is not a ratio of communication to computation between 0.01 and 100: use 0.5,1,2",
        "--samples = 0 is not a whole number above 0",
    ]


def test_lists_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "matmul", "--hosts", "two"]) == 2
    assert capsys.readouterr().err == '--hosts = "two" is not whole numbers between commas: use 2,4\n'
    assert main(["bench", "matmul", "--ratios", "1;2"]) == 2
    assert capsys.readouterr().err == '--ratios = "1;2" is not numbers between commas: use 0.5,1,2\n'


def test_the_command_measures_the_same_again() -> None:
    parts = "matmul,block,step,buckets,hierarchical"
    assert overlap.Setting().command() == (
        f"meshwright bench matmul --parts {parts} --hosts 2,4 --ratios 0.5,1,2 --samples 9"
    )
    quick = replace(overlap.QUICK, parts=("step",)).command()
    assert quick == "meshwright bench matmul --quick --parts step --hosts 2 --ratios 1 --samples 2"


def test_more_is_expected_to_take_longer() -> None:
    one = overlap.Setting(parts=("block",), hosts=(2,))
    assert overlap.expected_seconds(one) < overlap.expected_seconds(replace(one, samples=30))
    assert overlap.expected_seconds(one) < overlap.expected_seconds(replace(one, hosts=(2, 4)))


def test_rows_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [alone_row("compute", [0.4], ABOUT), *rows_of(MEASURED)]
    rows.append(record.row(part="lost", hosts=4, note="of a test", failed="rank 1: the process ended"))
    show_overlap([*rows, *timeline_rows(rows)])
    out = capsys.readouterr().out
    assert "gather_matmul on 2 hosts at communication / computation = 1, 8kbit" in out
    assert "compute alone 400 ms" in out
    assert "the timeline would choose pipelined 4; the best was pipelined 4: regret 0.0%" in out
    assert "failed: rank 1: the process ended" in out


@pytest.mark.slow
def test_quick_in_the_lab(capsys: pytest.CaptureFixture[str]) -> None:
    if (why := obstacle()) is not None:
        pytest.skip(why)
    words = ["--quick", "--parts", "matmul", "--samples", "1", "--json"]
    assert main(["bench", "matmul", *words]) == 0
    (found,) = json.loads(capsys.readouterr().out)["records"]
    name = f"overlap/{record._slug(found['environment']['device'])}-{found['date']}.json"
    assert list(record.problems(found, Path(name))) == []
    subjects = {row["subject"] for row in found["rows"] if "subject" in row}
    assert subjects == {"unsplit", "pipelined 1", "pipelined 4"}
    assert {row["choice"] for row in found["rows"] if "choice" in row} <= subjects


@pytest.mark.slow
def test_quick_parts_in_the_lab(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the timeline chooses what a quick run does not measure."""
    if (why := obstacle()) is not None:
        pytest.skip(why)
    words = ["--quick", "--parts", "block,step,hierarchical", "--samples", "1", "--json"]
    assert main(["bench", "matmul", *words]) == 0
    (found,) = json.loads(capsys.readouterr().out)["records"]
    assert {row.get("part") for row in found["rows"]} >= {"block", "step", "hierarchical"}
    assert [row["limit"] for row in found["rows"] if row.get("comparison") == "flat / hierarchical"] == [1.5]


def test_a_choice_that_was_not_measured_is_replaced_by_the_cheapest_that_was() -> None:
    rows = [dict(row, auto="pipelined 8") for row in rows_of(MEASURED) if "predicted_seconds" in row]
    assert all(row["subject"] != "pipelined 8" for row in rows)
    (found, *_) = timeline_rows(rows)
    assert found["choice"] in {row["subject"] for row in rows}


def test_problems_are_shared_by_ranks() -> None:
    """The last bucket is the chunk of gradients; of a ring it is one piece."""
    problem = Problem("buckets", overlap.PROBLEMS["buckets"][0].model, 384)
    assert len(problem.gradients.buckets(25.0)) < len(problem.gradients.buckets(2.0))

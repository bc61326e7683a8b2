"""Products that are cut so that communication runs under them: formula = rehearsal = run, and `verify` names faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from jobs import sampled, tiny_job
from planted import FaultyRing, every_axis_right

from meshwright.account import Ledger
from meshwright.comm.ranks import Ranks
from meshwright.config.tree import Job, Layout
from meshwright.planner.step import formula
from meshwright.rehearsal.rehearse import rehearse_job
from meshwright.schemes.tape import Pipeline
from meshwright.verify.agreement import check, differences_of
from meshwright.verify.matrix import OVERLAP_LAYOUTS, OverlapCase, all_overlap_cases, pairs
from meshwright.verify.verify import verify_on

Pool = Callable[[int], Ranks]

ALL = all_overlap_cases()
SAMPLE = [case for number, case in enumerate(ALL) if number % 6 == -(number // 6) % 6]
"""Every layout once; models, rings and the other options in turns."""

SPLIT = Layout(tensor=2, sequence_parallel=True, overlap="pipelined", overlap_chunks=2)
WAYS_OF_4 = replace(SPLIT, tensor=4, overlap_ring="bidirectional")


def test_the_selections_cover_the_matrix() -> None:
    """Of all cases every pair of option values, of the sample every value."""
    values = [{case[option] for case in ALL} for option in range(len(ALL[0]))]
    num_pairs = sum(len(a) * len(b) for i, a in enumerate(values) for b in values[i + 1 :])
    assert len(ALL) == 84 and len(set().union(*map(pairs, ALL))) == num_pairs
    assert [case.layout for case in SAMPLE] == list(OVERLAP_LAYOUTS)
    assert [{case[option] for case in SAMPLE} for option in range(len(ALL[0]))] == values


@pytest.mark.parametrize("case", sampled(SAMPLE, 3))
def test_formula_rehearsal_and_run_agree(case: OverlapCase, ranks: Pool) -> None:
    _assert_agrees(case, ranks, thorough=case in SAMPLE[::5])


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_formula_rehearsal_and_run_agree_everywhere(case: OverlapCase, ranks: Pool) -> None:
    _assert_agrees(case, ranks, thorough=True)


def _assert_agrees(case: OverlapCase, ranks: Pool, *, thorough: bool) -> None:
    agreement = check(case, ranks(case.job.layout.world), thorough=thorough)
    assert not agreement.differences, agreement.differences[:3]
    assert agreement.agrees, (agreement.profiler_peaks, agreement.run_peaks)


# --- bytes ------------------------------------------------------------------------------------------------------------


def wire_bytes_by_axis(ledger: Ledger) -> dict[str, int]:
    return {axis: ledger.wire_bytes(axis) for axis in {key.axis for key in ledger.rows}}


def uncut(job: Job) -> Job:
    return replace(job, layout=replace(job.layout, overlap="none"))


@pytest.mark.parametrize("case", ALL, ids=str)
def test_wire_bytes_of_every_axis_are_those_of_the_uncut_layout(case: OverlapCase) -> None:
    """To the byte: only calls are rounded up, and these sizes divide. Sums in one slice are the uncut ones."""
    cut, whole = (formula(job).ledger for job in (case.job, uncut(case.job)))
    assert wire_bytes_by_axis(cut) == wire_bytes_by_axis(whole)
    assert (cut.rows == whole.rows) == (case.chunks == 1 and not case.job.layout.sequence_parallel)


def test_one_rank_of_the_axis_has_nothing_to_cut() -> None:
    """Typed beside tensor = 1 the option is legal and changes nothing."""
    layout = Layout(replicate=2, overlap="pipelined")
    job = tiny_job(layout=layout)
    assert not layout.violations(job.model, job.cluster, job.training)
    assert Pipeline.of(layout) is None
    assert not list(differences_of(formula(job), formula(uncut(job))))


@pytest.mark.parametrize(
    ("split", "batch", "seq_len", "ring"),
    [
        (True, 1, 4, "unidirectional"),
        pytest.param(True, 3, 8, "bidirectional", marks=pytest.mark.slow),
        (False, 1, 4, "unidirectional"),
    ],
)
def test_fewer_rows_than_chunks(ranks: Pool, split: bool, batch: int, seq_len: int, ring: str) -> None:
    """A rank has 1, 6 or 4 rows: the chunks are as many as there are rows."""
    layout = Layout(tensor=4, sequence_parallel=split, overlap="pipelined", overlap_chunks=8)
    job = tiny_job("grouped_query", replace(layout, overlap_ring=ring), batch=batch, seq_len=seq_len)
    report = verify_on(job, ranks(4), every_axis_right)
    assert report.agree, report.text()
    assert not list(differences_of(formula(job), rehearse_job(job)))


# --- right layouts, and faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SAMPLE[2::10], ids=str)
def test_right_layouts_agree(ranks: Pool, case: OverlapCase) -> None:
    report = verify_on(case.job, ranks(case.job.layout.world), every_axis_right)
    assert report.agree, report.text()
    assert report.gradients.checked > 10 and report.rows["formula"] == report.rows["run"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ALL[::2] if case not in SAMPLE[2::10]], ids=str)
def test_right_layouts_agree_everywhere(ranks: Pool, case: OverlapCase) -> None:
    report = verify_on(case.job, ranks(case.job.layout.world), every_axis_right)
    assert report.agree, report.text()


@pytest.mark.parametrize(
    ("fault", "layout", "module", "in_backward"),
    [
        pytest.param("wrong way", replace(SPLIT, tensor=4), "layers.0.attention", False, marks=pytest.mark.slow),
        pytest.param("wrong way", WAYS_OF_4, "layers.1.mlp", True, marks=pytest.mark.slow),
        pytest.param("counted twice", SPLIT, "layers.0.mlp", False, marks=pytest.mark.slow),
        ("counted twice", SPLIT, "layers.1.attention", True),
        ("piece before", replace(SPLIT, overlap_ring="bidirectional"), "layers.1.attention", False),
        pytest.param("piece before", SPLIT, "layers.0.mlp", True, marks=pytest.mark.slow),
    ],
)
def test_a_fault_of_a_hop_is_named(ranks: Pool, fault: str, layout: Layout, module: str, in_backward: bool) -> None:
    """Its bytes are right, so that the numbers alone tell: first those of the module it is in."""
    job = tiny_job("grouped_query", layout)
    report = verify_on(job, ranks(layout.world), FaultyRing(module, fault, in_backward))
    assert not report.agree and report.first_difference is not None
    kind = "gradient" if in_backward else "activation"
    assert (report.first_difference.kind, report.first_difference.module) == (kind, module)
    assert report.loss_passes == in_backward
    assert not report.formula_vs_rehearsal and not report.rehearsal_vs_run


@pytest.mark.slow
def test_rows_that_both_rings_of_an_mlp_send_the_wrong_way(ranks: Pool) -> None:
    """The gather permutes them, the scatter puts them back: only gradients, of what was saved permuted, tell."""
    job = tiny_job("grouped_query", replace(SPLIT, tensor=4))
    report = verify_on(job, ranks(4), FaultyRing("layers.1.mlp", "wrong way", in_backward=False))
    assert report.loss_passes and report.first_difference is not None
    assert (report.first_difference.kind, report.first_difference.module) == ("gradient", "layers.1.mlp")

"""Blocks in two half-batches: formula = rehearsal = run, and `verify` names faults."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
from jobs import sampled, tiny_job
from planted import Fault, every_axis_right

from meshwright.comm.ranks import Ranks
from meshwright.config.tree import Layout, Model
from meshwright.planner.step import formula
from meshwright.rehearsal.rehearse import rehearse_job
from meshwright.verify.agreement import check, differences_of
from meshwright.verify.matrix import HALF_LAYOUTS, HalfCase, Recompute, all_half_cases, pairs
from meshwright.verify.verify import verify_on

Pool = Callable[[int], Ranks]

ALL = all_half_cases()
SAMPLE = [ALL[27 * (number % 2) + 3 * number + number % 3] for number in range(len(HALF_LAYOUTS))]
"""Every layout once; models and the other options in turns."""


def test_the_selections_cover_the_matrix() -> None:
    """Of all cases every pair of option values, of the sample every value."""
    values = [{case[option] for case in ALL} for option in range(len(ALL[0]))]
    num_pairs = sum(len(a) * len(b) for i, a in enumerate(values) for b in values[i + 1 :])
    assert len(ALL) == 54 and len(set().union(*map(pairs, ALL))) == num_pairs
    assert [case.layout for case in SAMPLE] == list(HALF_LAYOUTS)
    assert [{case[option] for case in SAMPLE} for option in range(len(ALL[0]))] == values


@pytest.mark.parametrize("case", sampled(SAMPLE, 3))
def test_formula_rehearsal_and_run_agree(case: HalfCase, ranks: Pool) -> None:
    _assert_agrees(case, ranks, thorough=case in SAMPLE[::5])


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_formula_rehearsal_and_run_agree_everywhere(case: HalfCase, ranks: Pool) -> None:
    _assert_agrees(case, ranks, thorough=True)


def _assert_agrees(case: HalfCase, ranks: Pool, *, thorough: bool) -> None:
    agreement = check(case, ranks(case.job.layout.world), thorough=thorough)
    assert not agreement.differences, agreement.differences[:3]
    assert agreement.agrees, (agreement.profiler_peaks, agreement.run_peaks)


WIDE_HEADS = Model(layers=1, d_model=64, d_ff=16, heads=8, kv_heads=8, head_dim=64, vocab_size=16)
WIDE_STREAM = Model(layers=2, d_model=256, d_ff=256, heads=8, kv_heads=1, head_dim=8, vocab_size=16, bias=True)


@pytest.mark.parametrize("model", [WIDE_HEADS, WIDE_STREAM], ids=["in attention", "in a norm or an MLP"])
@pytest.mark.parametrize(
    ("split", "recompute", "device"), sampled(itertools.product([False, True], ["none", "full"], ["cpu", "cuda"]), 3)
)
def test_formula_equals_rehearsal_wherever_the_peak_is(
    model: Model, split: bool, recompute: Recompute, device: str
) -> None:
    layout = Layout(tensor=2, sequence_parallel=split, recompute=recompute, overlap="none", half_batches=True)
    job = tiny_job(model, layout, "bf16", batch=8, seq_len=40, loss_chunk=4, device=device)
    planned = formula(job)
    assert planned.footprint.peak_site != "loss"
    assert not list(differences_of(planned, rehearse_job(job)))


# --- right layouts, and faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SAMPLE[::5], ids=str)
def test_right_layouts_agree(ranks: Pool, case: HalfCase) -> None:
    report = verify_on(case.job, ranks(case.job.layout.world), every_axis_right)
    assert report.agree, report.text()
    assert report.gradients.checked > 10 and report.rows["formula"] == report.rows["run"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ALL[::2] if case not in SAMPLE[::5]], ids=str)
def test_right_layouts_agree_everywhere(ranks: Pool, case: HalfCase) -> None:
    report = verify_on(case.job, ranks(case.job.layout.world), every_axis_right)
    assert report.agree, report.text()


@pytest.mark.parametrize(
    ("module", "fault", "in_backward"),
    [
        ("layers.0.attention", "missing", False),
        ("layers.1.mlp", "wrong tensor", False),
        ("layers.0.mlp", "missing", True),
        ("layers.1.attention", "doubled", True),
    ],
)
def test_a_planted_fault_is_named(ranks: Pool, module: str, fault: str, in_backward: bool) -> None:
    """Probes of both halves are joined before they are compared: the module is the one with the fault."""
    job = tiny_job("grouped_query", Layout(tensor=2, overlap="none", half_batches=True))
    report = verify_on(job, ranks(2), Fault(module, fault, in_backward))
    assert report.first_difference is not None
    kind = "gradient" if in_backward else "activation"
    assert (report.first_difference.kind, report.first_difference.module) == (kind, module)
    assert (module in {d.site for d in report.formula_vs_rehearsal}) == (fault != "wrong tensor")


def test_one_rank_of_the_axis_has_nothing_to_hide() -> None:
    """Typed beside tensor = 1 the option is legal, for any batch, and changes nothing."""
    job = tiny_job(layout=Layout(replicate=2, half_batches=True), batch=6)
    plain = replace(job, layout=Layout(replicate=2))
    assert not job.layout.violations(job.model, job.cluster, job.training)
    assert not list(differences_of(formula(job), formula(plain)))
    assert not list(differences_of(formula(job), rehearse_job(job)))

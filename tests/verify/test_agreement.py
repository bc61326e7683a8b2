"""The one idea as a test: formula = rehearsal = run, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import sampled

from meshwright.account import CATEGORIES, EXACT_KINDS, diff
from meshwright.comm.ranks import Ranks
from meshwright.config.tree import Job, Layout, Model, Training
from meshwright.planner.step import formula
from meshwright.rehearsal.rehearse import rehearse_job
from meshwright.verify.agreement import _beside_scratch, check, differences_of
from meshwright.verify.matrix import (
    STATE_LAYOUTS,
    AnyCase,
    Case,
    Precision,
    all_cases,
    all_long_cases,
    all_state_cases,
    covering_cases,
    pairs,
)

ALL: list[AnyCase] = [*all_cases(), *all_long_cases(), *all_state_cases()]
SHORT = covering_cases(all_cases())
LONG = [case for case in all_long_cases() if case.job.layout.world <= 4][::7]
"""Eight ranks on two cores are left to `make test-all`."""
_turns = (divmod(i, len(STATE_LAYOUTS)) for i in range(len(all_state_cases())))
STATES = [case for case, (turn, layout) in zip(all_state_cases(), _turns, strict=True) if turn == 2 * layout % 6]
STATES = [case for case in STATES if case.job.layout.world <= 4]
"""Every layout once, models and the other options in turns."""


def test_the_selections_cover_the_matrices() -> None:
    """Of the first every pair of option values, of the second every value."""
    assert (len(all_cases()), len(all_long_cases()), len(all_state_cases())) == (120, 162, 246)
    assert set().union(*map(pairs, SHORT)) == set().union(*map(pairs, all_cases()))
    few_ranks = [case for case in all_long_cases() if case.job.layout.world <= 4]
    for option in range(len(few_ranks[0])):
        assert {case[option] for case in LONG} == {case[option] for case in few_ranks}
    few_ranks = [case for case in all_state_cases() if case.job.layout.world <= 4]
    for option in range(len(few_ranks[0])):
        assert {case[option] for case in STATES} == {case[option] for case in few_ranks}


@pytest.mark.parametrize("case", sampled(SHORT, 5) + sampled(LONG, 5) + sampled(STATES, 3))
def test_formula_rehearsal_and_run_agree(case: AnyCase, ranks: Callable[[int], Ranks]) -> None:
    _assert_agrees(case, ranks, thorough=case in SHORT[::6] or case in STATES[::12])


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_formula_rehearsal_and_run_agree_everywhere(case: AnyCase, ranks: Callable[[int], Ranks]) -> None:
    _assert_agrees(case, ranks, thorough=True)


def _assert_agrees(case: AnyCase, ranks: Callable[[int], Ranks], *, thorough: bool) -> None:
    agreement = check(case, ranks(case.job.layout.world), thorough=thorough)
    assert not agreement.differences, agreement.differences[:3]
    assert agreement.witnessed, (agreement.profiler_peaks, agreement.run_peaks)
    assert agreement.agrees


def test_the_witness_leaves_out_what_an_operator_takes_for_itself() -> None:
    """And nothing else: neither what outlives the operator, nor what other operators or threads take meanwhile."""

    def events(*taken_or_given: tuple[int, int, int, int]) -> list[dict[str, Any]]:
        operators = [("aten::mm", 0, 10), ("aten::mm", 20, 10), ("aten::exp", 40, 10)]
        return [{"name": name, "tid": 1, "ts": ts, "dur": dur} for name, ts, dur in operators] + [
            {"name": "[memory]", "tid": thread, "ts": ts, "args": {"Addr": address, "Bytes": amount}}
            for ts, thread, address, amount in taken_or_given
        ]

    scratch = [(2, 1, 7, 64), (4, 1, 7, -64), (22, 1, 7, 32), (24, 1, 7, -32)]
    output = [(3, 1, 8, 16), (26, 1, 8, -16)]
    elsewhere = [(5, 2, 9, 128), (6, 2, 9, -128), (12, 1, 7, 64), (15, 1, 7, -64), (42, 1, 7, 8), (44, 1, 7, -8)]
    kept = sorted(output + elsewhere)
    assert [event["ts"] for event in _beside_scratch(events(*scratch, *kept))] == [ts for ts, *_ in kept]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    layers=st.integers(1, 4),
    d_ff=st.integers(1, 40).map(lambda n: 4 * n),
    vocab_size=st.integers(5, 150),
    tensor=st.sampled_from([1, 2, 4]),
    precision=st.sampled_from(["float32", "bf16"]),
)
def test_sizes_change_formula_rehearsal_and_run_alike(
    ranks: Callable[[int], Ranks], layers: int, d_ff: int, vocab_size: int, tensor: int, precision: Precision
) -> None:
    from meshwright.verify.observe import observe_rank

    model = Model(layers=layers, d_model=16, d_ff=d_ff, heads=4, kv_heads=2, head_dim=4, vocab_size=vocab_size)
    training = Training(batch=4, seq_len=8, precision=precision, device="cpu")
    job = Job(model=model, layout=Layout(tensor=tensor), training=training)
    planned, rehearsed = formula(job), rehearse_job(job, rank=tensor - 1)
    run = ranks(tensor).run(observe_rank, job)[-1].account
    assert not list(differences_of(planned, rehearsed))
    assert not list(differences_of(rehearsed, run))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("kv_heads", [8, 4, 2])
@pytest.mark.parametrize(("d_ff", "vocab_size"), [(704, 300), (16, 16)], ids=["peak elsewhere", "peak in attention"])
def test_formula_equals_rehearsal_for_the_kernels_of_each_device(
    device: Literal["cpu", "cuda"], precision: Precision, kv_heads: int, d_ff: int, vocab_size: int
) -> None:
    """A rehearsal calls the kernels of the job's device, so what a GPU would save is checked without one."""
    model = Model(layers=2, d_model=64, d_ff=d_ff, heads=8, kv_heads=kv_heads, head_dim=64, vocab_size=vocab_size)
    job = Job(
        model=model, layout=Layout(tensor=2), training=Training(batch=4, seq_len=40, precision=precision, device=device)
    )
    planned, rehearsed = formula(job), rehearse_job(job)
    assert not diff(planned, rehearsed)
    assert {c: planned.footprint.bytes[c] for c in CATEGORIES} == {c: rehearsed.footprint.bytes[c] for c in CATEGORIES}


def test_a_formula_that_forgets_a_collective_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: without the row-parallel all-reduce the formula no longer equals the rehearsal."""
    from meshwright.schemes import tape

    job = Case("grouped_query", "tensor 2", "float32", 1).job
    monkeypatch.setattr(tape.Tape, "all_reduce", lambda self, group, dtype, payload_bytes: 0)
    missing = diff(formula(job), rehearse_job(job))
    assert {d.site for d in missing if d.part == "ledger"} >= {
        "layers.0.attention",
        "layers.1.mlp",
        "embedding",
        "head",
        "loss",
    }


@pytest.mark.parametrize(("accumulation", "precision"), [(3, "float32"), (4, "bf16"), (8, "float32")])
def test_a_long_accumulation_is_rehearsed_by_three_micro_batches(accumulation: int, precision: Precision) -> None:
    """Executing all of them gives the same account, which is the formula's."""
    job = Case("tied", "replicate 2 × tensor 2", precision, 1).job
    job = replace(job, training=replace(job.training, accumulation=accumulation, batch=4 * accumulation))
    short, whole = rehearse_job(job), rehearse_job(job, every_micro_batch=True)
    assert short.ledger == whole.ledger
    assert short.footprint == whole.footprint
    exact = [key for key in whole.work.amounts if key.kind in EXACT_KINDS]
    assert {key: short.work.amounts[key] for key in exact} == {key: whole.work.amounts[key] for key in exact}
    assert not list(differences_of(formula(job), short))

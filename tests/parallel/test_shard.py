"""Sharded states on real ranks: training is that of one device, whatever is sharded, and of torch's own ZeRO-1.

Reference: torch's AdamW, not fused, on the global batch, in float32 and in float64. With p64 and p1 the parameters so
trained, a layout's p passes by the rule of `verify` if |p - p64| ≤ 4·|p1 - p64| + 2⁻²²·|p64 over all parameters|: its
float32 sums have as many roundings as those of one device, in another order, and AdamW divides by their size. No
parameter of this model has a gradient that is zero in theory, of which AdamW would make a step out of roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import pytest
import ranked_curves
import ranked_states as ranked
import torch
from jobs import tiny_job
from ranked_states import Tensors, Trained

from meshwright.account import Issue, diff, diff_ledgers
from meshwright.comm.ranks import Ranks
from meshwright.config.legality import require_legal
from meshwright.config.tree import Job, Layout, Model, Training
from meshwright.model.build import specs_of
from meshwright.planner.buckets import bucket_bytes
from meshwright.planner.step import formula
from meshwright.rehearsal.rehearse import rehearse_job
from meshwright.schemes.replicate import Bucket, Strategy, buckets
from meshwright.verify.agreement import differences_of

Pool = Callable[[int], Ranks]
MODEL = Model(layers=2, d_model=6, d_ff=10, heads=4, kv_heads=2, head_dim=2, vocab_size=13)
"""Nothing divides by 4: of 6 rows the last of 4 ranks has none. Under tensor 2 the vocabulary has padding."""
TIED = replace(MODEL, tied=True)
FACTOR, FLOOR = 4.0, 2.0**-22
KIB = 1 / 1024


def job_of(layout: Layout, accumulation: int = 1, model: Model = MODEL) -> Job:
    layout = replace(layout, bucket_mib=KIB)
    job = tiny_job(model, layout, accumulation=accumulation, batch=24, seq_len=8, learning_rate=1e-2)
    require_legal(job)
    return job


@cache
def references(model: Model, accumulation: int) -> tuple[Tensors, Tensors, Tensors]:
    """Before, after in float64, after in float32."""
    job = job_of(Layout(), accumulation, model)
    before, exact = ranked.plain_training(job, float64=True)
    return before, exact, ranked.plain_training(job)[1]


def norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def assert_trained(found: Tensors, job: Job) -> None:
    """By the rule, and far from where training began."""
    before, exact, same = references(job.model, job.training.accumulation)
    floor = FLOOR * norm(torch.cat([values.flatten() for values in exact.values()]))
    assert found.keys() == exact.keys()
    for name, p64 in exact.items():
        allowed = FACTOR * norm(same[name] - p64) + floor
        assert norm(found[name] - p64) <= allowed, name
        assert norm(before[name] - p64) >= 100 * allowed, f"{name} was not trained enough to prove anything"


def check(job: Job, runs: Sequence[Trained]) -> None:
    """The parameters of the first ranks that hold them together; all others hold the very same."""
    T = job.layout.tensor
    assert_trained(ranked_curves.assembled(job, [run.parameters for run in runs]), job)
    for rank, run in enumerate(runs):
        for name, values in run.parameters.items():
            assert torch.equal(values, runs[rank % T].parameters[name]), (rank, name)
        assert run.losses == runs[0].losses and run.losses[-1] < run.losses[0]


LAYOUTS = {
    "1": Layout(),
    "replicate 4": Layout(replicate=4),
    "zero 1 of 2": Layout(shard=2, zero=1),
    "zero 1 of 4": Layout(shard=4, zero=1),
    "zero 2 of 4": Layout(shard=4, zero=2),
    "zero 3 of 4": Layout(shard=4),
    "zero 1 of 2, replicate 2": Layout(shard=2, replicate=2, zero=1),
    "zero 3 of 2, replicate 2": Layout(shard=2, replicate=2),
    "zero 2 of ulysses 2": Layout(ulysses=2, zero=2),
    "zero 3 of ring 2": Layout(ring=2, zero=3),
    "zero 3 of shard 2 × ring 2": Layout(shard=2, ring=2),
    "zero 1 of ring 2, replicate 2": Layout(ring=2, replicate=2, zero=1),
    "zero 1 of 2, tensor 2, sequence parallel": Layout(shard=2, tensor=2, zero=1, sequence_parallel=True),
    "zero 2 of 2, tensor 2, sequence parallel": Layout(shard=2, tensor=2, zero=2, sequence_parallel=True),
    "zero 3 of 2, tensor 2, sequence parallel": Layout(shard=2, tensor=2, sequence_parallel=True),
}
ACCUMULATED = [
    ("replicate 4", 2),
    ("zero 1 of 2, replicate 2", 2),
    ("zero 2 of 4", 3),
    ("zero 3 of 2, replicate 2", 2),
    ("zero 3 of 2, replicate 2", 3),
    ("zero 3 of 2, tensor 2, sequence parallel", 2),
]


def runs_of(ranks: Pool, job: Job) -> list[Trained]:
    return [ranked.trained(job)] if job.layout.world == 1 else ranks(job.layout.world).run(ranked.trained, job)


@pytest.mark.parametrize(
    ("layout", "accumulation"), [*((name, 1) for name in LAYOUTS if name not in dict(ACCUMULATED)), *ACCUMULATED]
)
def test_training_is_that_of_one_device(ranks: Pool, layout: str, accumulation: int) -> None:
    job = job_of(LAYOUTS[layout], accumulation)
    runs = runs_of(ranks, job)
    check(job, runs)
    for rank, run in enumerate(runs):
        assert not diff_ledgers(formula(job, rank).ledger, run.account.ledger)


@pytest.mark.parametrize("layout", ["zero 1 of 4", "zero 3 of 4", "zero 3 of 2, tensor 2, sequence parallel"])
def test_training_of_a_tied_model(ranks: Pool, layout: str) -> None:
    job = job_of(LAYOUTS[layout], 2 if "tensor" in layout else 1, TIED)
    check(job, runs_of(ranks, job))


def test_training_as_torchs_zero_redundancy_optimiser(ranks: Pool) -> None:
    """Gradients are equal to the bit, norms and steps but for roundings: 1e-6 is a ten-thousandth of a step."""
    job = job_of(LAYOUTS["zero 1 of 2"])
    for ours, theirs in zip(ranks(2).run(ranked.trained, job), ranks(2).run(ranked.zero_redundancy, job), strict=True):
        assert ours.parameters.keys() == theirs.keys()
        for name, values in theirs.items():
            torch.testing.assert_close(ours.parameters[name], values, rtol=0, atol=1e-4 * job.training.learning_rate)


@pytest.mark.parametrize("layout", ["zero 1 of 4", "zero 1 of 2, replicate 2"])
def test_evaluation_waits_for_parameters_and_changes_nothing(ranks: Pool, layout: str) -> None:
    job = job_of(LAYOUTS[layout])
    alone, evaluated = (ranks(4).run(ranked.trained, job, 2, n) for n in (0, 2))
    for own, other in zip(alone, evaluated, strict=True):
        assert other.evaluations[::2] == other.evaluations[1::2]
        assert other.evaluations[:-2:2] == pytest.approx(other.losses[1:], rel=1e-6), "of the stepped parameters"
        assert own.losses == other.losses
        assert all(torch.equal(values, other.parameters[name]) for name, values in own.parameters.items())
        assert not diff(own.account, other.account)


# --- when zero 1 gathers what was stepped -----------------------------------------------------------------------------

every_strategy = pytest.mark.parametrize("strategy", ["naive", "flat", "per_parameter", "bucketed"])


def plan(job: Job) -> tuple[Bucket, ...]:
    return buckets(specs_of(job), job.layout.gradients, bucket_bytes(job), job.layout.state_group_size)


def unit(parameter: str) -> str:
    """The part of the model that waits for a parameter."""
    return ".".join(parameter.split(".")[: 2 if parameter.startswith("layers.") else 1])


def sites_by_first_use(job: Job) -> list[str]:
    """The buckets in the order in which the model's modules need them."""
    position = {spec.name: index for index, spec in enumerate(specs_of(job))}
    by_use = sorted(plan(job), key=lambda bucket: min(position[spec.name] for spec in bucket.members))
    return [bucket.site for bucket in by_use]


@every_strategy
def test_parameters_are_gathered_in_the_order_of_need(ranks: Pool, strategy: Strategy) -> None:
    job = job_of(Layout(shard=2, zero=1, gradients=strategy))
    for words in ranks(2).run(ranked.arrivals, job):
        gathered = [word.removeprefix("gather ") for word in words if word.startswith("gather")]
        assert gathered == sites_by_first_use(job)


@every_strategy
def test_the_formula_gathers_in_the_same_order(strategy: Strategy) -> None:
    """Rows do not tell, but whoever simulates the trace asks."""
    job = job_of(Layout(shard=2, zero=1, gradients=strategy))
    events = formula(job).trace.expanded()
    planned = [event.site for event in events if isinstance(event, Issue) and event.operation == "all_gather"]
    assert planned == sites_by_first_use(job)


@every_strategy
def test_modules_wait_for_their_own_parameters_only(ranks: Pool, strategy: Strategy) -> None:
    """All are on the wire before anybody waits; the first layer computes while the last one's parameters travel."""
    job = job_of(Layout(shard=2, zero=1, gradients=strategy))
    parts = plan(job)
    for words in ranks(2).run(ranked.arrivals, job):
        kinds = [word.split()[0] for word in words]
        assert kinds[: len(parts)] == ["gather"] * len(parts)
        assert sorted(word for word in words if word.startswith("wait")) == sorted(f"wait {b.site}" for b in parts)
        for bucket in parts:
            for used_by in {unit(spec.name) for spec in bucket.members}:
                computes = [i for i, word in enumerate(words) if f"{word}.".startswith(f"compute {used_by}.")]
                assert words.index(f"wait {bucket.site}") < computes[0], (bucket.site, used_by)
        if strategy != "flat":
            last = max(i for i, kind in enumerate(kinds) if kind == "wait")
            assert any(word.startswith("compute layers.0") for word in words[:last])


def test_a_rank_that_holds_only_padding_steps_nothing() -> None:
    """Norms of 4 elements, a bucket each, over 5 ranks: the last has none of any parameter of 4 or fewer rows."""
    model = Model(layers=1, d_model=4, d_ff=4, heads=2, kv_heads=2, head_dim=2, vocab_size=4)
    job = Job(
        model=model,
        layout=Layout(shard=5, zero=1, gradients="naive"),
        training=Training(batch=5, seq_len=4, device="cpu"),
    )
    for rank in (0, 4):
        assert not list(differences_of(formula(job, rank), rehearse_job(job, rank)))
    assert formula(job, 4).footprint.bytes["optimiser_states"] == 0

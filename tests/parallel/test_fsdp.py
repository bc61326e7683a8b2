"""ZeRO-2, ZeRO-3 and HSDP on real ranks: gradients to the bit, evaluations between steps, precision, prefetch, rows.

That training equals one device's is in `test_shard`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import ranked_states as ranked
import torch
from jobs import tiny_job
from ranked_states import Tensors, Trained

from meshwright.account import Compute, Issue, StepAccount, diff, diff_ledgers
from meshwright.comm.ranks import Ranks
from meshwright.config.legality import require_legal
from meshwright.config.tree import Job, Layout, Model
from meshwright.planner.step import formula

Pool = Callable[[int], Ranks]
MODEL = Model(layers=3, d_model=6, d_ff=10, heads=4, kv_heads=2, head_dim=2, vocab_size=13)
STAGES = pytest.mark.parametrize("zero", [2, 3])
FSDP, HSDP = Layout(shard=2), Layout(shard=2, replicate=2)
DEGREES = pytest.mark.parametrize("degrees", [FSDP, HSDP], ids=["FSDP", "HSDP"])


def job_of(layout: Layout, accumulation: int = 1, **training: str | int) -> Job:
    job = tiny_job(MODEL, layout, accumulation=accumulation, batch=24, seq_len=8, learning_rate=1e-2, **training)
    require_legal(job)
    return job


def added(*shares: Tensors) -> Tensors:
    """Their sum, from left to right, in their dtype."""
    first, *others = shares
    for other in others:
        first = {name: values + other[name] for name, values in first.items()}
    return first


def cast(share: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: values.to(dtype) for name, values in share.items()}


def assert_equal(found: Tensors, expected: Tensors) -> None:
    """To the bit."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


# --- gradients --------------------------------------------------------------------------------------------------------


@STAGES
@pytest.mark.parametrize(("accumulation", "reduce_precision"), [(1, "float32"), (3, "float32"), (2, "bf16")])
def test_gradients_of_two_ranks(ranks: Pool, zero: int, accumulation: int, reduce_precision: str) -> None:
    """To the bit those of plain autograd: a + b of each micro-batch, in the reduce dtype, added up in float32."""
    job = job_of(replace(FSDP, zero=zero), accumulation, reduce_precision=reduce_precision)
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[reduce_precision]
    sums = []
    for index in range(accumulation):
        shares = [cast(ranked.plain_gradients(job, rank, index), dtype) for rank in range(2)]
        sums.append(cast(added(*shares), torch.float32))
    for found in ranks(2).run(ranked.gradients, job):
        assert_equal(found, added(*sums))


@STAGES
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_gradients_of_replicas(ranks: Pool, zero: int, accumulation: int) -> None:
    """HSDP: the sums of two over `shard`, added up over the micro-batches, then summed over the two replicas."""
    job = job_of(replace(HSDP, zero=zero), accumulation)
    replicas = []
    for first in (0, 2):
        shares = [[ranked.plain_gradients(job, first + i, index) for i in range(2)] for index in range(accumulation)]
        replicas.append(added(*(added(*pair) for pair in shares)))
    for found in ranks(4).run(ranked.gradients, job):
        assert_equal(found, added(*replicas))


# --- evaluation between steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "degrees", "accumulation", "prefetch"),
    [(2, FSDP, 1, 1), (2, HSDP, 2, 2), (3, FSDP, 2, 2), (3, HSDP, 1, 1)],
)
def test_evaluation_changes_nothing(ranks: Pool, zero: int, degrees: Layout, accumulation: int, prefetch: int) -> None:
    """Neither a number nor a byte of the next step: whatever it gathered and kept is sharded again."""
    job = job_of(replace(degrees, zero=zero, prefetch=prefetch), accumulation)
    pool = ranks(job.layout.world)
    alone, evaluated = (pool.run(ranked.trained, job, 2, n) for n in (0, 2))
    for own, other in zip(alone, evaluated, strict=True):
        assert other.evaluations[::2] == other.evaluations[1::2]
        assert other.evaluations[:-2:2] == pytest.approx(other.losses[1:], rel=1e-6), "of the stepped parameters"
        assert own.losses == other.losses
        assert own.grad_norms == other.grad_norms
        assert_equal(other.parameters, own.parameters)
        assert diff(own.account, other.account) == []
        assert own.account.footprint == other.account.footprint


# --- prefetch, precision, rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("degrees", "ahead"), [(FSDP, (1, 2, 3)), (HSDP, (1, 3))], ids=["FSDP", "HSDP"])
def test_prefetch_and_stage_change_no_number(ranks: Pool, degrees: Layout, ahead: tuple[int, ...]) -> None:
    """Stages 2 and 3 differ in what they gather when, prefetch in when alone."""
    jobs = [job_of(replace(degrees, zero=zero, prefetch=n), 2) for zero in (3, 2) for n in ahead]
    runs: list[list[Trained]] = [ranks(job.layout.world).run(ranked.trained, job, 1) for job in jobs]
    for index, others in enumerate(runs):
        for own, other, plain in zip(runs[0], others, runs[index // len(ahead) * len(ahead)], strict=True):
            assert_equal(other.parameters, own.parameters)
            assert (other.losses, other.grad_norms) == (own.losses, own.grad_norms)
            assert diff_ledgers(plain.account.ledger, other.account.ledger) == []
    assert diff_ledgers(runs[0][0].account.ledger, runs[-1][0].account.ledger), "stage 2 gathers less"


def gathered_before(account: StepAccount, phase: str, computing: str) -> list[str]:
    """Layers on the wire or there, in the order in which they were issued, as a layer begins to compute."""
    found = []
    for event in account.trace.expanded():
        if event.phase == phase and isinstance(event, Compute) and event.site.startswith(computing):
            break
        if event.phase == phase and isinstance(event, Issue) and event.operation == "all_gather":
            found.append(event.site)
    return [site for site in found if site != "root"]


@pytest.mark.parametrize(("prefetch", "forward"), [(1, 1), (2, 3), (3, 4)])
def test_prefetch_is_so_many_layers_ahead(ranks: Pool, prefetch: int, forward: int) -> None:
    """As the first layer begins, `prefetch` further ones are on the wire; one is what fully_shard does by itself, which
    forward on a CPU is none. So says the formula."""
    job = job_of(replace(FSDP, zero=3, prefetch=prefetch))
    job = replace(job, model=replace(MODEL, layers=5))
    layers = [f"layers.{i}" for i in range(5)]
    for account in [formula(job), *(run.account for run in ranks(2).run(ranked.trained, job, 2))]:
        assert gathered_before(account, "forward", "layers.0.") == layers[:forward]
        assert gathered_before(account, "backward", "layers.4.") == layers[: -2 - prefetch : -1]


@pytest.mark.parametrize(
    ("zero", "degrees", "precision", "reduce_precision"),
    [
        (2, FSDP, "bf16", "float32"),
        (2, HSDP, "float32", "bf16"),
        (3, FSDP, "float32", "bf16"),
        (3, HSDP, "bf16", "bf16"),
    ],
)
def test_every_row_has_its_units_name(
    ranks: Pool, zero: int, degrees: Layout, precision: str, reduce_precision: str
) -> None:
    """Every unit its own rows, in its dtypes; what is not a unit's is the step's."""
    job = job_of(replace(degrees, zero=zero), 2, precision=precision, reduce_precision=reduce_precision)
    names = {"float32": "float32", "bf16": "bfloat16"}
    units = {"root", *(f"layers.{i}" for i in range(MODEL.layers))}
    expected = {("all_gather", "shard", "forward", names[precision], 2)}
    expected |= {("reduce_scatter", "shard", "backward", names[reduce_precision], 2)}
    if degrees.replicate > 1:
        expected |= {("all_reduce", "replicate", "backward", names[reduce_precision], 1)}
    again = {("all_gather", "shard", "backward", names[precision], 2)} if zero == 3 else set()
    for run in ranks(job.layout.world).run(ranked.trained, job, 2):
        rows = run.account.ledger.rows
        for unit in units:
            own = {(k.operation, k.axis, k.phase, k.dtype, n) for k, n in rows.items() if k.site == unit}
            assert own == expected | (again if unit != "root" else set()), unit
        assert {key.site for key in rows} - units == {"step", "norm_of_gradients"}
        assert all(key.axis != "?" for key in rows)

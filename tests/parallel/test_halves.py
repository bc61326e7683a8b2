"""Half-batches: values against the unsharded block, and, from recorded traces, what runs while what is on the wire."""

from dataclasses import replace

import pytest
import ranked_halves as ranked
import torch
import torch.nn.functional as F
from jobs import tiny_job
from reference.precision import error

from meshwright.account import EXACT_KINDS, Compute, Issue, LedgerKey, Wait
from meshwright.config.tree import Layout
from meshwright.parallel.halves import Crossing
from meshwright.planner.step import formula
from meshwright.rehearsal.rehearse import rehearse_job

S, E, FEATURES = 8, 8, 12
ROUNDING = 1e-13
"""Relative to the largest element: float64, sums of at most a few dozen terms."""
RECOMPUTES = pytest.mark.parametrize("recompute", ["none", "selective", "full"])
SPLITS = pytest.mark.parametrize("split", [False, True])


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def plain(x, *parameters):
    for up, down, bias in (parameters[:3], parameters[3:]):
        x = x + F.linear(F.linear(x, up).sin(), down, bias)
    return x


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@SPLITS
def test_a_block_in_halves(ranks, world, batch, split):
    """A batch of one is one half, of three it is two and one."""
    shapes = [(FEATURES, E), (E, FEATURES), (E,)]
    parameters = [randn(*shape, seed=seed) for seed in range(2) for shape in shapes]
    x, dy = randn(batch, S, E), randn(batch, S, E, seed=1)
    leaves = [leaf.clone().requires_grad_() for leaf in (x, *parameters)]
    y = plain(*leaves)
    dx, *dps = torch.autograd.grad(y, leaves, dy)
    by_rank = ranks(world).run(ranked.block, x, parameters, dy, split)

    def outside(values):
        """The whole of what is split along the sequence; without, what each rank has."""
        return [torch.cat(values, 1)] if split else values

    checked = [(found, y.detach()) for found in outside([own.outputs[0] for own in by_rank])]
    checked += [(found, dx) for found in outside([own.gradients[0] for own in by_rank])]
    for index, dp in enumerate(dps, start=1):
        shares = [own.gradients[index] for own in by_rank]
        if dp.dim() == 1:
            checked += [(sum(shares), dp)] if split else [(share, dp) for share in shares]
        else:
            checked.append((torch.cat(shares, 0 if len(dp) == FEATURES else 1), dp))
    for found, expected in checked:
        assert found.shape == expected.shape
        assert error(found, expected) <= ROUNDING * expected.abs().max()

    calls = [("all_gather", "forward", 2), ("reduce_scatter", "forward", 2), ("all_gather", "backward", 4)]
    calls += [("reduce_scatter", "backward", 2)]
    calls = calls if split else [("all_reduce", "forward", 2), ("all_reduce", "backward", 2)]
    expected = {}
    for half in torch.empty(batch).chunk(min(2, batch)):
        for operation, phase, count in calls:
            key = LedgerKey(operation, "tensor", world, phase, ranked.SITE, "float64", len(half) * S * E * 8)
            expected[key] = expected.get(key, 0) + count
    assert all(own.rows == expected for own in by_rank)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@SPLITS
def test_loss_and_gradients_are_those_of_the_whole_batch(ranks, precision, split):
    """Up to the rounding of sums in another order: a gradient is one sum of both halves' terms, or a sum of two."""
    layout = Layout(tensor=2, sequence_parallel=split, overlap="none")
    job = tiny_job("layernorm_bias_learned", layout, precision, batch=4)
    halved = replace(job, layout=replace(layout, half_batches=True))
    eps = {"float32": 2.0**-23, "bf16": 2.0**-8}[precision]
    for (loss, found), (whole_loss, expected) in zip(
        ranks(2).run(ranked.gradients, halved), ranks(2).run(ranked.gradients, job), strict=True
    ):
        assert loss == pytest.approx(whole_loss, rel=eps)
        scale = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 8 * eps * scale, name


@pytest.mark.parametrize("batch", [1, 3])
def test_an_evaluation_takes_any_batch(ranks, batch):
    job = tiny_job(layout=Layout(tensor=2, sequence_parallel=True, overlap="none"), batch=4)
    for halved, whole in ranks(2).run(ranked.loss_of_any_batch, job, batch):
        assert halved == pytest.approx(whole, rel=2.0**-20)


# --- what runs while what is on the wire ------------------------------------------------------------------------------


def job_of(split, recompute="none"):
    layout = Layout(tensor=2, sequence_parallel=split, recompute=recompute, overlap="none", half_batches=True)
    return tiny_job("grouped_query", layout, batch=4)


def story(account, layer="layers.1."):
    """Calls, waits and products of a layer, in order; calls are numbered from its first."""
    told, numbers = [], {}
    for event in account.trace.expanded():
        if not getattr(event, "site", "").startswith(layer):
            continue
        if isinstance(event, Issue):
            numbers[event.ticket] = len(numbers)
            told.append((event.operation, event.site, event.phase, numbers[event.ticket]))
        elif isinstance(event, Wait):
            told.append(("wait", event.site, event.phase, numbers[event.ticket]))
        elif isinstance(event, Compute) and event.kind in EXACT_KINDS:
            told.append((event.kind, event.site, event.phase, event.flops))
    return told


def hidden(account, phase):
    """Of the calls of a phase that are made, and of those with a product before they are waited for: by operation."""
    told = story(account)
    made, covered = {}, {}
    for start, (operation, _, when, number) in enumerate(told):
        if when != phase or operation in ("wait", *EXACT_KINDS):
            continue
        made[operation] = made.get(operation, 0) + 1
        end = next(i for i in range(start, len(told)) if told[i][0] == "wait" and told[i][3] == number)
        covered[operation] = covered.get(operation, 0) + any(kind in EXACT_KINDS for kind, *_ in told[start:end])
    return made, covered


def test_communication_of_a_half_is_on_the_wire_while_the_other_computes():
    """Recorded. What a half needs next is on the wire, so products in between are the other half's.

    In backward the last sum runs under its own weight gradients, and the second gathers of inputs (4 of the 8) under
    the product that makes the input's gradient, with halves or without.
    """
    summed, scattered = (rehearse_job(job_of(split)) for split in (False, True))
    assert hidden(summed, "forward") == ({"all_reduce": 4}, {"all_reduce": 3})
    assert hidden(summed, "backward") == ({"all_reduce": 4}, {"all_reduce": 4})
    both = {"all_gather": 4, "reduce_scatter": 4}
    assert hidden(scattered, "forward") == (both, {"all_gather": 3, "reduce_scatter": 3})
    assert hidden(scattered, "backward") == ({**both, "all_gather": 8}, {"all_gather": 7, "reduce_scatter": 4})


def test_without_halves_forward_hides_nothing():
    """The instrument can tell: the same layout, whole."""
    for split in (False, True):
        job = job_of(split)
        made, covered = hidden(rehearse_job(replace(job, layout=replace(job.layout, half_batches=False))), "forward")
        assert sum(made.values()) == (4 if split else 2) and not any(covered.values())


@RECOMPUTES
@SPLITS
def test_the_formula_tells_the_order_of_the_program(split, recompute):
    job = job_of(split, recompute)
    rehearsed, planned = story(rehearse_job(job)), story(formula(job))
    assert rehearsed == planned
    waits = [number for kind, *_, number in planned if kind == "wait"]
    assert sorted(waits) == list(range(len(waits))) and len(waits) == (20 if split else 8) + recompute_calls(job)


def recompute_calls(job):
    return {True: 8, False: 4}[job.layout.sequence_parallel] if job.layout.recompute == "full" else 0


@SPLITS
def test_a_wait_that_is_left_out_is_found(monkeypatch, split):
    """Planted: what has left a region is used at once. Bytes and the ledger stay; the order of the program does not."""
    monkeypatch.setattr(Crossing, "finish", lambda self: self._leaving.pop().tensor)
    rehearsed, planned = rehearse_job(job_of(split)), formula(job_of(split))
    assert rehearsed.ledger == planned.ledger
    told = story(planned)
    assert story(rehearsed) != told
    missing = [step for step in told if step[0] == "wait" and step not in story(rehearsed)]
    assert len(missing) == 8, "four sums of outputs, four of inputs' gradients"

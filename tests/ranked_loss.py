"""The chunked loss as one rank runs it, beside the whole one (importable by name).

Every function takes the whole problem and keeps this rank's part of it, as those of `ranked_tensor` do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from ranked_tensor import Outcome, axis, outside, own, recorded

from meshwright.account import Compute, Ledger, LedgerKey, Memory, Trace
from meshwright.audit.recorder import Recorder
from meshwright.comm.collectives import Axis
from meshwright.comm.scope import scope
from meshwright.parallel.loss import chunked_cross_entropy, vocab_cross_entropy
from meshwright.parallel.sequence import Region
from meshwright.parallel.tensor import column_linear

HEAD, LOSS = "head", "loss"


class Problem(NamedTuple):
    """Head and loss, whole: h [B, S, E], weight [V, E], labels [B, S] and the gradient of the loss."""

    h: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    dloss: torch.Tensor


def own_weight(weight: torch.Tensor, padding: float) -> torch.Tensor:
    """This rank's rows; those that are padding hold a value, which must never enter."""
    rows = own(torch.arange(1, 1 + len(weight)), 0)
    return own(weight, 0).masked_fill_((rows == 0).unsqueeze(-1), padding)


def chunked(problem: Problem, chunk: int, split: bool, padding: float = 0.0) -> Outcome:
    """Loss, dh and dw."""
    region, leaves = Region(axis(), split), [outside(problem.h, split), own_weight(problem.weight, padding)]
    return recorded(
        lambda h, w: chunked_cross_entropy(h, w, problem.labels, len(problem.weight), chunk, region, (HEAD, LOSS)),
        leaves,
        [problem.dloss],
    )


def whole(problem: Problem, split: bool, padding: float = 0.0) -> Outcome:
    """The same of logits that all exist."""
    region, leaves = Region(axis(), split), [outside(problem.h, split), own_weight(problem.weight, padding)]

    def both(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        (logits,) = column_linear(h, [w], [None], region, HEAD)
        return vocab_cross_entropy(logits, problem.labels, len(problem.weight), region.axis, LOSS)

    return recorded(both, leaves, [problem.dloss])


class Evaluated(NamedTuple):
    """A loss that nobody differentiates, its matrix products and what was sent."""

    loss: torch.Tensor
    matmuls: list[Compute]
    rows: dict[LedgerKey, int]
    logits_peak: int


def evaluated(problem: Problem, chunk: int, split: bool) -> Evaluated:
    """Under `no_grad`, of parameters that have gradients otherwise."""
    region = Region(axis(), split)
    h, weight = (x.requires_grad_() for x in (outside(problem.h, split).clone(), own(problem.weight, 0)))
    with Recorder() as recorder, torch.no_grad(), scope(LOSS):
        loss = chunked_cross_entropy(h, weight, problem.labels, len(problem.weight), chunk, region, (HEAD, LOSS))
    trace = recorder.trace()
    matmuls = [event for event in trace.expanded() if isinstance(event, Compute) and event.kind == "matmul"]
    return Evaluated(loss, matmuls, dict(Ledger.of(trace).rows), Logits.of(trace).peak)


class Logits(NamedTuple):
    """Bytes of category `logits`: of the largest storage, and of all at the moment at which they are the most."""

    largest: int
    peak: int

    @classmethod
    def of(cls, trace: Trace) -> Logits:
        now = largest = peak = 0
        for event in trace.expanded():
            if isinstance(event, Memory) and event.category == "logits":
                now += event.delta_bytes
                largest, peak = max(largest, event.delta_bytes), max(peak, now)
        return cls(largest, peak)


def logits(problem: Problem, chunk: int, split: bool) -> Logits:
    """Forward and backward as the decoder's loss module runs them; whole if the chunk is 0."""
    region = Region(axis() if torch.distributed.is_initialized() else Axis("tensor"), split)
    h, weight = (x.requires_grad_() for x in (outside(problem.h, split), own(problem.weight, 0)))
    vocab_size = len(problem.weight)
    with Recorder() as recorder:
        if chunk:
            with scope(LOSS):
                loss = chunked_cross_entropy(h, weight, problem.labels, vocab_size, chunk, region, (HEAD, LOSS))
        else:
            with scope(HEAD):
                (found,) = column_linear(h, [weight], [None], region, HEAD)
            with scope(LOSS):
                loss = vocab_cross_entropy(found, problem.labels, vocab_size, region.axis, LOSS)
            del found
        loss.backward(problem.dloss)
        del loss
    return Logits.of(recorder.trace())


def products(problem: Problem, chunk: int, split: bool) -> tuple[list[int], list[int]]:
    """FLOPs of the matrix products of the forward pass and of the gradients, in order."""
    region = Region(axis(), split)
    h, weight = (x.requires_grad_() for x in (outside(problem.h, split).clone(), own(problem.weight, 0)))
    with Recorder() as recorder:
        loss = chunked_cross_entropy(h, weight, problem.labels, len(problem.weight), chunk, region, (HEAD, LOSS))
        loss.backward(problem.dloss)
    matmuls = [e for e in recorder.trace().expanded() if isinstance(e, Compute) and e.kind == "matmul"]
    forward, backward = ([e.flops for e in matmuls if e.phase == phase] for phase in ("forward", "backward"))
    assert len(forward) + len(backward) == len(matmuls)
    return forward, backward

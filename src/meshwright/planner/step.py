"""The whole training step by formula: `training.step`, piece by piece, as a trace.

Persistent storages (parameters, gradients, optimiser states, the batch) come first, then the token count, every
micro-batch, the synchronisation of gradients, the loss, the norm and the optimiser.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from meshwright.account import StepAccount, Trace
from meshwright.config.tree import Job
from meshwright.schemes.decoder import Decoder
from meshwright.schemes.params import ParamSpec, param_specs
from meshwright.schemes.replicate import sum_naive
from meshwright.schemes.tape import BOOL, FLOAT32, FLOAT64, INT64, Group, Sizes, Tape


def formula(job: Job) -> StepAccount:
    """The account of one step of a legal job, the same for every rank. Time is left out (see `planner.estimate`)."""
    return StepAccount.of(step_trace(job), source="formula", rank=0, world=job.layout.world, job=job.name)


def step_trace(job: Job) -> Trace:
    """The trace of the second step: optimiser states exist, gradients are persistent."""
    layout, training = job.layout, job.training
    specs = param_specs(job.model, layout, training.seq_len)
    sizes = Sizes.of(job.model, layout, training)
    decoder = Decoder(job.model, sizes)
    group = Group(layout.gradient_axis or "replicate", layout.gradient_group_size)
    tape = Tape()
    persistent(tape, specs)
    with tape.at("step", "forward"):
        _batch(tape, decoder, training.accumulation)
        tape.wait(tape.all_reduce(group, "int64", INT64))
        tape.alloc(INT64 + FLOAT64, "communication_buffers" if group.size > 1 else "temporaries")  # count and loss sum
        tape.alloc(FLOAT64)  # the inverse of the count
    with tape.at("step", "backward"):
        tape.elementwise(sum(spec.local_numel for spec in specs) * FLOAT32)  # zeroing gradients
    with tape.repeat(training.accumulation):
        decoder.forward(tape)
        decoder.backward(tape)
        with tape.at("loss", "backward"):
            tape.free(FLOAT64, "logits")
    _synchronise(tape, specs, group)
    with tape.at("step", "forward"):
        tape.wait(tape.all_reduce(group, "float64", FLOAT64))
    optimise(tape, specs)
    return tape.trace()


def persistent(tape: Tape, specs: Sequence[ParamSpec]) -> None:
    """Float32 masters, gradients and two moments; a step counter for each parameter."""
    nbytes = sum(spec.local_numel for spec in specs) * FLOAT32
    tape.alloc(nbytes, "parameters")
    tape.alloc(nbytes, "gradients")
    tape.alloc(2 * nbytes + FLOAT32 * len(specs), "optimiser_states")


def _batch(tape: Tape, decoder: Decoder, accumulation: int) -> None:
    """Tokens and labels of all micro-batches, and positions; autograd holds some of them."""
    s = decoder.sizes
    tokens, positions = accumulation * s.N * INT64, s.S * INT64
    tape.alloc(tokens, "logits")  # the labels: the loss keeps them
    tape.alloc(tokens, "saved_activations" if s.T == 1 else "temporaries")
    tape.alloc(positions, "saved_activations" if decoder.model.positions == "learned" else "temporaries")
    with tape.holding(accumulation * s.N * BOOL):
        pass


def _synchronise(tape: Tape, specs: Sequence[ParamSpec], group: Group) -> None:
    """Partial gradients in one flat buffer for each group, then the gradient group's strategy."""
    partial: Counter[tuple[str, int]] = Counter()
    for spec in specs:
        if spec.partial_over is not None:
            partial[spec.partial_over] += spec.local_numel * FLOAT32
    for (axis, size), nbytes in partial.items():
        with tape.at("gradients", "backward"), tape.holding(nbytes, "communication_buffers"):
            tape.elementwise(4 * nbytes)
            tape.wait(tape.all_reduce(Group(axis, size), "float32", nbytes))
    sum_naive(tape, specs, group)


def optimise(tape: Tape, specs: Sequence[ParamSpec]) -> None:
    """Squared norm (one float32 over each axis that splits parameters), clipping, fused AdamW."""
    nbytes = sum(spec.local_numel for spec in specs) * FLOAT32
    splits = {spec.split.axis: spec.split.degree for spec in specs if spec.split is not None}
    with tape.at("norm_of_gradients", "optimiser"):
        tape.elementwise(nbytes)
        for axis, size in splits.items():
            tape.wait(tape.all_reduce(Group(axis, size), "float32", FLOAT32))
        tape.elementwise(2 * nbytes)
    with tape.at("optimiser", "optimiser"):
        tape.elementwise(7 * nbytes)

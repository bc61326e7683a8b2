"""The whole training step by formula: `training.step`, piece by piece, as a trace.

Persistent storages (parameters, gradients, optimiser states, the batch) come first, then the token count, every
micro-batch, the synchronisation of gradients, the loss, the norm and the optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from meshwright.account import StepAccount, Trace
from meshwright.config.tree import Job, Layout, Model
from meshwright.planner.states import States, states_of
from meshwright.schemes.decoder import Decoder
from meshwright.schemes.params import ParamSpec, param_specs
from meshwright.schemes.tape import BOOL, FLOAT32, FLOAT64, INT64, Group, Sizes, Tape


def formula(job: Job, rank: int = 0) -> StepAccount:
    """The account of one step of a legal job. Time is left out (see `planner.estimate`).

    Ranks differ by their coordinate on the ring, and by their part of sharded states.
    """
    return StepAccount.of(step_trace(job, rank), source="formula", rank=rank, world=job.layout.world, job=job.name)


def heaviest(job: Job) -> StepAccount:
    """What no rank exceeds: the account of the one that works most, with the footprint of the one that holds most.

    But for a few step counters of 4 bytes, of which ranks have more or fewer with zero 1.
    """
    stride = job.layout.stride("ring")
    accounts = [formula(job, coordinate * stride) for coordinate in _heaviest_coordinates(job.layout)]
    busiest = max(accounts, key=lambda account: (account.work.flops(), account.footprint.peak))
    fullest = max(accounts, key=lambda account: account.footprint.peak)
    return replace(busiest, footprint=fullest.footprint)


def _heaviest_coordinates(layout: Layout) -> set[int]:
    """On the ring, of the ranks that work most or hold most.

    Contiguous: the last, which sees every key. Zigzag: work is equal; a step that shows all queries half of the keys
    needs other memory than one that shows half of the queries all keys, and only ranks between the first and the last
    have both kinds. Of sharded states the first ranks hold the longest parts.
    """
    if layout.ring_order == "contiguous" or layout.ring == 1:
        return {layout.ring - 1} | ({0, max(0, layout.ring - 2)} if layout.state_axes else set())
    return {0, 1} if layout.ring == 2 or layout.state_axes else {1}


def step_trace(job: Job, rank: int = 0) -> Trace:
    """The trace of the second step: optimiser states exist."""
    layout, training = job.layout, job.training
    specs = param_specs(job.model, layout, training.seq_len)
    sizes = Sizes.of(job.model, layout, training, rank)
    group = Group(layout.gradient_axis or "replicate", layout.gradient_group_size)
    states = states_of(job, specs, rank)
    tape = Tape()
    states.persist(tape)
    with tape.at("step", "forward"):
        _batch(tape, job.model, sizes, training.accumulation)
        counting = tape.all_reduce(group, "int64", INT64)
        tape.alloc(INT64 + FLOAT64, "communication_buffers" if group.size > 1 else "temporaries")  # count and loss sum
        tape.alloc(FLOAT64)  # the inverse of the count
    with tape.at("step", "backward"):
        states.begin(tape)
    for times, units in states.micro_batches(training.accumulation):
        decoder = Decoder(job.model, sizes, units)
        with tape.repeat(times):
            decoder.forward(tape)
            with tape.at("step", "forward"):
                tape.wait(counting)  # backward of the first needs it, forward does not
            counting = 0
            decoder.backward(tape)
            with tape.at("loss", "backward"):
                tape.free(FLOAT64, "logits")
    states.finish(tape)
    with tape.at("step", "forward"):
        tape.wait(tape.all_reduce(group, "float64", FLOAT64))
    optimise(tape, specs, states)
    return tape.trace()


def _batch(tape: Tape, model: Model, s: Sizes, accumulation: int) -> None:
    """Tokens and labels of all micro-batches, and positions; autograd holds some of them."""
    tokens, positions = accumulation * s.N * INT64, s.S * INT64
    tape.alloc(tokens, "temporaries" if s.loss_chunk else "logits")  # the labels: a loss of whole logits keeps them
    tape.alloc(tokens, "saved_activations" if s.T == 1 else "temporaries")
    tape.alloc(positions, "saved_activations" if model.positions == "learned" else "temporaries")
    if s.documents:
        tape.alloc(tokens * s.U)
    with tape.holding(accumulation * s.N * BOOL):
        pass


def optimise(tape: Tape, specs: Sequence[ParamSpec], states: States) -> None:
    """Squared norm (one float32 over each axis that splits parameters or states), clipping, fused AdamW."""
    nbytes = states.owned_numel * FLOAT32
    splits = {spec.split.axis: spec.split.degree for spec in specs if spec.split is not None}
    with tape.at("norm_of_gradients", "optimiser"):
        tape.elementwise(nbytes)
        for axis, size in splits.items():
            tape.wait(tape.all_reduce(Group(axis, size), "float32", FLOAT32))
        tape.wait(tape.all_reduce(states.group, "float32", FLOAT32))
        tape.elementwise(2 * nbytes)
    with tape.at("optimiser", "optimiser"):
        tape.elementwise(7 * nbytes)
    states.publish(tape)

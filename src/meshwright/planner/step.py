"""The whole training step by formula: `training.step`, piece by piece, as a trace.

Persistent storages (parameters, gradients, optimiser states, the batch) come first, then the token count, every
micro-batch, the synchronisation of gradients, the loss, the norm and the optimiser.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from meshwright.account import EXACT_KINDS, StepAccount, Trace, Work
from meshwright.config.tree import Job, Layout
from meshwright.schemes.decoder import Decoder
from meshwright.schemes.params import ParamSpec, param_specs
from meshwright.schemes.replicate import sum_naive
from meshwright.schemes.tape import BOOL, FLOAT32, FLOAT64, INT64, Group, Sizes, Tape
from meshwright.schemes.tensor import ColumnLinear, RowLinear


def formula(job: Job, rank: int = 0) -> StepAccount:
    """The account of one step of a legal job. Time is left out (see `planner.estimate`).

    Ranks differ only by their coordinate on the ring.
    """
    return StepAccount.of(step_trace(job, rank), source="formula", rank=rank, world=job.layout.world, job=job.name)


def forward_flops(job: Job) -> int:
    """FLOPs of matrix products and attention in the forward pass of one micro-batch."""
    sizes, tape = Sizes.of(job.model, job.layout, job.training), Tape()
    if job.model.block == "ffn":
        up, down = ColumnLinear(sizes, (sizes.F,), job.model.bias), RowLinear(sizes, sizes.F, job.model.bias)
        with tape.repeat(job.model.layers), tape.at(phase="forward"):
            up.forward(tape, ("saved_activations",))
            down.forward(tape)
    else:
        Decoder(job.model, sizes).forward(tape)
    return sum(Work.of(tape.trace()).flops(phase="forward", kind=kind) for kind in EXACT_KINDS)


def heaviest(job: Job) -> StepAccount:
    """The account of a rank that no other exceeds, neither in work nor in memory."""
    stride = job.layout.stride("ring")
    accounts = [formula(job, coordinate * stride) for coordinate in _heaviest_coordinates(job.layout)]
    return max(accounts, key=lambda account: account.footprint.peak)


def _heaviest_coordinates(layout: Layout) -> tuple[int, ...]:
    """On the ring. Contiguous: the last, which sees every key. Zigzag: work is equal; a step that shows all queries
    half of the keys needs other memory than one that shows half of the queries all keys, and only ranks between the
    first and the last have both kinds."""
    if layout.ring_order == "contiguous" or layout.ring == 1:
        return (layout.ring - 1,)
    return (0, 1) if layout.ring == 2 else (1,)


def step_trace(job: Job, rank: int = 0) -> Trace:
    """The trace of the second step: optimiser states exist, gradients are persistent."""
    layout, training = job.layout, job.training
    specs = param_specs(job.model, layout, training.seq_len)
    sizes = Sizes.of(job.model, layout, training, rank)
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
    tape.alloc(tokens, "temporaries" if s.loss_chunk else "logits")  # the labels: a loss of whole logits keeps them
    tape.alloc(tokens, "saved_activations" if s.T == 1 else "temporaries")
    tape.alloc(positions, "saved_activations" if decoder.model.positions == "learned" else "temporaries")
    if s.documents:
        tape.alloc(tokens * s.U)
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

"""The step of a model that is a stack of linear pairs only (`model.block = "ffn"`), by formula.

Each block is y = (x @ up) @ down, `up` split by columns and `down` by rows as in a decoder's MLP: no norm, no
activation, no residual, no vocabulary and so no loss. The stack stands for the inside of a model: its input [N, E] and
the gradient of its output are given, the gradient of its input is made. No command executes it, so its account has
`status` formula.
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.account import StepAccount
from meshwright.config.tree import Job
from meshwright.planner.step import optimise, persistent
from meshwright.schemes.params import param_specs
from meshwright.schemes.replicate import sum_naive
from meshwright.schemes.tape import Group, Sizes, Tape
from meshwright.schemes.tensor import ColumnLinear, RowLinear


def formula_of_blocks(job: Job) -> StepAccount:
    """The account of one step of a legal job whose block is `ffn`."""
    layout, training = job.layout, job.training
    specs = param_specs(job.model, layout, training.seq_len)
    tape = Tape()
    persistent(tape, specs)
    with tape.repeat(training.accumulation):
        _micro_batch(tape, job)
    sum_naive(tape, specs, Group(layout.gradient_axis or "replicate", layout.gradient_group_size))
    optimise(tape, specs)
    account = StepAccount.of(tape.trace(), source="formula", rank=0, world=layout.world, job=job.name)
    return replace(account, status="formula")


def _micro_batch(tape: Tape, job: Job) -> None:
    """Each block saves its input and its hidden layer; its output is the next one's input."""
    model, s = job.model, Sizes.of(job.model, job.layout, job.training)
    up, down = ColumnLinear(s, (s.F,), model.bias), RowLinear(s, s.F, model.bias)
    stream = s.N * s.E * s.c
    with tape.at("", "forward"):
        tape.save(stream)
    with tape.repeat(model.layers), tape.at("layers.*.mlp", "forward"):
        up.forward(tape, ("saved_activations",))
        down.forward(tape)
        tape.free(stream, s.wire_category)  # the next block saves it
        tape.save(stream)
    with tape.at("", "backward"):
        tape.release(stream)
        tape.alloc(stream, s.wire_category)  # the gradient of the last output
    with tape.repeat(model.layers, first=model.layers - 1, step=-1), tape.at("layers.*.mlp", "backward"):
        down.backward(tape, release_input=True)
        tape.free(stream, s.wire_category)
        up.backward(tape)
    with tape.at("", "backward"):
        tape.free(stream, s.wire_category)

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
from meshwright.planner.states import states_of
from meshwright.planner.step import optimise
from meshwright.schemes.params import param_specs
from meshwright.schemes.tape import Sizes, Tape
from meshwright.schemes.tensor import ColumnLinear, RowLinear
from meshwright.schemes.units import Run, Units


def formula_of_blocks(job: Job) -> StepAccount:
    """The account of one step of a legal job whose block is `ffn`."""
    layout, training = job.layout, job.training
    specs = param_specs(job.model, layout, training.seq_len)
    states, tape = states_of(job, specs, 0), Tape()
    states.persist(tape)
    for times, units in states.micro_batches(training.accumulation):
        with tape.repeat(times):
            _micro_batch(tape, job, units)
    states.finish(tape)
    optimise(tape, specs, states)
    account = StepAccount.of(tape.trace(), source="formula", rank=0, world=layout.world, job=job.name)
    return replace(account, status="formula")


def _micro_batch(tape: Tape, job: Job, units: Units) -> None:
    """Each block saves its input and its hidden layer; its output is the next one's input."""
    model, s = job.model, Sizes.of(job.model, job.layout, job.training)
    up, down = ColumnLinear(s, (s.F,), model.bias), RowLinear(s, s.F, model.bias)
    stream = s.N * s.E * s.c
    with tape.at("", "forward"):
        tape.save(stream)
    units.enter_model(tape)

    def forward(run: Run) -> None:
        with tape.at("layers.*.mlp", "forward"):
            units.enter_layer(tape, run)
            up.forward(tape, ("saved_activations",))
            down.forward(tape)
            tape.free(stream, s.wire_category)  # the next block saves it
            tape.save(stream)
            units.leave_layer(tape)

    def backward(run: Run) -> None:
        with tape.at("layers.*.mlp", "backward"):
            units.reenter_layer(tape, run)
            down.backward(tape, release_input=True)
            tape.free(stream, s.wire_category)
            up.backward(tape)
            units.reduce_layer(tape, run)

    units.forward_layers(tape, model.layers, forward)
    units.leave_model(tape)
    units.reenter_model(tape)
    with tape.at("", "backward"):
        tape.release(stream)
        tape.alloc(stream, s.wire_category)  # the gradient of the last output
    units.backward_layers(tape, model.layers, backward)
    with tape.at("", "backward"):
        tape.free(stream, s.wire_category)
    units.reduce_model(tape)

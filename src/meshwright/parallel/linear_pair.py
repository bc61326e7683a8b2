"""The worksheet `linear-pair`, executed: `schemes.linear_pair`'s schedules on real gloo ranks, beside its formula.

Inputs are small integers, so that every sum is exact in float32 whatever its order: output and gradients of a pairing
must equal those of the unsharded layers bit for bit. What was sent is read by the recorder, not declared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from meshwright.account import Ledger, LedgerKey
from meshwright.audit.recorder import Recorder
from meshwright.comm.collectives import Axis
from meshwright.comm.conjugates import copy_to, gather_from, reduce_from, scatter_to
from meshwright.comm.mesh import World
from meshwright.comm.ranks import BYTES_OF_A_RANK, Ranks, available_memory
from meshwright.config.tree import Layout
from meshwright.errors import UserError
from meshwright.schemes.linear_pair import AXIS, PAIRINGS, Pairing, Product, Sizes, Step, ledger, schedule, worksheet
from meshwright.schemes.tape import FLOAT32
from meshwright.units import format_bytes

_CONJUGATES = {"copy_to": copy_to, "reduce_from": reduce_from, "gather_from": gather_from, "scatter_to": scatter_to}


class Measured(NamedTuple):
    """One pairing on one rank: what it sent, and which of y, x.grad, w1.grad, w2.grad are wrong (none, one hopes)."""

    ledger: Ledger
    wrong: tuple[str, ...]


def run(batch: int, seq: int, d_model: int, d_ff: int, tensor: int) -> dict[str, Any]:
    """The worksheet, and under `pairings` what ranks on this machine counted beside the formula.

    Each pairing has `rows` (those of rank 0), `wrong` (`rank 2: y`, …) and `agree`: on every rank the ledger is the
    formula's and all values are right. Raises UserError, before any rank starts, for what memory cannot hold.
    """
    sizes = Sizes(batch, seq, d_model, d_ff, tensor)
    check_memory(sizes, available_memory())
    with Ranks(tensor) as ranks:
        by_rank = ranks.run(measure, sizes)
    return result(sizes, by_rank)


def needed_memory(sizes: Sizes) -> int:
    """Bytes of all ranks at their peak, by tensors that each holds at once; their numbers are measured, rounded up."""
    weights = 6 * 2 * sizes.d_model * sizes.d_ff
    activations = sizes.batch * sizes.seq * (24 * sizes.d_model + 4 * sizes.d_ff)
    return sizes.tensor * (BYTES_OF_A_RANK + (weights + activations) * FLOAT32)


def check_memory(sizes: Sizes, available: int) -> None:
    """Raise UserError if a run would not fit into so many bytes."""
    needed = needed_memory(sizes)
    if needed > available:
        raise UserError(
            f"--run needs about {format_bytes(needed)} ({needed} bytes) and {format_bytes(available)} ({available} "
            f"bytes) are free (each of --tensor {sizes.tensor} ranks here holds the whole problem, to compare with): "
            f"use a smaller --d-model {sizes.d_model} or --d-ff {sizes.d_ff}, or leave out --run"
        )


def measure(sizes: Sizes) -> list[Measured]:
    """Execute all pairings on this rank, forward and backward. Collective over `sizes.tensor` ranks."""
    axis = World.create(Layout(tensor=sizes.tensor), torch.device("cpu")).axes[AXIS]
    whole = _Whole.draw(sizes)
    expected = whole.backward()
    return [_measure(schedule(pairing, sizes), whole, expected, axis) for pairing in PAIRINGS]


def execute(
    steps: tuple[Step, ...], x_BSE: torch.Tensor, weights: Mapping[str, torch.Tensor], axis: Axis
) -> torch.Tensor:
    """y [B, S, E] by a schedule: a conjugate, or a product with this rank's part of a weight, one after the other."""
    value = x_BSE
    for step in steps:
        if isinstance(step, Product):
            assert value.shape == step.input_shape, (step, value.shape)
            value = value @ weights[step.weight]
            assert value.shape == step.output_shape, (step, value.shape)
        else:
            value = _CONJUGATES[step.name](value, axis, step.tensor)
    return value


class _Whole(NamedTuple):
    """The unsharded problem: x [B, S, E], w1 [E, F], w2 [F, E], and the gradient dy [B, S, E], of -1, 0 and 1."""

    x: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    dy: torch.Tensor

    @classmethod
    def draw(cls, sizes: Sizes) -> _Whole:
        generator = torch.Generator().manual_seed(0)
        B, S, E, F = sizes.batch, sizes.seq, sizes.d_model, sizes.d_ff
        shapes = ((B, S, E), (E, F), (F, E), (B, S, E))
        return cls(*(torch.randint(-1, 2, shape, generator=generator).float() for shape in shapes))

    def backward(self) -> dict[str, torch.Tensor]:
        """Output and gradients on one device, by plain autograd."""
        x, w1, w2 = (tensor.clone().requires_grad_() for tensor in self[:3])
        y = (x @ w1) @ w2
        dx, dw1, dw2 = torch.autograd.grad(y, (x, w1, w2), self.dy)
        return {"y": y.detach(), "x": dx, "w1": dw1, "w2": dw2}


def _measure(steps: tuple[Step, ...], whole: _Whole, expected: dict[str, torch.Tensor], axis: Axis) -> Measured:
    products = [step for step in steps if isinstance(step, Product)]
    x = whole.x.clone().requires_grad_()
    weights = {p.weight: _own_part(getattr(whole, p.weight), p, axis).requires_grad_() for p in products}
    with Recorder() as recorder:
        y = execute(steps, x, weights, axis)
        gradients = torch.autograd.grad(y, (x, *weights.values()), whole.dy)
    found = {"y": y.detach()} | dict(zip(("x", *weights), gradients, strict=True))
    expected = expected | {p.weight: _own_part(expected[p.weight], p, axis) for p in products}
    wrong = tuple(name for name, value in found.items() if not torch.equal(value, expected[name]))
    return Measured(Ledger.of(recorder.trace()), wrong)


def _own_part(w_IO: torch.Tensor, product: Product, axis: Axis) -> torch.Tensor:
    """This rank's columns [I, O/T] or rows [I/T, O] of a weight."""
    dim = 1 if product.split == "column" else 0
    return w_IO.chunk(axis.size, dim)[axis.rank].clone()


# --- the formula beside what was counted ------------------------------------------------------------------------------


def result(sizes: Sizes, by_rank: list[list[Measured]]) -> dict[str, Any]:
    """What `run` returns, from the measurements of every rank."""
    pairings = {"_".join(p): _compare(p, sizes, [own[i] for own in by_rank]) for i, p in enumerate(PAIRINGS)}
    agree = all(pairing["agree"] for pairing in pairings.values())
    return worksheet(*vars(sizes).values()) | {"pairings": pairings, "agree": agree}


def _compare(pairing: Pairing, sizes: Sizes, by_rank: list[Measured]) -> dict[str, Any]:
    formula, counted = ledger(schedule(pairing, sizes), sizes.tensor), by_rank[0].ledger
    keys = sorted(formula.rows.keys() | counted.rows.keys(), key=lambda key: (key.phase != "forward", key))
    wrong = [f"rank {rank}: {name}" for rank, measured in enumerate(by_rank) for name in measured.wrong]
    return {
        "rows": [_row(key) | {"formula": formula.rows.get(key, 0), "run": counted.rows.get(key, 0)} for key in keys],
        "wrong": wrong,
        "agree": not wrong and all(measured.ledger == formula for measured in by_rank),
    }


def _row(key: LedgerKey) -> dict[str, Any]:
    sizes = {"payload_elements": key.payload_bytes // FLOAT32, "wire_bytes": key.wire_bytes}
    return {"phase": key.phase, "operation": key.operation, "tensor": key.site} | sizes


def comparison(ran: dict[str, Any]) -> str:
    """`run`'s result for people: each row's count by formula and on the ranks."""
    line = "  {:<10}{:<12}{:<8}{:>18}{:>16}{:>10}{:>8}".format
    ranks = ran["inputs"]["tensor"]
    lines = [f"Counted on {ranks} gloo rank{'s' * (ranks > 1)}; y and all gradients compared with one device."]
    for name, pairing in ran["pairings"].items():
        lines += ["", f"({name.replace('_', ', ')})"]
        lines.append(line("phase", "operation", "tensor", "payload elements", "wire bytes", "formula", "run"))
        for row in pairing["rows"]:
            phase, operation, tensor, elements, wire, formula, run = row.values()
            operation = operation.replace("_", "-")
            lines.append(line(phase, operation, tensor, f"{elements:,}", f"{wire:,}", formula, run))
        wrong = f"; wrong values on {', '.join(pairing['wrong'])}" if pairing["wrong"] else ""
        lines.append(f"  agree: {'yes' if pairing['agree'] else 'no'}{wrong}")
    return "\n".join(lines)

"""Two linear layers over tensor-parallel ranks: which pairing of column and row splits sends least, and why.

    y = (x @ w1) @ w2       x [B, S, E]   w1 [E, F]   h [B, S, F]   w2 [F, E]   y [B, S, E]       B batch   S sequence
                            x and y whole on every rank, float32                                  E d_model   F d_ff

A layer is split by columns or by rows over T ranks, between Megatron's conjugates (Shoeybi et al. 2019, section 3):

    column   w [I, O/T]   copy_to before (input whole)         gather_from after (output a slice [.., O/T])
    row      w [I/T, O]   scatter_to before (input a slice)    reduce_from after (output a partial sum)

Only (column, row) fits without glue: the slice that layer 1 leaves is the slice that layer 2 takes, so the gather and
the scatter between them fall away. `schedule` writes each pairing as a list of steps; the formula here, the executor in
`parallel.linear_pair` and the tests all read that list, and no collective is named anywhere else.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from meshwright.account import Issue, Ledger, Trace, wire_bytes
from meshwright.config.legality import divisors
from meshwright.errors import UserError
from meshwright.schemes.tape import FLOAT32

NAME = "linear-pair"
AXIS = "tensor"

Split = Literal["column", "row"]
Pairing = tuple[Split, Split]

PAIRINGS: tuple[Pairing, ...] = (("column", "row"), ("column", "column"), ("row", "row"), ("row", "column"))
"""The natural one first; the others are compared with it."""


class Conjugate(NamedTuple):
    """One of `comm.conjugates` on a tensor: `shape` is the whole tensor's, which is what its collective carries."""

    name: Literal["copy_to", "reduce_from", "gather_from", "scatter_to"]
    tensor: str
    shape: tuple[int, ...]
    forward: str | None
    backward: str | None


class Product(NamedTuple):
    """A local matrix product `output = input @ weight`, with the shapes that one rank sees."""

    weight: str
    split: Split
    weight_shape: tuple[int, int]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


Step = Conjugate | Product

_WIRE = {
    "copy_to": (None, "all_reduce"),
    "reduce_from": ("all_reduce", None),
    "gather_from": ("all_gather", None),
    "scatter_to": (None, "all_gather"),
}
"""The collective of each conjugate, forward and backward; the executor finds the same in `comm.conjugates`."""

_WHY = {
    "copy_to": "each rank uses all of {t} for its own columns, so each has only its share of the gradient of {t}, and "
    "the shares must be summed",
    "reduce_from": "each rank multiplied its slice of the input by its rows, so each has only a partial sum of {t}",
    "gather_from": "each rank made its own columns of {t}, and what follows needs all of them",
    "scatter_to": "each rank takes its slice of {t}, so each has only that slice of the gradient of {t}, and what came "
    "before needs all of it",
}


@dataclass(frozen=True)
class Sizes:
    """The numbers of the worksheet, checked. Raises UserError with a line for each mistake."""

    batch: int
    seq: int
    d_model: int
    d_ff: int
    tensor: int

    def __post_init__(self) -> None:
        typed = {name: f"--{name.replace('_', '-')} {value}" for name, value in self.inputs}
        if below := [f"{typed[name]} must be at least 1: use 1" for name, value in self.inputs if value < 1]:
            raise UserError("\n".join(below))
        if broken := [typed[name] for name in ("d_model", "d_ff") if getattr(self, name) % self.tensor]:
            raise UserError(
                f"--tensor {self.tensor} does not divide {' and '.join(broken)} (a column or row split gives each rank "
                f"an equal part of both widths): use {self._legal_degrees()}"
            )

    @property
    def inputs(self) -> tuple[tuple[str, int], ...]:
        """Names and values as they were asked for."""
        return tuple(vars(self).items())

    def _legal_degrees(self) -> str:
        legal = divisors(math.gcd(self.d_model, self.d_ff))
        below = max(degree for degree in legal if degree <= self.tensor)
        above = next((degree for degree in legal if degree > self.tensor), None)
        return f"{below} or {above}" if above else f"{below}"


def schedule(pairing: Pairing, sizes: Sizes) -> tuple[Step, ...]:
    """The steps of one pairing, in program order.

    A tensor between layers is whole or a slice. A column layer asks for a whole one, a row layer for a slice; where the
    last layer left something else, a conjugate makes it.
    """
    T = sizes.tensor
    tensors = ("x", "h", "y")
    widths = (sizes.d_model, sizes.d_ff, sizes.d_model)
    steps: list[Step] = []

    def shape(i: int, *, sliced: bool) -> tuple[int, int, int]:
        return sizes.batch, sizes.seq, widths[i] // T if sliced else widths[i]

    def conjugate(name: Any, i: int) -> None:
        wire = _WIRE[name] if T > 1 else (None, None)
        steps.append(Conjugate(name, tensors[i], shape(i, sliced=False), *wire))

    sliced = False  # x is whole
    for i, split in enumerate(pairing):
        follower = pairing[i + 1] if i + 1 < len(pairing) else "column"  # y is asked for whole
        if split == "column":
            conjugate("copy_to", i)
        elif not sliced:
            conjugate("scatter_to", i)
        w_IO = (widths[i], widths[i + 1] // T) if split == "column" else (widths[i] // T, widths[i + 1])
        here, there = shape(i, sliced=split == "row"), shape(i + 1, sliced=split == "column")
        steps.append(Product(f"w{i + 1}", split, w_IO, here, there))
        sliced = split == "column" and follower == "row"
        if split == "row":
            conjugate("reduce_from", i + 1)
        elif not sliced:
            conjugate("gather_from", i + 1)
    return tuple(steps)


def collectives(steps: tuple[Step, ...]) -> list[tuple[str, str, Conjugate]]:
    """(phase, operation, conjugate) of all that is sent: forward in program order, backward in the reverse."""
    conjugates = [step for step in steps if isinstance(step, Conjugate)]
    forward = [("forward", step.forward, step) for step in conjugates if step.forward]
    return forward + [("backward", step.backward, step) for step in reversed(conjugates) if step.backward]


def ledger(steps: tuple[Step, ...], tensor: int) -> Ledger:
    """What a schedule sends, by formula; a row's site is the tensor it is about."""
    issues = (
        Issue(operation, AXIS, tensor, "float32", math.prod(step.shape) * FLOAT32, phase, step.tensor)
        for phase, operation, step in collectives(steps)
    )
    return Ledger.of(Trace(tuple(issues)))


def worksheet(batch: int, seq: int, d_model: int, d_ff: int, tensor: int) -> dict[str, Any]:
    """Every figure of every pairing, integers all: shapes, collectives, totals, and what is more than (column, row).

    Elements and bytes are those of the full tensor; wire is what one rank sends under the ring algorithm.
    """
    sizes = Sizes(batch, seq, d_model, d_ff, tensor)
    figures = {"_".join(pairing): _figures(schedule(pairing, sizes), tensor) for pairing in PAIRINGS}
    best = figures["_".join(PAIRINGS[0])]
    for own in figures.values():
        for name in ("collectives", "wire_elements_per_rank"):
            own[f"{name}_more"] = own[name] - best[name]
    return {"name": NAME, "inputs": dict(sizes.inputs), "figures": figures}


def _figures(steps: tuple[Step, ...], tensor: int) -> dict[str, Any]:
    products = [step for step in steps if isinstance(step, Product)]
    figures: dict[str, Any] = {
        f"layer_{i}": {"weight": list(p.weight_shape), "input": list(p.input_shape), "output": list(p.output_shape)}
        for i, p in enumerate(products, start=1)
    }
    figures |= {"forward": {}, "backward": {}}
    sent = collectives(steps)
    for phase, operation, step in sent:
        figures[phase][f"{operation}_{step.tensor}"] = _sizes(operation, step, tensor)
    rows = [_sizes(operation, step, tensor) for _, operation, step in sent]
    figures["collectives"] = len(rows)
    for name in ("elements", "bytes", "wire_elements", "wire_bytes"):
        figures[f"{name}_per_rank"] = sum(row[name] for row in rows)
        figures[f"{name}_group"] = tensor * figures[f"{name}_per_rank"]
    return figures


def _sizes(operation: str, step: Conjugate, tensor: int) -> dict[str, int]:
    elements = math.prod(step.shape)
    return {
        "elements": elements,
        "bytes": elements * FLOAT32,
        "wire_elements": wire_bytes(operation, tensor, elements),  # T divides the elements: nothing is rounded
        "wire_bytes": wire_bytes(operation, tensor, elements * FLOAT32),
    }


# --- for people -------------------------------------------------------------------------------------------------------


def text(batch: int, seq: int, d_model: int, d_ff: int, tensor: int) -> str:
    """The derivation: each pairing's shapes and collectives, their totals, and what the worse ones add and why."""
    sizes = Sizes(batch, seq, d_model, d_ff, tensor)
    figures = worksheet(*vars(sizes).values())["figures"]
    best = schedule(PAIRINGS[0], sizes)
    lines = [
        f"y = (x @ w1) @ w2 on {tensor} tensor-parallel ranks, float32; x and y are whole on every rank.",
        f"x, y [{batch}, {seq}, {d_model}]   h [{batch}, {seq}, {d_ff}]   "
        f"w1 [{d_model}, {d_ff}]   w2 [{d_ff}, {d_model}]",
        f"One rank sends 2({tensor}-1)/{tensor} of an all-reduce and ({tensor}-1)/{tensor} of an all-gather.",
    ]
    for pairing in PAIRINGS:
        steps = schedule(pairing, sizes)
        lines += ["", f"({', '.join(pairing)})", *_shape_lines(steps)]
        lines += _table(figures["_".join(pairing)], tensor)
        lines += _reasons(steps, best, figures["_".join(pairing)])
    return "\n".join(lines)


def _shape_lines(steps: tuple[Step, ...]) -> list[str]:
    return [
        f"  {step.weight} by {step.split + 's':8} {list(step.input_shape)} @ {list(step.weight_shape)} "
        f"-> {list(step.output_shape)}{'  partial sums' if step.split == 'row' else ''}"
        for step in steps
        if isinstance(step, Product)
    ]


def _table(figures: dict[str, Any], tensor: int) -> list[str]:
    line = "  {:<10}{:<14}{:>16}{:>16}{:>16}{:>16}".format
    rows = [line("", "", "elements", "bytes", "wire elements", "wire bytes")]
    for phase in ("forward", "backward"):
        for name, row in figures[phase].items():
            rows.append(line(phase, _words(name), *(f"{n:,}" for n in row.values())))
    for who, scope in ((f"{figures['collectives']} calls", "per_rank"), (f"× {tensor} ranks", "group")):
        total = (figures[f"{name}_{scope}"] for name in ("elements", "bytes", "wire_elements", "wire_bytes"))
        rows.append(line("total", who, *(f"{n:,}" for n in total)))
    return rows


def _reasons(steps: tuple[Step, ...], best: tuple[Step, ...], figures: dict[str, Any]) -> list[str]:
    """A sentence for each collective that the natural pairing does not have, and for each that only it has."""
    if steps == best:
        return ["  The columns of h that a rank makes are those whose rows of w2 it holds: h is never sent."]
    more, wire = figures["collectives_more"], figures["wire_elements_per_rank_more"]
    lines = [f"  Against ({', '.join(PAIRINGS[0])}): {more:+} collectives, {wire:+,} wire elements per rank."]
    for phase, operation, step in collectives(steps):
        if step not in best:
            lines.append(f"  adds    {_words(f'{phase}_{operation}_{step.tensor}')} ({step.name}):")
            why = f"{_WHY[step.name].format(t=step.tensor)}."
            lines.append(textwrap.fill(why, 100, initial_indent=" " * 10, subsequent_indent=" " * 10))
    for phase, operation, step in collectives(best):
        if step not in steps:
            lines.append(f"  drops   {_words(f'{phase}_{operation}_{step.tensor}')} ({step.name}).")
    return lines


def _words(name: str) -> str:
    """`forward_all_reduce_h` → `forward all-reduce h`."""
    return name.replace("all_", "all-").replace("_", " ")

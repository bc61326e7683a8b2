"""FSDP on paper: the smallest degree at which a model of linear pairs fits into a device.

    P parameters   L layers of two linear layers [d, ff] and [ff, d]   T tokens   N degree of sharding

    states        16·P/N        float32 masters 4, accumulated gradients 4, AdamW's two moments 8
    activations   A = T·L·2·(d + ff)    the bf16 inputs of the linear layers, which their wgrads need
    gathered      2·(2·d·ff)    bf16 weights of the unit in use, a layer; twice that with the next one prefetched

FSDP divides the states, and nothing of what its T tokens keep. Another scheme must: sequence parallelism divides the
activations between tensor-parallel regions, and leaves the others. The exercise says *half*, by the same degree:

    bytes(N) = 16·P/N + A·(1/2 + 1/(2·N))

T tokens leave A behind: half of it is on every device, whatever N is, the other half in N parts. So no degree fits
where that half alone does not. The gathered weights are a term of their own, not in bytes(N).

The division is even here. `fully_shard` gives a rank ceil(rows/N) rows of each weight; `rank_state_bytes` counts them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from meshwright.config.files import load_job
from meshwright.config.tree import Layout, Model
from meshwright.errors import UserError
from meshwright.schemes.limits import SIZE, Range, mistakes
from meshwright.schemes.params import ParamSpec, num_parameters, param_specs
from meshwright.units import GB, GIB, format_bytes

NAME = "fsdp-memory"

STATES = {"masters": 4, "gradients": 4, "optimiser_states": 8}
"""Bytes per parameter."""

STATE_BYTES = sum(STATES.values())
BF16 = 2
HALF = Fraction(1, 2)
DEVICE_GB = Range(1, 1e6)


@dataclass(frozen=True)
class Paper:
    """A model of linear pairs, the tokens it keeps, and the bytes of a device."""

    model: Model
    tokens: int
    device_bytes: int

    @property
    def specs(self) -> Sequence[ParamSpec]:
        return param_specs(self.model, Layout(), 1)  # without positions the length of a sequence is nobody's dim

    @property
    def num_parameters(self) -> int:
        """P."""
        return num_parameters(self.model, 1)

    @property
    def saved_bytes_per_token(self) -> int:
        """bf16 inputs of both linear layers of each layer: L·2·(d + ff)."""
        return self.model.layers * BF16 * (self.model.d_model + self.model.d_ff)

    @property
    def gathered_unit_bytes(self) -> int:
        """bf16 weights of one layer, FSDP's unit; biases with them."""
        return BF16 * self.num_parameters // self.model.layers

    def activation_bytes(self, sharded: Fraction, degree: int) -> Fraction:
        """On one device, with the part `sharded` of them divided by the degree."""
        return self.tokens * self.saved_bytes_per_token * (1 - sharded + sharded / degree)

    def bytes_per_device(self, degree: int, sharded: Fraction | None = HALF) -> Fraction:
        """States and activations; None for no activations at all."""
        states = Fraction(STATE_BYTES * self.num_parameters, degree)
        return states if sharded is None else states + self.activation_bytes(sharded, degree)

    def smallest_degree(self, sharded: Fraction | None = HALF, reserved: int = 0) -> int | None:
        """From which bytes_per_device fits, with `reserved` bytes of the device for something else; None if never.

        bytes(N) = divided/N + whole, so N is divided / (device - whole), rounded up.
        """
        whole = Fraction(0) if sharded is None else (1 - sharded) * self.tokens * self.saved_bytes_per_token
        divided = self.bytes_per_device(1, sharded) - whole
        room = self.device_bytes - reserved - whole
        return math.ceil(divided / room) if room > 0 else None

    def rank_state_bytes(self, degree: int) -> int:
        """Of the first rank under `fully_shard`, which divides each parameter by rows and rounds up."""
        return STATE_BYTES * sum(-(-spec.shape[0] // degree) * math.prod(spec.shape[1:]) for spec in self.specs)

    def smallest_degree_of_rows(self, sharded: Fraction | None = HALF) -> int | None:
        """The same as smallest_degree, for the first rank and up to a row of each weight per rank; None if never."""
        start, rows = self.smallest_degree(sharded), max(spec.shape[0] for spec in self.specs)
        if start is None:
            return None

        def fits(degree: int) -> bool:
            kept = 0 if sharded is None else self.activation_bytes(sharded, degree)
            return self.rank_state_bytes(degree) + kept <= self.device_bytes

        degrees = range(start, max(start, rows) + 1)
        at = bisect_left(degrees, True, key=fits)  # more ranks never have more bytes
        return degrees[at] if at < len(degrees) else None


SHARDED: dict[str, Fraction | None] = {
    "none": None,
    "all_sharded": Fraction(1),
    "half_sharded": HALF,
    "not_sharded": Fraction(0),
}
"""The part of the activations that is sharded; None counts no activations."""


def worksheet(model: str, tokens: int, device_gb: float) -> dict[str, Any]:
    """Terms, bytes per device and smallest degrees. Raises UserError with a line for each mistake."""
    paper = _checked(model, tokens, device_gb)
    states = {name: nbytes * paper.num_parameters for name, nbytes in STATES.items()}
    unit = paper.gathered_unit_bytes
    figures: dict[str, Any] = {
        "parameters": paper.num_parameters,
        "state_bytes": states,
        "state_gib": {name: nbytes / GIB for name, nbytes in states.items()},
        "saved_bytes_per_token": paper.saved_bytes_per_token,
        "activation_bytes": paper.tokens * paper.saved_bytes_per_token,
        "bytes_per_device": expression(paper),
        "device_bytes": paper.device_bytes,
        "gathered_bytes": {"one_unit": unit, "with_prefetch": 2 * unit},
        "activations": {name: _figures(paper, sharded) for name, sharded in SHARDED.items()},
    }
    return {"name": NAME, "inputs": {"model": model, "tokens": tokens, "device_gb": device_gb}, "figures": figures}


def expression(paper: Paper) -> str:
    """bytes(N) with the model's numbers; T and N stay letters."""
    states = STATE_BYTES * paper.num_parameters
    return f"{states:,}/N + T·{paper.saved_bytes_per_token:,}·(1/2 + 1/(2·N))"


def _figures(paper: Paper, sharded: Fraction | None) -> dict[str, Any]:
    """Degrees, null where none fits, and the bytes at the smallest."""
    degree = paper.smallest_degree(sharded)
    return {
        "smallest_degree": degree,
        "bytes": None if degree is None else math.ceil(paper.bytes_per_device(degree, sharded)),
        "smallest_degree_with_gathered": paper.smallest_degree(sharded, 2 * paper.gathered_unit_bytes),
        "smallest_degree_of_rows": paper.smallest_degree_of_rows(sharded),
    }


def _checked(model: str, tokens: int, device_gb: float) -> Paper:
    found = mistakes({"tokens": (tokens, SIZE), "device_gb": (device_gb, DEVICE_GB)})
    pairs: Model | None = None
    try:
        pairs = load_job(model).model
        if pairs.block != "ffn":
            found.append(
                f"--model {model} is a decoder (this exercise counts the inputs of two linear layers a block): use "
                f"xxl-ffn, a file with model.block = ffn, or meshwright plan {model}"
            )
    except UserError as error:
        found.append(str(error))
    if found or pairs is None:
        raise UserError("\n".join(found))
    return Paper(pairs, tokens, round(device_gb * GB))


# --- for people -------------------------------------------------------------------------------------------------------

_TITLES = {
    "none": "no activations",
    "all_sharded": "all of them sharded",
    "half_sharded": "half of them sharded",
    "not_sharded": "none of them sharded",
}


def text(model: str, tokens: int, device_gb: float) -> str:
    """The derivation with the model's numbers, and a table of degrees."""
    paper = _checked(model, tokens, device_gb)
    figures = worksheet(model, tokens, device_gb)["figures"]
    m, unit = paper.model, paper.gathered_unit_bytes
    P, kept = figures["parameters"], figures["saved_bytes_per_token"]
    return "\n".join(
        [
            f"FSDP of {model} on paper: how many devices of {paper.device_bytes:,} bytes?",
            f"L {m.layers} layers   d {m.d_model:,}   ff {m.d_ff:,}   T {tokens:,} tokens",
            "",
            f"parameters   P = {P:,}",
            *_state_lines(figures),
            f"activations  L·2·(d + ff) = {kept:,} B per token, A = T·{kept:,} = {figures['activation_bytes']:,} B",
            f"gathered     {unit:,} B = {format_bytes(unit)} for the unit in use, "
            f"{format_bytes(2 * unit)} with the next one prefetched",
            "",
            "bytes per device, gathered weights apart, half of the activations sharded:",
            f"  {figures['bytes_per_device']}",
            "",
            *_degree_lines(figures["activations"]),
            "",
            "gathered: with two units of gathered weights beside them. rows: the first rank of fully_shard, which",
            "rounds the rows of each weight up. never: what stays on every device is more than it has.",
        ]
    )


def _state_lines(figures: dict[str, Any]) -> list[str]:
    line = "states       {:<22}{:>24}{:>14}".format
    return [
        line(f"{name.replace('_', ' ')}, {STATES[name]}·P", f"{nbytes:,} B", f"{nbytes / GIB:.1f} GiB")
        for name, nbytes in figures["state_bytes"].items()
    ]


def _degree_lines(activations: dict[str, dict[str, Any]]) -> list[str]:
    line = "  {:<24}{:>12}{:>20}{:>14}{:>12}".format
    rows = [line("smallest degree, with", "N", "bytes(N)", "gathered", "rows")]
    for name, row in activations.items():
        degree, nbytes, *others = ("never" if value is None else f"{value:,}" for value in row.values())
        rows.append(line(_TITLES[name], degree, "" if row["bytes"] is None else nbytes, *others))
    return rows

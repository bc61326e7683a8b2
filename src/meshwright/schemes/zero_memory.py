"""Bytes of model states on each device under ZeRO 0 to 3: the paper's account, and ours.

    P parameters   N devices   K bytes of optimiser states per parameter

Rajbhandari et al. 2020 (arXiv:1910.02054), figure 1: fp16 parameters 2, fp16 gradients 2, K = 12 of optimiser states
(float32 parameters 4, momentum 4, variance 4). A stage divides one more kind by N.

Ours keeps float32 masters 4, float32 gradients 4, AdamW moments 8, and no lasting copy in the compute dtype: a weight
is cast when it is used. So the stages divide other things:

    zero 1   moments                                        masters and gradients whole
    zero 2   masters, gradients, moments                    gathered bf16 weights, 2, stay from forward to backward
    zero 3   masters, gradients, moments                    gathered bf16 weights of one unit at a time

Both add up to 16 with no division, and to 16/N in stage 3. In between they differ: the paper's stage 1 divides its
float32 parameters with the states, ours keeps the masters whole; the paper's gradients are fp16, ours float32, for the
sum over micro-batches; and our zero 2 is `fully_shard` without resharding after forward: it divides the masters too,
and has the paper's 2 as gathered weights.

Each account is a list of kinds, and every figure a sum over it.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

from meshwright.schemes.limits import SIZE, Range, require
from meshwright.units import GB

NAME = "zero"

NUM_STAGES = 4
STAGES = range(NUM_STAGES)
NEVER = NUM_STAGES
"""A stage after the last."""

_ADAM = Range(0, 64)


class Kind(NamedTuple):
    """States of one kind: `nbytes` per parameter, whole below `divided_from` and divided by N from that stage on."""

    name: str
    nbytes: int
    divided_from: int
    only: tuple[int, ...] = tuple(STAGES)
    """Stages in which it lasts longer than one unit's forward or backward."""

    def on_device(self, stage: int, degree: int) -> Fraction:
        """Bytes per parameter of the whole model."""
        if stage not in self.only:
            return Fraction(0)
        return Fraction(self.nbytes, degree if stage >= self.divided_from else 1)


def paper(optimiser_bytes: int = 12) -> tuple[Kind, ...]:
    """The paper's kinds; its figure 1 has K = 12."""
    return (Kind("fp16 parameters", 2, 3), Kind("fp16 gradients", 2, 2), Kind("optimiser states", optimiser_bytes, 1))


OURS = (
    Kind("float32 masters", 4, 2),
    Kind("float32 gradients", 4, 2),
    Kind("AdamW moments", 8, 1),
    Kind("gathered bf16 weights", 2, NEVER, only=(2,)),
)

GATHERED_UNIT = 2
"""Bytes per parameter of the unit in use under our zero 3, of the weight in use under zero 0 and 1: not in the sums."""


def bytes_per_parameter(kinds: tuple[Kind, ...], stage: int, degree: int) -> Fraction:
    """What one device keeps."""
    return sum((kind.on_device(stage, degree) for kind in kinds), Fraction(0))


def formula(kinds: tuple[Kind, ...], stage: int) -> str:
    """The same in letters, such as `4 + 12/N`."""
    kept = [kind for kind in kinds if stage in kind.only]
    whole = sum(kind.nbytes for kind in kept if stage < kind.divided_from)
    divided = sum(kind.nbytes for kind in kept if stage >= kind.divided_from)
    return " + ".join([str(whole)] * bool(whole) + [f"{divided}/N"] * bool(divided)) or "0"


def worksheet(parameters: int, degree: int, optimiser_bytes: int) -> dict[str, Any]:
    """Bytes per parameter and GB (1e9 bytes) of each stage, kind by kind, in both accounts.

    Raises UserError with a line for each mistake.
    """
    inputs = {"parameters": parameters, "degree": degree, "optimiser_bytes": optimiser_bytes}
    require({name: (value, _ADAM if name == "optimiser_bytes" else SIZE) for name, value in inputs.items()})
    accounts = {"paper": paper(optimiser_bytes), "ours": OURS}
    figures: dict[str, Any] = {
        name: {f"zero_{stage}": _stage(kinds, stage, parameters, degree) for stage in STAGES}
        for name, kinds in accounts.items()
    }
    figures["gathered_unit_bytes_per_parameter"] = GATHERED_UNIT
    return {"name": NAME, "inputs": inputs, "figures": figures}


def _stage(kinds: tuple[Kind, ...], stage: int, parameters: int, degree: int) -> dict[str, Any]:
    each = bytes_per_parameter(kinds, stage, degree)
    return {
        "formula": formula(kinds, stage),
        "bytes_per_parameter": float(each),
        "gb": float(each * parameters / GB),
        "by_kind": {kind.name: float(kind.on_device(stage, degree)) for kind in kinds},
    }


# --- for people -------------------------------------------------------------------------------------------------------


def text(parameters: int, degree: int, optimiser_bytes: int) -> str:
    """Both accounts side by side, and where they differ."""
    figures = worksheet(parameters, degree, optimiser_bytes)["figures"]
    line = "  {:<26}{:>12}{:>12}{:>12}{:>12}".format
    lines = [
        "Model states on each device under ZeRO, in the paper's account and in ours.",
        f"P {parameters:,} parameters   N {degree:,} devices   K {optimiser_bytes}   GB of 1e9 bytes",
    ]
    for name, kinds in (("paper", paper(optimiser_bytes)), ("ours", OURS)):
        stages = figures[name].values()
        lines += ["", line(f"{name}, bytes/parameter", *(f"zero {stage}" for stage in STAGES))]
        for kind in kinds:
            lines.append(line(kind.name, *(_letters(kind, stage) for stage in STAGES)))
        lines.append(line("together", *(stage["formula"] for stage in stages)))
        lines.append(line("", *(f"{stage['bytes_per_parameter']:.4g}" for stage in stages)))
        lines.append(line("GB per device", *(f"{stage['gb']:,.4g}" for stage in stages)))
    return "\n".join(
        [
            *lines,
            "",
            "Ours: the paper's stage 1 divides its float32 parameters with the states; our masters stay whole.",
            "Its gradients are fp16, ours float32. Our zero 2 divides the masters and keeps the gathered bf16",
            f"weights from forward to backward. Zero 3 gathers a unit at a time: {GATHERED_UNIT} B for each of its "
            "parameters, not",
            "in the sums, and neither are the casts of the weight in use under zero 0 and 1.",
        ]
    )


def _letters(kind: Kind, stage: int) -> str:
    return formula((kind,), stage) if stage in kind.only else "-"

"""Data parallelism by formula: replicas split the batch and sum the gradients.

naive   after the last micro-batch, each gradient on its own, one all-reduce of its float32 elements, blocking.
        Parameters P on this rank: P elements in as many calls as there are parameters; nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.schemes.params import ParamSpec
from meshwright.schemes.tape import FLOAT32, Group, Tape


def sum_naive(tape: Tape, specs: Sequence[ParamSpec], group: Group) -> None:
    """All-reduce each gradient in place, in registration order."""
    for spec in specs:
        with tape.at(spec.name, "backward"):
            tape.wait(tape.all_reduce(group, "float32", spec.local_numel * FLOAT32))

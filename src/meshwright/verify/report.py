"""What `verify` found, as data and as text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from meshwright.account import Difference
from meshwright.config.attention import AttentionChoice


@dataclass(frozen=True)
class FirstDifference:
    """The earliest place where the run and the reference part."""

    kind: Literal["ledger", "loss", "activation", "gradient"]
    module: str
    rank: int
    error: float
    """Error over what the rule allows; for a ledger, the difference of the counts."""


@dataclass(frozen=True)
class GradientReport:
    """Parameters checked by the rule of DESIGN.md; `worst` is the largest error over its allowance, and whose it is."""

    checked: int
    failed: tuple[str, ...]
    worst: tuple[str, float]


@dataclass(frozen=True)
class VerifyReport:
    """One verification of a layout against one device."""

    world: int
    attention: AttentionChoice
    rows: dict[str, int]
    formula_vs_rehearsal: tuple[Difference, ...]
    rehearsal_vs_run: tuple[Difference, ...]
    loss_error: float
    loss_passes: bool
    gradients: GradientReport
    first_difference: FirstDifference | None

    @property
    def agree(self) -> bool:
        """Whether ledgers, loss and gradients all agree; a world of several ranks must have ledger rows at all."""
        ledgers = not self.formula_vs_rehearsal and not self.rehearsal_vs_run
        counted = self.world == 1 or all(self.rows.values())
        return ledgers and counted and self.loss_passes and not self.gradients.failed and self.first_difference is None

    def to_json(self) -> dict[str, Any]:
        """As DESIGN.md's command interface fixes it."""
        first = self.first_difference
        return {
            "agree": self.agree,
            "attention": self.attention.to_json(),
            "rows": self.rows,
            "ledger": {
                "formula_vs_rehearsal": [d.to_json() for d in self.formula_vs_rehearsal],
                "rehearsal_vs_run": [d.to_json() for d in self.rehearsal_vs_run],
            },
            "loss_error": _finite(self.loss_error),
            "gradients": {
                "checked": self.gradients.checked,
                "failed": list(self.gradients.failed),
                "worst": {
                    "parameter": self.gradients.worst[0],
                    "error_over_allowance": _finite(self.gradients.worst[1]),
                },
            },
            "first_difference": None if first is None else {**vars(first), "error": _finite(first.error)},
        }

    def text(self) -> str:
        """For people."""
        rows = " = ".join(f"{source} {count}" for source, count in self.rows.items())
        differing = len(self.formula_vs_rehearsal) + len(self.rehearsal_vs_run)
        loss = "passes" if self.loss_passes else "FAILS"
        name, worst = self.gradients.worst
        checked = self.gradients.checked
        passed = checked - len(self.gradients.failed)
        lines = [
            *([f"attention  auto takes {self.attention}"] if self.attention.asked == "auto" else []),
            f"ledger     {rows} rows on every rank, {differing or 'none'} differ"
            if self.world > 1
            else "ledger     one rank sends nothing",
            f"loss       relative error {self.loss_error:.1e} against float64 on one device: {loss}",
            f"gradients  {passed} of {checked} parameters pass; worst {name} at {worst:.2f} of its allowance",
        ]
        if self.first_difference is not None:
            first = self.first_difference
            place = f"{first.kind} at {first.module} on rank {first.rank}"
            lines.append(f"first difference  {place} ({first.error:.3g} times what is allowed)")
        for title, differences in (
            ("formula, rehearsal", self.formula_vs_rehearsal),
            ("rehearsal, run", self.rehearsal_vs_run),
        ):
            lines += [f"  {title}: {_describe(d)}" for d in differences[:5]]
            if len(differences) > 5:
                lines.append(f"  {title}: and {len(differences) - 5} more")
        lines.append("agree" if self.agree else "DO NOT AGREE")
        return "\n".join(lines)


def _finite(number: float) -> float | None:
    """JSON has no infinities: what is not finite becomes null."""
    return number if math.isfinite(number) else None


def _describe(difference: Difference) -> str:
    row = " ".join(str(value) for value in difference.row.values())
    return f"{difference.part} {row}: {difference.first} against {difference.second}"

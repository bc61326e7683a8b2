"""When FSDP's gathers hide under the arithmetic: one linear layer, bf16, on paper.

    B tokens of the whole batch      E width of the layer, [E, E]      N chips
    C peak FLOPs a second of a chip  W bytes a second that a chip receives

    forward    2·B·E²/N FLOPs a chip (its B/N tokens times the whole weight)     all-gather        2·E² bytes a chip
    backward   4·B·E²/N FLOPs a chip (dgrad and wgrad)                           all-gather        2·E² bytes
                                                                                 reduce-scatter    2·E² bytes (bf16)

FLOPs over bytes is B/N both ways: E cancels, and what is left is the tokens of a chip. The machine's arithmetic
intensity is C/W, the FLOPs that it can do while one byte arrives. The gathers hide where B/N exceeds C/W, beyond
B = N·C/W tokens: more chips need a larger batch, and a wider model does not help.

A chip's own shard, 1/N of the bytes, is not sent: 2E² is the limit of many chips. Our reductions are of float32, 4E²
bytes, so that our backward has 2/3 of the intensity and needs 3/2 of the tokens.
"""

from __future__ import annotations

import math
from typing import Any

from meshwright.schemes.limits import RATE, SIZE, require
from meshwright.units import format_bandwidth, format_flops, format_seconds

NAME = "fsdp-roofline"

BF16, FLOAT32 = 2, 4

FLOPS_PER_TOKEN = {"forward": 2, "backward": 4}
"""Times E²."""

BYTES = {
    "forward": {"bf16": BF16, "float32": BF16},
    "backward": {"bf16": BF16 + BF16, "float32": BF16 + FLOAT32},
}
"""Times E², by the dtype of the reduction: the gather is always of bf16."""


def flops_per_chip(phase: str, tokens: int, width: int, chips: int) -> float:
    """Of one layer."""
    return FLOPS_PER_TOKEN[phase] * tokens * width**2 / chips


def bytes_per_chip(phase: str, width: int, reduce_dtype: str = "bf16") -> int:
    """Gathered and, in backward, reduced by one layer."""
    return BYTES[phase][reduce_dtype] * width**2


def critical_intensity(peak_flops: float, bandwidth: float) -> float:
    """C/W: FLOPs that a chip can do while it receives a byte, and tokens a chip beyond which communication hides."""
    return peak_flops / bandwidth


def worksheet(tokens: int, width: int, chips: int, peak_flops: float, bandwidth: float) -> dict[str, Any]:
    """Work, bytes and seconds of one layer on one chip, forward and backward, and the tokens from which they hide.

    Raises UserError with a line for each mistake.
    """
    inputs = {
        "tokens": tokens,
        "width": width,
        "chips": chips,
        "peak_flops": peak_flops,
        "bandwidth": bandwidth,
    }
    ranges = {"peak_flops": RATE, "bandwidth": RATE}
    require({name: (value, ranges.get(name, SIZE)) for name, value in inputs.items()})
    critical = critical_intensity(peak_flops, bandwidth)
    forward = _phase("forward", "bf16", inputs)
    figures = {
        "flops_per_chip": forward["flops"],
        "bytes_per_chip": forward["bytes"],
        "flops_per_byte": forward["flops_per_byte"],
        "tokens_per_chip": tokens / chips,
        "critical_flops_per_byte": critical,
        "critical_tokens": math.ceil(chips * critical),
        "most_chips": math.ceil(tokens / critical) - 1,
        "hidden": forward["hidden"],
        "forward": forward,
        "backward": _phase("backward", "bf16", inputs),
        "backward_float32_reduction": _phase("backward", "float32", inputs),
    }
    return {"name": NAME, "inputs": inputs, "figures": figures}


def _phase(phase: str, reduce_dtype: str, inputs: dict[str, Any]) -> dict[str, Any]:
    tokens, width, chips, peak_flops, bandwidth = inputs.values()
    flops, nbytes = flops_per_chip(phase, tokens, width, chips), bytes_per_chip(phase, width, reduce_dtype)
    compute, wire = flops / peak_flops, nbytes / bandwidth
    per_token = FLOPS_PER_TOKEN[phase] / BYTES[phase][reduce_dtype]  # 1, or 2/3; without E, so nothing is rounded
    return {
        "flops": flops,
        "bytes": nbytes,
        "flops_per_byte": tokens / chips * per_token,
        "compute_seconds": compute,
        "communication_seconds": wire,
        "exposed_seconds": max(0.0, wire - compute),
        "hidden": tokens / chips * per_token > critical_intensity(peak_flops, bandwidth),
    }


# --- for people -------------------------------------------------------------------------------------------------------


def text(tokens: int, width: int, chips: int, peak_flops: float, bandwidth: float) -> str:
    """The derivation with these numbers."""
    figures = worksheet(tokens, width, chips, peak_flops, bandwidth)["figures"]
    critical = figures["critical_flops_per_byte"]
    verb = "exceeds it: hidden" if figures["hidden"] else "does not exceed it: exposed"
    line = "  {:<28}{:>13}{:>18}{:>8}{:>10}{:>10}  {}".format
    rows = [line("one layer on one chip", "FLOPs", "bytes", "ratio", "compute", "wire", "").rstrip()]
    for name, letters in (
        ("forward", "forward        2BE²/N, 2E²"),
        ("backward", "backward       4BE²/N, 4E²"),
        ("backward_float32_reduction", "  float32 sums 4BE²/N, 6E²"),
    ):
        phase = figures[name]
        times = (format_seconds(phase[f"{what}_seconds"]) for what in ("compute", "communication"))
        outcome = "hidden" if phase["hidden"] else f"{format_seconds(phase['exposed_seconds'])} exposed"
        ratio = f"{phase['flops_per_byte']:.5g}"
        rows.append(line(letters, f"{phase['flops']:.4g}", f"{phase['bytes']:,}", ratio, *times, outcome))
    return "\n".join(
        [
            "FSDP of linear layers [E, E] in bf16: do the gathers hide under the products?",
            f"B {tokens:,} tokens   E {width:,}   N {chips:,} chips   "
            f"C {format_flops(peak_flops)}   W {format_bandwidth(bandwidth)}",
            "",
            *rows,
            "",
            f"FLOPs over bytes are B/N = {tokens / chips:.5g}: E cancels.",
            f"The machine's arithmetic intensity is C/W = {critical:.5g} FLOPs a byte. B/N {verb}.",
            f"They hide beyond B = N·C/W = {figures['critical_tokens']:,} tokens on {chips:,} chips; "
            f"{tokens:,} tokens on up to {figures['most_chips']:,}.",
        ]
    )

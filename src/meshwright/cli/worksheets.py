"""The worksheets: for each NAME one dataclass, which is its options and shows its figures.

A new worksheet is a class here and a line in `WORKSHEETS`. Its formulas are a page of `schemes/` with two functions of
its sizes, `worksheet` (JSON) and `text`, and it is imported when the worksheet is shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class Sheet(Protocol):
    """Options of a worksheet."""

    def show(self) -> int:
        """Print it; the exit code."""
        ...


@dataclass(frozen=True, kw_only=True)
class LinearPair:
    """Two linear layers on tensor-parallel ranks: what each pair of column and row splits sends, and why."""

    batch: int = 8
    """Sequences."""
    seq: int = 128
    """Tokens in a sequence."""
    d_model: int = 1024
    """Width of input and output."""
    d_ff: int = 4096
    """Width between the layers."""
    tensor: int = 4
    """Ranks."""
    run: bool = False
    """Execute each pairing on ranks here and count what they send."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def show(self) -> int:
        """1 where a run does not agree with its formula."""
        from meshwright.schemes import linear_pair

        if not self.run:
            return _show(self, linear_pair.worksheet, linear_pair.text)
        text = linear_pair.text(**_sizes(self))  # checks the sizes before torch is imported
        from meshwright.parallel.linear_pair import comparison, run

        ran = run(**_sizes(self))
        print(_one_line(ran) if self.json else f"{text}\n\n{comparison(ran)}")
        return 0 if ran["agree"] else 1


@dataclass(frozen=True, kw_only=True)
class ActivationMemory:
    """Bytes that a GPT layer keeps for backward, under tensor and sequence parallelism and recomputation."""

    seq: int = 2048
    """Tokens in a sequence."""
    batch: int = 4
    """Sequences in a micro-batch."""
    hidden: int = 6144
    """Width of the residual stream; the MLP is four times as wide."""
    heads: int = 64
    """Attention heads."""
    tensor: int = 8
    """Tensor-parallel ranks."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def show(self) -> int:
        from meshwright.schemes import activation_memory

        return _show(self, activation_memory.worksheet, activation_memory.text)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """How large a bucket of gradients should be, so that least of its all-reduce stays exposed after backward."""

    gradient_bytes: int = 1_600_000_000
    """All gradients of a rank."""
    bandwidth: float = 10e9
    """Bytes of gradient that an all-reduce gets through in a second."""
    seconds_per_call: float = 100e-6
    """What a call costs whatever its size: launch and latency."""
    backward_seconds: float = 0.25
    """Backward alone."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def show(self) -> int:
        from meshwright.schemes import bucketing

        return _show(self, bucketing.worksheet, bucketing.text)


@dataclass(frozen=True, kw_only=True)
class FsdpMemory:
    """The smallest degree of FSDP at which a model of linear pairs fits into a device, term by term."""

    model: str = "xxl-ffn"
    """A TOML file or a name of the catalog whose model.block is ffn."""
    tokens: int = 8192
    """Tokens whose activations are kept for backward."""
    device_gb: float = 95.0
    """Memory of a device, in 1e9 bytes."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def show(self) -> int:
        from meshwright.schemes import fsdp_memory

        return _show(self, fsdp_memory.worksheet, fsdp_memory.text)


@dataclass(frozen=True, kw_only=True)
class FsdpRoofline:
    """How many tokens hide FSDP's gathers under the arithmetic of a linear layer."""

    tokens: int = 4_194_304
    """Tokens of the whole batch."""
    width: int = 16384
    """Width of input and output of a layer."""
    chips: int = 1024
    """Devices that share batch and weights."""
    peak_flops: float = 275e12
    """bf16 FLOPs a second of a chip."""
    bandwidth: float = 100e9
    """Bytes that a chip receives in a second."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def show(self) -> int:
        from meshwright.schemes import fsdp_roofline

        return _show(self, fsdp_roofline.worksheet, fsdp_roofline.text)


@dataclass(frozen=True, kw_only=True)
class Zero:
    """Bytes of model states on each device under ZeRO 0 to 3, in the paper's account and in ours."""

    parameters: int = 7_500_000_000
    """Parameters of the whole model."""
    degree: int = 64
    """Data-parallel devices."""
    optimiser_bytes: int = 12
    """The paper's K: bytes of optimiser states per parameter, float32 parameters among them."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def show(self) -> int:
        from meshwright.schemes import zero_memory

        return _show(self, zero_memory.worksheet, zero_memory.text)


WORKSHEETS: dict[str, type[Sheet]] = {
    "linear-pair": LinearPair,
    "activation-memory": ActivationMemory,
    "bucket": Bucket,
    "fsdp-memory": FsdpMemory,
    "fsdp-roofline": FsdpRoofline,
    "zero": Zero,
}


def _show(given: Any, figures: Callable[..., dict[str, Any]], text: Callable[..., str]) -> int:
    sizes = _sizes(given)
    print(_one_line(figures(**sizes)) if given.json else text(**sizes))
    return 0


def _sizes(given: Any) -> dict[str, Any]:
    """The options that are the worksheet's numbers."""
    return {name: value for name, value in vars(given).items() if name not in ("run", "json")}


def _one_line(value: dict[str, Any]) -> str:
    return json.dumps(value, allow_nan=False)

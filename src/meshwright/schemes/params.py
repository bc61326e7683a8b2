"""Every parameter of a decoder: global shape, how it is split, whose gradients are partial, how it begins.

One list, read by initialisation, the gradient group, clipping, the checkpoint and the footprint alike.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from meshwright.config.tree import Layout, Model

Init = Literal["normal", "zeros", "ones"]


@dataclass(frozen=True)
class Split:
    """A mesh axis divides a dim into `parts`; with fewer parts than ranks, neighbouring ranks hold the same part.

    Parts are ceil(size / parts) long; the last ones are filled up with padding.
    """

    axis: str
    degree: int
    dim: int
    parts: int

    @property
    def copies(self) -> int:
        """Ranks of the axis that hold the same part."""
        return self.degree // self.parts

    def part(self, coordinate: int) -> int:
        """Which part the rank at this coordinate of the axis holds."""
        return coordinate // self.copies


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of the whole model."""

    name: str
    """Its name in the module tree, and the key from which its initial values are drawn."""
    shape: tuple[int, ...]
    """Global shape, without padding."""
    split: Split | None = None
    """How the tensor axis divides it; None where every rank of the axis holds all of it."""
    summed_over: tuple[str, int] | None = None
    """Axis and size of the group whose ranks all hold it whole but each see a part of the tokens that use it."""
    init: Init = "normal"
    """Kind of initial values."""
    std: float = 0.0
    """Standard deviation of normal initial values."""
    decay: bool = True
    """Whether weight decay applies: matrices yes, norms and biases no."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape on one rank, padding included."""
        if self.split is None:
            return self.shape
        shape = list(self.shape)
        shape[self.split.dim] = -(-shape[self.split.dim] // self.split.parts)
        return tuple(shape)

    @cached_property
    def local_numel(self) -> int:
        """Elements on one rank, padding included."""
        return math.prod(self.local_shape)

    @property
    def partial_over(self) -> tuple[str, int] | None:
        """Axis and size of the group of ranks that hold the same part but see different gradients of it.

        Ranks that share a key-value head each have the gradient of their own query heads only; under sequence
        parallelism, each has that of its own part of the sequence for norms, row biases and learned positions.
        """
        if self.split is None or self.split.copies == 1:
            return self.summed_over
        return self.split.axis, self.split.copies

    def span(self, coordinate: int) -> tuple[int, int]:
        """First and past-the-last global index along the split dim of the rank at `coordinate`, padding excluded."""
        assert self.split is not None, self.name
        size, length = self.shape[self.split.dim], self.local_shape[self.split.dim]
        start = min(self.split.part(coordinate) * length, size)
        return start, min(start + length, size)

    def seed(self, seed: int) -> int:
        """Seed of its generator: depends on the run's seed and the name, never on the layout."""
        digest = hashlib.sha256(f"{seed}/{self.name}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


def param_specs(model: Model, layout: Layout, seq_len: int) -> tuple[ParamSpec, ...]:
    """All parameters in registration order. A tied head has none of its own.

    `seq_len` is the number of rows of a learned position table.
    """
    return _param_specs(model, layout.tensor, layout.sequence_parallel, seq_len)


@lru_cache(maxsize=64)
def _param_specs(model: Model, T: int, sequence_parallel: bool, seq_len: int) -> tuple[ParamSpec, ...]:
    """Kept, as a search prices many layouts that share them."""
    E, D = model.d_model, model.head_dim
    std, out_std = 0.02, 0.02 / math.sqrt(2 * model.layers)

    by_sequence = ("tensor", T) if T > 1 and sequence_parallel else None

    def split(dim: int, parts: int = T) -> Split | None:
        return Split("tensor", T, dim, min(parts, T)) if T > 1 else None

    def linear(name: str, out: int, into: int, dim: int, *, parts: int = T, std: float = std) -> list[ParamSpec]:
        """Weight [out, in] split along `dim`, and a bias that is split only where the outputs are."""
        specs = [ParamSpec(f"{name}.weight", (out, into), split(dim, parts), std=std)]
        if model.bias:
            bias_split = split(0, parts) if dim == 0 else None
            summed_over = by_sequence if dim == 1 else None
            specs.append(ParamSpec(f"{name}.bias", (out,), bias_split, summed_over, init="zeros", decay=False))
        return specs

    def norm(name: str) -> list[ParamSpec]:
        specs = [ParamSpec(f"{name}.weight", (E,), None, by_sequence, init="ones", decay=False)]
        if model.norm == "layernorm" and model.bias:
            specs.append(ParamSpec(f"{name}.bias", (E,), None, by_sequence, init="zeros", decay=False))
        return specs

    specs = []
    if model.block == "decoder":
        specs.append(ParamSpec("embedding.weight", (model.vocab_size, E), split(0), std=std))
        if model.positions == "learned":
            specs.append(ParamSpec("positions.weight", (seq_len, E), None, by_sequence, std=std))
    for i in range(model.layers):
        block = f"layers.{i}"
        if model.block == "ffn":
            specs += linear(f"{block}.mlp.up", model.d_ff, E, 0) + linear(f"{block}.mlp.down", E, model.d_ff, 1)
            continue
        specs += norm(f"{block}.attention_norm")
        specs += linear(f"{block}.attention.query", model.heads * D, E, 0)
        specs += linear(f"{block}.attention.key", model.kv_heads * D, E, 0, parts=model.kv_heads)
        specs += linear(f"{block}.attention.value", model.kv_heads * D, E, 0, parts=model.kv_heads)
        specs += linear(f"{block}.attention.output", E, model.heads * D, 1, std=out_std)
        specs += norm(f"{block}.mlp_norm")
        if model.mlp == "gated_silu":
            specs += linear(f"{block}.mlp.gate", model.d_ff, E, 0)
        specs += linear(f"{block}.mlp.up", model.d_ff, E, 0)
        specs += linear(f"{block}.mlp.down", E, model.d_ff, 1, std=out_std)
    if model.block == "decoder":
        specs += norm("norm")
        if not model.tied:
            specs.append(ParamSpec("head.weight", (model.vocab_size, E), split(0), std=std))
    return tuple(specs)


def num_parameters(model: Model, seq_len: int) -> int:
    """Parameters of the whole model, each counted once, without padding."""
    return sum(math.prod(spec.shape) for spec in param_specs(model, Layout(), seq_len))

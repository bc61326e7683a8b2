"""A decoder-only transformer over a mesh.

Norm, attention, norm, MLP, with residuals; covers GPT-2/3, Llama and their relatives by `config.Model`. Each module
holds its rank's slices of its parameters; `model.build` shapes and fills them from `schemes.params`.

    B batch   S sequence   E d_model   F d_ff/T   H heads/T   K kv heads of this rank   D head_dim   V vocabulary/T
"""

from __future__ import annotations

import torch
from torch import nn

from meshwright.comm.collectives import Axis
from meshwright.comm.mesh import World
from meshwright.config.tree import Job, Model
from meshwright.kernels import pointwise
from meshwright.kernels.attention import causal_attention, choose_kernel
from meshwright.parallel.tensor import column_linear, row_linear, vocab_cross_entropy, vocab_embedding
from meshwright.schemes.local import Kernel


class Affine(nn.Module):
    """A weight and, perhaps, a bias; the module that owns it decides how they are applied."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("bias", None)


class Norm(Affine):
    """RMSNorm or LayerNorm; returns the normalised input and the input itself, for the residual path."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.kind, self.eps = model.norm, model.norm_eps

    def forward(self, x_BSE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.kind == "rmsnorm":
            return pointwise.rms_norm(x_BSE, self.weight, self.eps)
        return pointwise.layer_norm(x_BSE, self.weight, self.bias, self.eps)


class Embedding(Affine):
    """Token embedding, its rows split over the tensor axis."""

    def __init__(self, axis: Axis, dtype: torch.dtype, site: str) -> None:
        super().__init__()
        self.axis, self.dtype, self.site = axis, dtype, site

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        return vocab_embedding(tokens_BS, self.weight, self.dtype, self.axis, self.site)


class Positions(Affine):
    """Learned positions, added to the embedding."""

    def forward(self, x_BSE: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
        return pointwise.add_positions(x_BSE, self.weight, positions_S)


class Attention(nn.Module):
    """Causal grouped-query attention: column-parallel query, key and value, row-parallel output."""

    def __init__(self, model: Model, axis: Axis, kernel: Kernel, site: str) -> None:
        super().__init__()
        self.head_dim, self.axis, self.kernel, self.site = model.head_dim, axis, kernel, site
        self.query, self.key, self.value, self.output = Affine(), Affine(), Affine(), Affine()

    def forward(self, h_BSE: torch.Tensor, rotary: torch.Tensor | None) -> torch.Tensor:
        weights, biases = zip(*((p.weight, p.bias) for p in (self.query, self.key, self.value)), strict=True)
        q, k, v = column_linear(h_BSE, weights, biases, self.axis, self.site)
        q, k, v = (self._heads(x) for x in (q, k, v))
        if rotary is not None:
            q = pointwise.rope(q, rotary)
            k = pointwise.rope(k, rotary)
        out_BSHD, _ = causal_attention(q, k, v, self.kernel)
        return row_linear(out_BSHD.flatten(2), self.output.weight, self.output.bias, self.axis, self.site)

    def _heads(self, x_BSF: torch.Tensor) -> torch.Tensor:
        return x_BSF.unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):
    """Column-parallel up (and gate), row-parallel down."""

    def __init__(self, model: Model, axis: Axis, site: str) -> None:
        super().__init__()
        self.axis, self.site = axis, site
        self.gate = Affine() if model.mlp == "gated_silu" else None
        self.up, self.down = Affine(), Affine()

    def forward(self, h_BSE: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            (up,) = column_linear(h_BSE, (self.up.weight,), (self.up.bias,), self.axis, self.site)
            a_BSF = pointwise.gelu(up)
        else:
            weights, biases = (self.gate.weight, self.up.weight), (self.gate.bias, self.up.bias)
            gate, up = column_linear(h_BSE, weights, biases, self.axis, self.site)
            a_BSF = pointwise.gated_silu(gate, up)
        return row_linear(a_BSF, self.down.weight, self.down.bias, self.axis, self.site)


class Block(nn.Module):
    """One layer: attention and MLP, each after a norm and added to the residual stream."""

    def __init__(self, model: Model, axis: Axis, kernel: Kernel, site: str) -> None:
        super().__init__()
        self.attention_norm, self.attention = Norm(model), Attention(model, axis, kernel, f"{site}.attention")
        self.mlp_norm, self.mlp = Norm(model), MLP(model, axis, f"{site}.mlp")

    def forward(self, x_BSE: torch.Tensor, rotary: torch.Tensor | None) -> torch.Tensor:
        h_BSE, x_BSE = self.attention_norm(x_BSE)
        x_BSE = x_BSE + self.attention(h_BSE, rotary)
        h_BSE, x_BSE = self.mlp_norm(x_BSE)
        return x_BSE + self.mlp(h_BSE)


class Head(Affine):
    """Projection to this rank's columns of the vocabulary."""

    def __init__(self, axis: Axis, site: str) -> None:
        super().__init__()
        self.axis, self.site = axis, site

    def forward(self, h_BSE: torch.Tensor) -> torch.Tensor:
        (logits_BSV,) = column_linear(h_BSE, (self.weight,), (None,), self.axis, self.site)
        return logits_BSV


class Loss(nn.Module):
    """Sum of the cross-entropies of the labelled positions."""

    def __init__(self, vocab_size: int, axis: Axis, site: str) -> None:
        super().__init__()
        self.vocab_size, self.axis, self.site = vocab_size, axis, site

    def forward(self, logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        return vocab_cross_entropy(logits_BSV, labels_BS, self.vocab_size, self.axis, self.site)


class Decoder(nn.Module):
    """The whole model on one rank. Parameters are made by `model.build.build`."""

    def __init__(self, job: Job, world: World, dtype: torch.dtype) -> None:
        super().__init__()
        model, axis = job.model, world.axes["tensor"]
        kernel = choose_kernel(job.training.attention, job.training.device, dtype)
        self.config, self.dtype = model, dtype
        self.embedding = Embedding(axis, dtype, "embedding")
        self.positions = Positions() if model.positions == "learned" else None
        self.layers = nn.ModuleList(Block(model, axis, kernel, f"layers.{i}") for i in range(model.layers))
        self.norm = Norm(model)
        self.head = Head(axis, "head")
        self.loss = Loss(model.vocab_size, axis, "loss")

    def logits(self, tokens_BS: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V] of this rank's columns, padding included."""
        config = self.config
        x_BSE = self.embedding(tokens_BS)
        rotary = None
        if self.positions is not None:
            x_BSE = self.positions(x_BSE, positions_S)
        else:
            dtype = pointwise.accumulation_dtype(self.dtype)
            rotary = pointwise.rope_tables(positions_S, config.head_dim, config.rope_theta, dtype)
        for layer in self.layers:
            x_BSE = layer(x_BSE, rotary)
        h_BSE, _ = self.norm(x_BSE)
        return self.head(h_BSE)

    def forward(self, tokens_BS: torch.Tensor, labels_BS: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
        """Sum of the token losses of this rank's micro-batch, a float64 scalar."""
        return self.loss(self.logits(tokens_BS, positions_S), labels_BS)

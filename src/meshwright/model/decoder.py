"""A decoder-only transformer over a mesh.

Norm, attention, norm, MLP, with residuals; covers GPT-2/3, Llama and their relatives by `config.Model`. Each module
holds its rank's slices of its parameters; `model.build` shapes and fills them from `schemes.params`.

    B batch   S sequence   E d_model   F d_ff/T   H heads/T   K kv heads of this rank   D head_dim   V vocabulary/T
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn

from meshwright.comm.collectives import Axis
from meshwright.comm.mesh import World
from meshwright.config.tree import Job, Model
from meshwright.kernels import pointwise
from meshwright.kernels.attention import choose_kernel
from meshwright.parallel import halves
from meshwright.parallel.context import ContextAttention
from meshwright.parallel.halves import Crossing, Half, ModuleShares, Stages, interleaved
from meshwright.parallel.loss import chunked_cross_entropy, vocab_cross_entropy
from meshwright.parallel.recompute import rerun
from meshwright.parallel.sequence import Region
from meshwright.parallel.tensor import column_linear, row_linear, vocab_embedding
from meshwright.schemes.halves import ATTENTION
from meshwright.schemes.tape import Pipeline


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

    def __init__(self, region: Region, dtype: torch.dtype, site: str) -> None:
        super().__init__()
        self.region, self.dtype, self.site = region, dtype, site

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        return vocab_embedding(tokens_BS, self.weight, self.dtype, self.region, self.site)


class Positions(Affine):
    """Learned positions, added to the embedding."""

    def __init__(self, region: Region) -> None:
        super().__init__()
        self.region = region

    def forward(self, x_BSE: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
        return pointwise.add_positions(x_BSE, self.weight, self.region.own(positions_S))


class Attention(nn.Module):
    """Causal grouped-query attention: column-parallel query, key and value, row-parallel output."""

    def __init__(self, model: Model, region: Region, attend: ContextAttention, site: str) -> None:
        super().__init__()
        self.head_dim, self.region, self.attend, self.site = model.head_dim, region, attend, site
        self.query, self.key, self.value, self.output = Affine(), Affine(), Affine(), Affine()

    def forward(
        self,
        h_BSE: torch.Tensor | Half,
        rotary: torch.Tensor | None = None,
        first_BS: torch.Tensor | None = None,
        shares: ModuleShares | None = None,
    ) -> torch.Tensor | Half:
        """The output. With `shares`, of a half-batch: the half that has entered, whose output a later call with it
        returns."""
        if isinstance(h_BSE, Half):
            return h_BSE.finish()
        if shares is not None:
            return Half(self._stages(h_BSE, rotary, first_BS, Crossing.of(self.region, shares)), self.site)
        qkv = list(column_linear(h_BSE, *self._columns, self.region, self.site))
        out_BSF = self._core(qkv, rotary, first_BS)
        return row_linear(out_BSF, self.output.weight, self.output.bias, self.region, self.site)

    def _stages(
        self, h_BSE: torch.Tensor, rotary: torch.Tensor | None, first_BS: torch.Tensor | None, crossing: Crossing
    ) -> Stages:
        h_BSE = halves.begin(h_BSE, crossing, self.site)
        yield
        qkv = list(halves.column_linear(h_BSE, *self._columns, crossing, self.site))
        del h_BSE
        out_BSF = self._core(qkv, rotary, first_BS)
        yield
        y_BSE = halves.row_linear(out_BSF, self.output.weight, crossing, self.site)
        del out_BSF
        yield
        return halves.finish(y_BSE, self.output.bias, crossing, self.site)

    @property
    def _columns(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...]]:
        """Weights and biases of query, key and value."""
        layers = self.query, self.key, self.value
        return tuple(layer.weight for layer in layers), tuple(layer.bias for layer in layers)

    def _core(
        self, qkv: list[torch.Tensor], rotary: torch.Tensor | None, first_BS: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention's output [B, S, H·D]. The list is emptied, so that no caller keeps alive what is replaced."""
        for i, x_BSF in enumerate(qkv):
            qkv[i] = x_BSF.unflatten(-1, (-1, self.head_dim))
            del x_BSF
        if rotary is not None:
            for i in range(2):
                qkv[i] = pointwise.rope(qkv[i], rotary)
        return self.attend(qkv, self.site, first_BS).flatten(2)


class MLP(nn.Module):
    """Column-parallel up (and gate), row-parallel down."""

    def __init__(self, model: Model, region: Region, site: str) -> None:
        super().__init__()
        self.region, self.site = region, site
        self.gate = Affine() if model.mlp == "gated_silu" else None
        self.up, self.down = Affine(), Affine()

    def forward(self, h_BSE: torch.Tensor | Half, shares: ModuleShares | None = None) -> torch.Tensor | Half:
        """As of `Attention`."""
        if isinstance(h_BSE, Half):
            return h_BSE.finish()
        if shares is not None:
            return Half(self._stages(h_BSE, Crossing.of(self.region, shares)), self.site)
        columns = column_linear(h_BSE, *self._columns, self.region, self.site)
        a_BSF = self._activate(columns)
        return row_linear(a_BSF, self.down.weight, self.down.bias, self.region, self.site)

    def _stages(self, h_BSE: torch.Tensor, crossing: Crossing) -> Stages:
        h_BSE = halves.begin(h_BSE, crossing, self.site)
        yield
        columns = halves.column_linear(h_BSE, *self._columns, crossing, self.site)
        del h_BSE
        a_BSF = self._activate(columns)
        del columns
        yield
        y_BSE = halves.row_linear(a_BSF, self.down.weight, crossing, self.site)
        del a_BSF
        yield
        return halves.finish(y_BSE, self.down.bias, crossing, self.site)

    @property
    def _columns(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...]]:
        """Weights and biases of gate and up, or of up alone."""
        layers = (self.up,) if self.gate is None else (self.gate, self.up)
        return tuple(layer.weight for layer in layers), tuple(layer.bias for layer in layers)

    def _activate(self, columns: Sequence[torch.Tensor]) -> torch.Tensor:
        return pointwise.gelu(*columns) if self.gate is None else pointwise.gated_silu(*columns)


class Block(nn.Module):
    """One layer: attention and MLP, each after a norm and added to the residual stream.

    `rerun`: only its input is kept, and backward computes it again. `halves`: it runs in two half-batches.
    """

    def __init__(
        self, model: Model, region: Region, attend: ContextAttention, site: str, *, rerun: bool, halves: bool
    ) -> None:
        super().__init__()
        self.rerun, self.halves = rerun, halves
        self.attention_norm, self.attention = Norm(model), Attention(model, region, attend, f"{site}.attention")
        self.mlp_norm, self.mlp = Norm(model), MLP(model, region, f"{site}.mlp")

    def forward(
        self, x_BSE: torch.Tensor, rotary: torch.Tensor | None, first_BS: torch.Tensor | None = None
    ) -> torch.Tensor:
        run = functools.partial(self._run_halves if self.halves else self._run, first_BS=first_BS)
        return rerun(run, x_BSE, rotary) if self.rerun else run(x_BSE, rotary)

    def _run(
        self, x_BSE: torch.Tensor, rotary: torch.Tensor | None, first_BS: torch.Tensor | None = None
    ) -> torch.Tensor:
        h_BSE, x_BSE = self.attention_norm(x_BSE)
        x_BSE = x_BSE + self.attention(h_BSE, rotary, first_BS)
        h_BSE, x_BSE = self.mlp_norm(x_BSE)
        return x_BSE + self.mlp(h_BSE)

    def _run_halves(
        self, x_BSE: torch.Tensor, rotary: torch.Tensor | None, first_BS: torch.Tensor | None = None
    ) -> torch.Tensor:
        count = min(2, len(x_BSE))
        firsts = [None] * count if first_BS is None else first_BS.chunk(count)
        shares = [ModuleShares(count), ModuleShares(count)]

        def enter(x_BSE: torch.Tensor, half: int, branch: int) -> tuple[Half, torch.Tensor]:
            if branch == ATTENTION:
                h_BSE, x_BSE = self.attention_norm(x_BSE)
                return self.attention(h_BSE, rotary, firsts[half], shares[branch]), x_BSE
            h_BSE, x_BSE = self.mlp_norm(x_BSE)
            return self.mlp(h_BSE, shares[branch]), x_BSE

        def leave(half: Half, branch: int) -> torch.Tensor:
            return self.attention(half) if branch == ATTENTION else self.mlp(half)

        return interleaved(x_BSE, count, enter, leave)


class Head(Affine):
    """Projection to this rank's columns of the vocabulary; its weight is given, for it may be the embedding's."""

    def __init__(self, region: Region, site: str) -> None:
        super().__init__()
        self.region, self.site = region, site

    def forward(self, h_BSE: torch.Tensor, weight_VE: torch.Tensor) -> torch.Tensor:
        (logits_BSV,) = column_linear(h_BSE, (weight_VE,), (None,), self.region, self.site)
        return logits_BSV


class Loss(nn.Module):
    """Sum of the cross-entropies of the labelled positions."""

    def __init__(self, vocab_size: int, axis: Axis, site: str) -> None:
        super().__init__()
        self.vocab_size, self.axis, self.site = vocab_size, axis, site

    def forward(self, logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        return vocab_cross_entropy(logits_BSV, labels_BS, self.vocab_size, self.axis, self.site)


class ChunkedLoss(nn.Module):
    """The same from the head's input: the head is applied inside, to some tokens at a time."""

    def __init__(self, vocab_size: int, chunk: int, head: Head, site: str) -> None:
        super().__init__()
        self.vocab_size, self.chunk, self.region, self.sites = vocab_size, chunk, head.region, (head.site, site)

    def forward(self, h_BSE: torch.Tensor, labels_BS: torch.Tensor, weight_VE: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(h_BSE, weight_VE, labels_BS, self.vocab_size, self.chunk, self.region, self.sites)


class Decoder(nn.Module):
    """The whole model on one rank. Parameters are made by `model.build.build`."""

    def __init__(self, job: Job, world: World, dtype: torch.dtype) -> None:
        super().__init__()
        model, layout = job.model, job.layout
        region = Region(world.axes["tensor"], split=layout.sequence_parallel, pipeline=Pipeline.of(layout))
        attend = ContextAttention(
            ulysses=world.axes["ulysses"],
            ring=world.axes["ring"],
            order=layout.ring_order,
            kernel=choose_kernel(job.training.attention, job.training.device, dtype, model.head_dim),
            recompute=layout.recompute == "selective",
        )
        self.config, self.dtype = model, dtype
        self.embedding = Embedding(region, dtype, "embedding")
        self.positions = Positions(region) if model.positions == "learned" else None
        full = layout.recompute == "full"
        halved = layout.halves
        blocks = (Block(model, region, attend, f"layers.{i}", rerun=full, halves=halved) for i in range(model.layers))
        self.layers = nn.ModuleList(blocks)
        self.norm = Norm(model)
        self.head = Head(region, "head")
        self.loss: Loss | ChunkedLoss
        if job.training.loss_chunk:
            self.loss = ChunkedLoss(model.vocab_size, job.training.loss_chunk, self.head, "loss")
        else:
            self.loss = Loss(model.vocab_size, region.axis, "loss")

    def logits(
        self, tokens_BS: torch.Tensor, positions_S: torch.Tensor, first_BS: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [B, S, V] of this rank's columns, padding included."""
        return self.head(self.hidden(tokens_BS, positions_S, first_BS), self._head_weight())

    def hidden(
        self, tokens_BS: torch.Tensor, positions_S: torch.Tensor, first_BS: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The head's input [B, S, E], or this rank's part [B, S/T, E] of it."""
        config = self.config
        x_BSE = self.embedding(tokens_BS)
        rotary = None
        if self.positions is not None:
            x_BSE = self.positions(x_BSE, positions_S)
        else:
            dtype = pointwise.accumulation_dtype(self.dtype)
            rotary = pointwise.rope_tables(positions_S, config.head_dim, config.rope_theta, config.rope_scaling, dtype)
        for layer in self.layers:
            x_BSE = layer(x_BSE, rotary, first_BS)
        h_BSE, _ = self.norm(x_BSE)
        return h_BSE

    def forward(
        self,
        tokens_BS: torch.Tensor,
        labels_BS: torch.Tensor,
        positions_S: torch.Tensor,
        first_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum of the token losses of this rank's micro-batch, a float64 scalar.

        `first_BS` [B, U·S]: where the document of each token that this rank attends for begins; None if it does not
        matter.
        """
        h_BSE, weight_VE = self.hidden(tokens_BS, positions_S, first_BS), self._head_weight()
        if isinstance(self.loss, ChunkedLoss):
            return self.loss(h_BSE, labels_BS, weight_VE)
        return self.loss(self.head(h_BSE, weight_VE), labels_BS)

    def _head_weight(self) -> torch.Tensor:
        return _handing_over(self.embedding.weight) if self.config.tied else self.head.weight


def _handing_over(table: torch.Tensor) -> torch.Tensor:
    """The embedding's table for the head of a tied model, as a leaf of its own.

    Each share of the gradient is then added to the table's `.grad` as it comes, instead of the head's waiting in the
    engine for the embedding's through the whole backward pass. The embedding's comes last: then the table's is final.
    """
    if not torch.is_grad_enabled():
        return table
    alias = table.detach().requires_grad_()

    def hand_over(leaf: torch.Tensor) -> None:
        assert leaf.grad is not None
        table.grad = leaf.grad if table.grad is None else table.grad.add_(leaf.grad)
        leaf.grad = None

    alias.register_post_accumulate_grad_hook(hand_over)
    return alias


def units(model: Decoder) -> dict[str, nn.Module]:
    """The parts of a decoder in the order in which they run, by name; each layer is one."""
    parts: dict[str, nn.Module] = {name: module for name, module in model.named_children() if name != "layers"}
    layers = {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
    first = [name for name in ("embedding", "positions") if name in parts]
    return {**{name: parts.pop(name) for name in first}, **layers, **parts}

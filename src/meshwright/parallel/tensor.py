"""Megatron tensor parallelism (Shoeybi et al. 2019, section 3), executed.

    B batch   S sequence   E d_model   F features out   T tensor degree   V vocabulary, padded to a multiple of T

What each operation splits, sends and saves is `schemes.tensor`; this file does it. Weights are [out, in] in the master
dtype and are cast to the dtype of the activations at each use, so that no cast copy outlives its matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from meshwright.comm.collectives import Axis
from meshwright.comm.conjugates import reduce_from
from meshwright.comm.scope import scope
from meshwright.kernels.pointwise import accumulation_dtype

IGNORE = -100
"""Label of a position that is not trained on."""


def column_linear(
    x_BSE: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    axis: Axis,
    site: str,
) -> tuple[torch.Tensor, ...]:
    """Column-parallel linear layers that share an input (query, key and value; gate and up).

    x_BSE   [B, S, E]       the same on every rank
    w_FE    [F/T, E] each   this rank's columns of the layer, rows of the stored weight
    forward   y_BSF = x_BSE @ w_FE.T + b_F                         sends nothing
    dgrad     dx_BSE = all_reduce(Σ dy_BSF @ w_FE)                 sends B·S·E, while the weight gradients are computed
    wgrad     dw_FE = dy_BSF.T @ x_BSE                             sends nothing
    saved     x_BSE
    """
    return _Linear.apply(x_BSE, _none(axis), axis, site, len(weights), *weights, *biases)


def row_linear(
    x_BSF: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, axis: Axis, site: str
) -> torch.Tensor:
    """Row-parallel linear layer.

    x_BSF   [B, S, F/T]     this rank's slice of the features
    w_EF    [E, F/T]        this rank's rows of the layer, columns of the stored weight
    forward   y_BSE = all_reduce(x_BSF @ w_EF.T) + b_E          sends B·S·E
    dgrad     dx_BSF = dy_BSE @ w_EF                            sends nothing
    wgrad     dw_EF = dy_BSE.T @ x_BSF,  db_E = Σ dy_BSE        sends nothing
    saved     x_BSF
    """
    (y_BSE,) = _Linear.apply(x_BSF, axis, _none(axis), site, 1, weight, bias)
    return y_BSE


def _none(axis: Axis) -> Axis:
    """The axis with one rank on it: nothing is sent."""
    return Axis(axis.name)


class _Linear(torch.autograd.Function):
    """Local linear layers on one input: outputs summed over `outputs_over`, the input's gradient over `inputs_over`.

    The two sums are Megatron's conjugates g and f (see `comm.conjugates`), fused here with the products they belong to.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, outputs_over: Axis, inputs_over: Axis, site: str, count: int, *parameters: Any
    ) -> Any:
        weights, biases = parameters[:count], parameters[count:]
        ctx.inputs_over, ctx.site, ctx.biased = inputs_over, site, tuple(b is not None for b in biases)
        ctx.save_for_backward(x, *weights)
        x_2d = x.flatten(0, 1)
        outputs = []
        for weight, bias in zip(weights, biases, strict=True):
            y = outputs_over.all_reduce(torch.mm(x_2d, weight.to(x.dtype).T), site=site).wait()
            outputs.append((y if bias is None else y.add_(bias)).view(*x.shape[:2], -1))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        x_2d, dys_2d = x.flatten(0, 1), [dy.flatten(0, 1) for dy in dys]
        dx = torch.mm(dys_2d[0], weights[0].to(x.dtype))
        for dy, weight in zip(dys_2d[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight.to(x.dtype))
        with scope(ctx.site, "backward"):
            pending = ctx.inputs_over.all_reduce(dx, site=ctx.site)
            dtype = weights[0].dtype
            dws = [torch.mm(dy.T, x_2d).to(dtype) for dy in dys_2d]
            dbs = [dy.sum(dim=0, dtype=dtype) if b else None for dy, b in zip(dys_2d, ctx.biased, strict=True)]
            pending.wait()
        return dx.view(x.shape), None, None, None, None, *dws, *dbs


def vocab_embedding(
    tokens_BS: torch.Tensor, weight_VE: torch.Tensor, dtype: torch.dtype, axis: Axis, site: str
) -> torch.Tensor:
    """Embedding whose rows are split over the axis.

    weight_VE [V/T, E]        this rank's rows of the table
    forward   y_BSE = all_reduce(rows of this rank, zeros elsewhere)    sends B·S·E in the compute dtype
              (exact: one rank has the row)
    wgrad     dw[token] += dy                                           sends nothing
    saved     this rank's row indices [B, S], and which of them are its own if T > 1
    """
    y_BSE = _Embedding.apply(tokens_BS, weight_VE, dtype, axis)
    return reduce_from(y_BSE, axis, site)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, axis: Axis) -> torch.Tensor:
        ctx.num_rows, ctx.dtype = weight.shape[0], weight.dtype
        if axis.size == 1:
            ctx.save_for_backward(tokens)
            return torch.embedding(weight, tokens).to(dtype)
        rows, foreign = _own_rows(tokens, ctx.num_rows, axis)
        ctx.save_for_backward(rows, foreign)
        return torch.embedding(weight, rows).masked_fill_(foreign.unsqueeze(-1), 0).to(dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        rows, *foreign = ctx.saved_tensors
        dy = dy.to(ctx.dtype)
        if foreign:
            dy = dy.masked_fill(foreign[0].unsqueeze(-1), 0)
        return None, torch.ops.aten.embedding_dense_backward(dy, rows, ctx.num_rows, -1, False), None, None


def _own_rows(tokens: torch.Tensor, num_rows: int, axis: Axis) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices into this rank's rows (0 where another rank has the row), and where that is."""
    rows = tokens - axis.rank * num_rows
    foreign = (rows < 0).logical_or_(rows >= num_rows)
    return rows.masked_fill_(foreign, 0), foreign


def vocab_cross_entropy(
    logits_BSV: torch.Tensor, labels_BS: torch.Tensor, vocab_size: int, axis: Axis, site: str
) -> torch.Tensor:
    """Sum of the cross-entropies of all labelled positions, from logits split over the vocabulary.

    logits_BSV [B, S, V/T]    this rank's columns; columns at or above `vocab_size` are padding
    labels_BS  [B, S]         global token numbers, IGNORE where there is none
    forward   m = all_reduce_max(max logits)                                     sends B·S
              (Σexp, target) = all_reduce(Σ exp(logits - m), own target logit)   sends 2·B·S
              loss = Σ (log Σexp + m - target), a float64 scalar
    dgrad     dlogits = softmax - onehot, times the gradient of the loss         sends nothing
    saved     logits, log-sum-exp, labels
    """
    return _CrossEntropy.apply(logits_BSV, labels_BS, vocab_size, axis, site)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, axis: Axis, site: str) -> Any:
        num_columns = logits.shape[-1]
        ctx.axis, ctx.num_own = axis, min(max(vocab_size - axis.rank * num_columns, 0), num_columns)
        dtype = accumulation_dtype(logits.dtype)
        if ctx.num_own:
            maximum = logits[..., : ctx.num_own].amax(dim=-1).to(dtype)
        else:
            maximum = logits.new_full(labels.shape, -torch.inf, dtype=dtype)
        axis.all_reduce(maximum, site=site, reduction="max").wait()
        packed = logits.new_empty((2, *labels.shape), dtype=dtype)
        torch.sum(_exponentials(logits, maximum, ctx.num_own), dim=-1, out=packed[0])
        column, foreign = _own_rows(labels, num_columns, axis)
        packed[1] = logits.gather(-1, column.unsqueeze(-1)).squeeze(-1).masked_fill_(foreign, 0)
        axis.all_reduce(packed, site=site).wait()
        lse = maximum.add_(packed[0].log_())
        ctx.save_for_backward(logits, lse, labels)
        return (lse - packed[1]).masked_fill_(labels == IGNORE, 0).sum(dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> Any:
        logits, lse, labels = ctx.saved_tensors
        dlogits = _exponentials(logits, lse, ctx.num_own)
        column, foreign = _own_rows(labels, logits.shape[-1], ctx.axis)
        dlogits.scatter_add_(-1, column.unsqueeze(-1), foreign.to(dlogits.dtype).sub_(1).unsqueeze(-1))
        scale = dloss.to(dlogits.dtype).expand(labels.shape).masked_fill(labels == IGNORE, 0)
        return dlogits.mul_(scale.unsqueeze(-1)).to(logits.dtype), None, None, None, None


def _exponentials(logits: torch.Tensor, shift: torch.Tensor, num_own: int) -> torch.Tensor:
    """exp(logits - shift) in float32, zero in padding columns."""
    exponentials = (logits - shift.unsqueeze(-1)).exp_()
    exponentials[..., num_own:].zero_()
    return exponentials

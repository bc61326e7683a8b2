"""Cross-entropy over a vocabulary that ranks divide (Shoeybi et al. 2019, section 3), whole or chunk by chunk.

    B batch   S sequence   N = B·S   E d_model   V vocabulary, padded to a multiple of T   T tensor degree   C chunk

What each sends and keeps is `schemes.loss`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from meshwright.comm.collectives import Axis
from meshwright.comm.scope import scope
from meshwright.kernels.pointwise import accumulation_dtype
from meshwright.parallel.sequence import Region
from meshwright.parallel.tensor import own_rows

IGNORE = -100
"""Label of a position that is not trained on."""


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
    return _CrossEntropy.apply(logits_BSV, labels_BS, _Columns.own(vocab_size, logits_BSV.shape[-1], axis, site))


def chunked_cross_entropy(
    h_BSE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_BS: torch.Tensor,
    vocab_size: int,
    chunk: int,
    region: Region,
    sites: tuple[str, str],
) -> torch.Tensor:
    """The same of logits = enter(h) @ weight.T, of which only `chunk` tokens' exist at a time.

    h_BSE     [B, S, E]       the head's input; [B, S/T, E] of a region that is split
    weight_VE [V/T, E]        this rank's rows of the head
    sites     those of the head (its input's communication) and of the loss
    forward   of each chunk the loss as above, then at once dlogits, dh = dlogits @ weight and dw += dlogits.T @ h,
              for a gradient of the loss of 1                sends 3·N float32 in two calls a chunk; B·S·E if split
    dgrad     leave(dh times the gradient of the loss)       sends B·S·E
    wgrad     dw times the gradient of the loss              sends nothing
    saved     dh [N, E] and dw [V/T, E] float32, instead of logits [N, V/T]: no product is computed twice
    """
    columns = _Columns.own(vocab_size, weight_VE.shape[0], region.axis, sites[1])
    needs_gradients = torch.is_grad_enabled()
    return _ChunkedCrossEntropy.apply(h_BSE, weight_VE, labels_BS, columns, chunk, region, sites[0], needs_gradients)


class _Columns(NamedTuple):
    """This rank's columns of the vocabulary, and the ranks that have the others."""

    num_columns: int
    num_own: int
    """Those that are not padding."""
    axis: Axis
    site: str

    @classmethod
    def own(cls, vocab_size: int, num_columns: int, axis: Axis, site: str) -> _Columns:
        return cls(num_columns, min(max(vocab_size - axis.rank * num_columns, 0), num_columns), axis, site)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-sum-exp of each row over all ranks' columns, and the sum of the labelled rows' losses."""
        dtype = accumulation_dtype(logits.dtype)
        if self.num_own:
            maximum = logits[..., : self.num_own].amax(dim=-1).to(dtype)
        else:
            maximum = logits.new_full(labels.shape, -torch.inf, dtype=dtype)
        self.axis.all_reduce(maximum, site=self.site, reduction="max").wait()
        packed = logits.new_empty((2, *labels.shape), dtype=dtype)
        torch.sum(self._exponentials(logits, maximum), dim=-1, out=packed[0])
        column, foreign = own_rows(labels, self.num_columns, self.axis)
        packed[1] = logits.gather(-1, column.unsqueeze(-1)).squeeze(-1).masked_fill_(foreign, 0)
        self.axis.all_reduce(packed, site=self.site).wait()
        lse = maximum.add_(packed[0].log_())
        return lse, (lse - packed[1]).masked_fill_(labels == IGNORE, 0).sum(dtype=torch.float64)

    def gradient(
        self, logits: torch.Tensor, lse: torch.Tensor, labels: torch.Tensor, dloss: torch.Tensor
    ) -> torch.Tensor:
        """(softmax - onehot) · dloss, zero in rows without a label and in padding columns."""
        dlogits = self._exponentials(logits, lse)
        column, foreign = own_rows(labels, self.num_columns, self.axis)
        dlogits.scatter_add_(-1, column.unsqueeze(-1), foreign.to(dlogits.dtype).sub_(1).unsqueeze(-1))
        scale = dloss.to(dlogits.dtype).expand(labels.shape).masked_fill(labels == IGNORE, 0)
        return dlogits.mul_(scale.unsqueeze(-1)).to(logits.dtype)

    def _exponentials(self, logits: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """exp(logits - shift) in float32, zero in padding columns."""
        exponentials = (logits - shift.unsqueeze(-1)).exp_()
        exponentials[..., self.num_own :].zero_()
        return exponentials


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, columns: _Columns) -> Any:
        ctx.columns = columns
        lse, loss = columns.loss(logits, labels)
        ctx.save_for_backward(logits, lse, labels)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> Any:
        logits, lse, labels = ctx.saved_tensors
        return ctx.columns.gradient(logits, lse, labels, dloss), None, None


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        columns: _Columns,
        chunk: int,
        region: Region,
        head_site: str,
        needs_gradients: bool,
    ) -> torch.Tensor:
        with scope(head_site):
            x = region.enter(h, head_site).wait()
        ctx.region, ctx.head_site, ctx.shape, ctx.dtype = region, head_site, x.shape, weight.dtype
        x_NE, labels_N, w_VE = x.flatten(0, 1), labels.flatten(), weight.to(x.dtype)
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        gradients = _Gradients.zeros(x_NE, weight) if needs_gradients else None
        for start in range(0, len(x_NE), chunk):
            rows = slice(start, start + chunk)
            total += _one_chunk(x_NE[rows], w_VE, labels_N[rows], columns, gradients, rows)
        if gradients is not None:
            ctx.save_for_backward(gradients.dx_NE, gradients.dw_VE)
        return total

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor) -> Any:
        dx_NE, dw_VE = ctx.saved_tensors
        dloss = dloss.to(dw_VE.dtype)
        dx = dx_NE.to(dw_VE.dtype).mul_(dloss).to(dx_NE.dtype).view(ctx.shape)
        with scope(ctx.head_site, "backward"):
            leaving = ctx.region.leave(dx, ctx.head_site)
            del dx
            dh = leaving.wait()
        return dh, dw_VE.mul_(dloss).to(ctx.dtype), None, None, None, None, None, None


class _Gradients(NamedTuple):
    """Of the head's input and weight, for a gradient of the loss of `one`."""

    dx_NE: torch.Tensor
    dw_VE: torch.Tensor
    one: torch.Tensor

    @classmethod
    def zeros(cls, x_NE: torch.Tensor, weight: torch.Tensor) -> _Gradients:
        dw_VE = torch.zeros_like(weight, dtype=accumulation_dtype(weight.dtype))
        return cls(torch.empty_like(x_NE), dw_VE, weight.new_ones((), dtype=torch.float64))


def _one_chunk(
    x_CE: torch.Tensor,
    w_VE: torch.Tensor,
    labels_C: torch.Tensor,
    columns: _Columns,
    gradients: _Gradients | None,
    rows: slice,
) -> torch.Tensor:
    """The chunk's loss; its gradients are added to `gradients`."""
    logits = torch.mm(x_CE, w_VE.T)
    lse, loss = columns.loss(logits, labels_C)
    if gradients is None:
        return loss
    with scope(phase="backward"):
        dlogits = columns.gradient(logits, lse, labels_C, gradients.one)
        del logits, lse
        torch.mm(dlogits, w_VE, out=gradients.dx_NE[rows])
        if gradients.dw_VE.dtype == dlogits.dtype:
            gradients.dw_VE.addmm_(dlogits.T, x_CE)
        else:
            gradients.dw_VE.add_(torch.mm(dlogits.T, x_CE))
    return loss

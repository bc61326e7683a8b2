"""Norms, rotary embedding and gated activation, as autograd functions of our own.

torch's versions save different tensors on a CPU than on a GPU; these save the same everywhere, so that the account of a
step does not depend on the device. Everything is computed in float32 (float64 for float64 inputs); inputs and outputs
are in the compute dtype; parameters and their gradients are in the master dtype, or, gathered, in the compute dtype.

    B batch   S sequence   E d_model   F d_ff (this rank's)   N heads   D head_dim
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from meshwright.config.tree import RopeScaling


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x_BSE: torch.Tensor, w_E: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square norm (Zhang and Sennrich 2019), and `x` itself for the residual path.

    forward   h = x · rstd · w, rstd = 1/sqrt(mean(x²) + eps)
    dgrad     with g = dh·w and x̂ = x·rstd: dx = rstd·(g - x̂·mean(g·x̂)) + the gradient of the residual path
    wgrad     dw = Σ dh·x̂
    saved     x, and rstd of one float32 a row

    Returning `x` lets the two gradients of the residual stream meet here, in place, instead of in a new tensor.
    """
    return _RMSNorm.apply(x_BSE, w_E, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, eps: float) -> Any:
        ctx.set_materialize_grads(False)
        dtype = accumulation_dtype(x.dtype)
        rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        rstd.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, w, rstd)
        return (x * rstd).mul_(w).to(x.dtype), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dh: torch.Tensor, dresidual: torch.Tensor | None) -> Any:
        x, w, rstd = ctx.saved_tensors
        dx, dw = _normalised_backward(dh, x * rstd, w, rstd, dresidual, centred=False)
        return dx, dw.to(w.dtype), None


def layer_norm(
    x_BSE: torch.Tensor, w_E: torch.Tensor, b_E: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer norm (Ba et al. 2016), and `x` itself for the residual path (see `rms_norm`).

    forward   h = (x - mean) · rstd · w + b
    dgrad     with g = dh·w and x̂ = (x - mean)·rstd: dx = rstd·(g - mean(g) - x̂·mean(g·x̂)) + the residual's gradient
    wgrad     dw = Σ dh·x̂,  db = Σ dh
    saved     x, mean and rstd of one float32 a row each
    """
    return _LayerNorm.apply(x_BSE, w_E, b_E, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, eps: float) -> Any:
        ctx.set_materialize_grads(False)
        dtype = accumulation_dtype(x.dtype)
        mean = x.mean(dim=-1, keepdim=True, dtype=dtype)
        h = x - mean
        rstd = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
        rstd.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        h.mul_(rstd).mul_(w)
        if b is not None:
            h.add_(b)
        ctx.save_for_backward(x, w, mean, rstd)
        ctx.biased = b is not None
        return h.to(x.dtype), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dh: torch.Tensor, dresidual: torch.Tensor | None) -> Any:
        x, w, mean, rstd = ctx.saved_tensors
        db = dh.sum(dim=(0, 1), dtype=rstd.dtype) if ctx.biased else None
        dx, dw = _normalised_backward(dh, (x - mean).mul_(rstd), w, rstd, dresidual, centred=True)
        return dx, dw.to(w.dtype), None if db is None else db.to(w.dtype), None


def _normalised_backward(
    dh: torch.Tensor,
    x_hat: torch.Tensor,
    w: torch.Tensor,
    rstd: torch.Tensor,
    dresidual: torch.Tensor | None,
    *,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of input and weight from the normalised input `x_hat`, which is overwritten."""
    g = dh * x_hat
    dw = g.sum(dim=(0, 1))
    torch.mul(dh, w, out=g)
    if centred:
        g.sub_(g.mean(dim=-1, keepdim=True))
    projection = torch.linalg.vecdot(g, x_hat).unsqueeze(-1).div_(x_hat.shape[-1])
    g.sub_(x_hat.mul_(projection)).mul_(rstd)
    if dresidual is not None:
        g.add_(dresidual)
    return g.to(dh.dtype), dw


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling, device: torch.device | None = None
) -> torch.Tensor:
    """Rotary angle of each pair of features from one position to the next [D/2], in float64.

    Scaled as in Llama 3.1, by how often a pair turns within the original positions: at least high_freq_factor times
    keeps its frequency, at most low_freq_factor times divides it by the factor, and between it is interpolated.
    """
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim
    frequencies = theta**-exponents
    if scaling.factor == 1:
        return frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = frequencies * (scaling.original_positions / (2 * math.pi))
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rope_tables(
    positions_S: torch.Tensor, head_dim: int, theta: float, scaling: RopeScaling, dtype: torch.dtype
) -> torch.Tensor:
    """Cosines and sines [2, S, 1, D/2] of the rotary angles at global positions (Su et al. 2021)."""
    frequencies = rope_frequencies(head_dim, theta, scaling, positions_S.device)
    angles = positions_S[:, None].to(torch.float64) * frequencies
    return torch.stack((angles.cos(), angles.sin())).to(dtype)[:, :, None, :]


def rope(x_BSND: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Rotate each head by its position's angles; the two halves of a head are the pairs (as in Llama).

    forward   y = (a·cos - b·sin, b·cos + a·sin) with x = (a, b)
    dgrad     the rotation by the opposite angle
    saved     the tables, shared by all layers
    """
    return _Rope.apply(x_BSND, tables)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    y = torch.empty_like(x)
    half = x.shape[-1] // 2
    y[..., :half] = (a * cos).addcmul_(b, sin, value=-sign)
    y[..., half:] = (b * cos).addcmul_(a, sin, value=sign)
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tables)
        return _rotate(x, tables[0], tables[1], 1)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (tables,) = ctx.saved_tensors
        return _rotate(dy, tables[0], tables[1], -1), None


def add_positions(x_BSE: torch.Tensor, table_PE: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
    """Add rows of a learned table at global positions.

    forward   y = x + table[positions]
    wgrad     dtable[positions] = Σ_B dy
    saved     the positions
    """
    return _AddPositions.apply(x_BSE, table_PE, positions_S)


class _AddPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(positions)
        ctx.table_shape, ctx.table_dtype = table.shape, table.dtype
        return x + table.index_select(0, positions).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        (positions,) = ctx.saved_tensors
        dtype = accumulation_dtype(ctx.table_dtype)
        dtable = dy.new_zeros(ctx.table_shape, dtype=dtype)
        dtable.index_add_(0, positions, dy.sum(dim=0, dtype=dtype))
        return dy, dtable.to(ctx.table_dtype), None


def gated_silu(gate_BSF: torch.Tensor, up_BSF: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up (Shazeer 2020).

    dgrad     dgate = silu'(gate)·up·da,  dup = silu(gate)·da
    saved     gate and up; silu(gate) is computed again
    """
    return _GatedSilu.apply(gate_BSF, up_BSF)


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, da: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(da * up, gate)
        return dgate, F.silu(gate).mul_(da)


def gelu(x_BSF: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form (Hendrycks and Gimpel 2016). Saved: x."""
    return F.gelu(x_BSF, approximate="tanh")

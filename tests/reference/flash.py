"""How flash attention is judged: by FlashAttention's own rule, which compares it with PyTorch in the same precision.

    max|ours - exact| <= 2·max|naive - exact| + 1e-6        for the output and every gradient; exact is float64

The log-sum-exp is float32 whatever the inputs are, and is judged as such. What a mask leaves empty must be so exactly.
Gradients through the scores have as much room as one rounding of a term in float32: where a query sees one key, the
naive one is 0 without any error, while dout·v - rowsum(dout ∘ out) are two sums in different orders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from meshwright.kernels.flash_attention import flash_backward, flash_forward
from meshwright.kernels.reference import naive_attention, seen, tiled_attention, tiled_attention_backward

ROUNDING = 1e-6
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Problem:
    """Shapes and mask of one call."""

    S: int = 40
    Z: int = 40
    H: int = 2
    K: int = 1
    D: int = 16
    causal: bool = True
    offset: int = 0
    B: int = 1

    @property
    def mask(self) -> dict[str, Any]:
        return {"causal": self.causal, "offset": self.offset}

    def tensors(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[torch.Tensor]:
        """q, k, v and dout."""
        generator = torch.Generator().manual_seed(seed)
        lengths = (self.S, self.H), (self.Z, self.K), (self.Z, self.K), (self.S, self.H)
        shapes = [(self.B, n, h, self.D) for n, h in lengths]
        return [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]

    def seen(self, device: torch.device) -> torch.Tensor:
        return seen(range(self.S), range(self.Z), self.causal, self.offset, device)


class Results(NamedTuple):
    """What attention gives for q, k, v and dout."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, **mask: Any) -> Results:
    """By our kernels."""
    out, lse = flash_forward(q, k, v, **mask)
    return Results(out, lse, *flash_backward(dout, q, k, v, out, lse, **mask))


def naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, dtype: torch.dtype, **mask: Any
) -> Results:
    """By plain PyTorch in some precision."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out, lse = naive_attention(*leaves, **mask)
    return Results(out.detach(), lse, *torch.autograd.grad(out, leaves, dout.to(dtype)))


def assert_flash(
    problem: Problem,
    dtype: torch.dtype,
    device: torch.device,
    operation: Callable[..., Results] = flash,
    given: list[torch.Tensor] | None = None,
    peer: Callable[..., Results] | None = None,
) -> Results:
    """Judge one call, forward and backward; `given` are q, k, v, dout where their storage matters."""
    given = given or problem.tensors(dtype, device)
    found = operation(*given, **problem.mask)
    _assert_shapes(found, given, dtype)
    _assert_empty(found, problem, device)
    assert_judged(found, given, peer or naive, **problem.mask)
    return found


def tiled(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, dtype: torch.dtype, **mask: Any
) -> Results:
    """By the kernels' textbook in plain PyTorch, in some precision."""
    q, k, v, dout = (x.to(dtype) for x in (q, k, v, dout))
    out, lse = tiled_attention(q, k, v, **mask)
    return Results(out, lse, *tiled_attention_backward(dout, q, k, v, out, lse, **mask))


def assert_judged(found: Results, given: list[torch.Tensor], peer: Callable[..., Results] = naive, **mask: Any) -> None:
    """The rule, for each of the results; `peer` is what they are compared with."""
    exact = naive(*given, torch.float64, **mask)
    same_precision = peer(*given, given[0].dtype, **mask)._replace(lse=peer(*given, torch.float32, **mask).lse)
    for name, ours, theirs, right in zip(Results._fields, found, same_precision, exact, strict=True):
        finite = right.isfinite()
        assert torch.equal(ours.isfinite(), finite), f"{name}: infinite or nan elsewhere"
        error, allowed = worst(ours[finite], right[finite]), 2 * worst(theirs[finite], right[finite]) + ROUNDING
        if name in ("dq", "dk"):
            allowed += _one_rounding(*given)
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def _one_rounding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> float:
    """Of the largest product dout·v, times the largest element that it is multiplied with."""
    if not k.numel():
        return 0.0
    gradient = dout.float().norm(dim=-1).max() * v.float().norm(dim=-1).max()
    return (torch.finfo(torch.float32).eps * gradient * max(x.abs().max() for x in (q, k)) * q.shape[-1] ** -0.5).item()


def worst(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error of an element."""
    return (found.double() - exact).abs().max().item() if exact.numel() else 0.0


def _assert_shapes(found: Results, given: list[torch.Tensor], dtype: torch.dtype) -> None:
    q, k, v, _ = given
    B, S, H, _ = q.shape
    assert [(x.shape, x.dtype) for x in found] == [
        (q.shape, dtype),
        ((B, H, S), torch.float32),
        *((x.shape, dtype) for x in (q, k, v)),
    ]


def _assert_empty(found: Results, problem: Problem, device: torch.device) -> None:
    visible = problem.seen(device)
    rows, columns = ~visible.any(1), ~visible.any(0)
    assert not found.out[:, rows].any() and not found.dq[:, rows].any(), "queries that see no key"
    assert (found.lse[..., rows] == -torch.inf).all(), "log-sum-exp of nothing"
    assert not found.dk[:, columns].any() and not found.dv[:, columns].any(), "keys that no query sees"

"""FlashAttention-2 (Dao 2023, arXiv:2307.08691): exact attention that never holds a matrix of scores.

    q_BSHD  [B, S, H, D]    queries
    k_BZKD  [B, Z, K, D]    keys; H/K query heads share one key head, which is never expanded
    v_BZKD  [B, Z, K, D]    values
    ->
    out_BSHD [B, S, H, D]   contiguous, in the dtype of q
    lse_BHS  [B, H, S]      log-sum-exp of the scaled scores, float32

    mask      query i sees key j where j <= i + offset if causal, else all; one that sees none has out 0, lse -inf
    forward   the scores of a tile are made, exponentiated, and multiplied by v, with running maxima and sums
    backward  delta = rowsum(dout ∘ out); scores of a tile again from q, k and lse; two kernels, one that walks queries
              for dk and dv, one that walks keys for dq: no atomics, so equal inputs give equal bits
    saved     q, k, v, out, lse
    FLOPs     of the tiles that are visited (`schemes.flash`): 2 products forward, 4 and 3 backward

float32, float16 and bfloat16; D in 16, 32, 64, 128, 256; any S, Z and strides. float32 products are exact unless
`torch.set_float32_matmul_precision` allows tf32. `out` and `lse` given to backward may be those over more keys than the
call's: then its gradients are this call's shares, as ring attention needs them.

The kernels are `flash_triton` (everywhere, the interpreter included) and `flash_hopper` (where it is faster).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from meshwright.config.attention import FLASH_HEAD_DIMS
from meshwright.kernels.flash_launch import Call, fill_delta
from meshwright.kernels.flash_tuning import Candidate, KernelName, tune
from meshwright.schemes.flash import Mask, backward_flops, flash_tile, forward_flops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def flash_forward(
    q_BSHD: torch.Tensor, k_BZKD: torch.Tensor, v_BZKD: torch.Tensor, *, causal: bool, offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, by the contract above. Not differentiable by itself (see `kernels.attention`).

    Raises ValueError for shapes and dtypes that the kernels do not take.
    """
    return torch.ops.meshwright.flash_forward(q_BSHD, k_BZKD, v_BZKD, causal, offset)


def flash_backward(
    dout_BSHD: torch.Tensor,
    q_BSHD: torch.Tensor,
    k_BZKD: torch.Tensor,
    v_BZKD: torch.Tensor,
    out_BSHD: torch.Tensor,
    lse_BHS: torch.Tensor,
    *,
    causal: bool,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, contiguous, in the dtypes of q, k and v. Equal inputs give equal bits."""
    delta_BHS = torch.ops.meshwright.flash_delta(out_BSHD, dout_BSHD)
    return torch.ops.meshwright.flash_backward(dout_BSHD, q_BSHD, k_BZKD, v_BZKD, lse_BHS, delta_BHS, causal, offset)


# --- operators: what torch's dispatcher, the recorder and fake tensors see -------------------------------------------


def _forward(q: Any, k: Any, v: Any, causal: bool, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _forward_outputs(q, k, v, causal, offset)
    if k.numel() == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    if out.numel():
        call = Call((q, k, v), causal, offset, flash_tile(q.shape[3], q.element_size()))
        call.run("forward", out, lse)
    return out, lse


def _forward_outputs(q: Any, k: Any, v: Any, causal: bool, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k, v)
    B, S, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, S), dtype=torch.float32)


def _delta(out: Any, dout: Any) -> torch.Tensor:
    delta = _delta_output(out, dout)
    if delta.numel():
        fill_delta(out, dout, delta)
    return delta


def _delta_output(out: Any, dout: Any) -> torch.Tensor:
    _check_like("dout", dout, out.shape, out.dtype)
    B, S, H, _ = out.shape
    return out.new_empty((B, H, S), dtype=torch.float32)


def _backward(
    dout: Any, q: Any, k: Any, v: Any, lse: Any, delta: Any, causal: bool, offset: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = _backward_outputs(dout, q, k, v, lse, delta, causal, offset)
    if k.numel() == 0 or q.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    call = Call((q, k, v, dout), causal, offset, flash_tile(q.shape[3], q.element_size()))
    statistics = lse.contiguous(), delta.contiguous()
    call.run("dkv", dk, dv, *statistics)
    call.run("dq", dq, *statistics)
    return dq, dk, dv


def _backward_outputs(
    dout: Any, q: Any, k: Any, v: Any, lse: Any, delta: Any, causal: bool, offset: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(q, k, v)
    B, S, H, _ = q.shape
    _check_like("dout", dout, q.shape, q.dtype)
    _check_like("lse", lse, (B, H, S), torch.float32)
    _check_like("delta", delta, (B, H, S), torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_LIBRARY = torch.library.Library("meshwright", "FRAGMENT")


def _register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An operator that runs on any device. Not by `torch.library.custom_op`, which adds 20 µs to each call."""
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"meshwright::{name}", fake, lib=_LIBRARY)


_register(
    "flash_forward(Tensor q, Tensor k, Tensor v, bool causal, int offset) -> (Tensor, Tensor)",
    _forward,
    _forward_outputs,
)
_register("flash_delta(Tensor out, Tensor dout) -> Tensor", _delta, _delta_output)
_register(
    "flash_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, bool causal, int offset)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_outputs,
)


@register_flop_formula(torch.ops.meshwright.flash_forward, get_raw=True)
def _forward_flops(q: Any, k: Any, v: Any, causal: bool, offset: int, **_: Any) -> int:
    B, S, H, D = q.shape
    return forward_flops(B, H, S, k.shape[1], D, flash_tile(D, q.element_size()), Mask(causal, offset))


@register_flop_formula(torch.ops.meshwright.flash_backward, get_raw=True)
def _backward_flops(
    dout: Any, q: Any, k: Any, v: Any, lse: Any, delta: Any, causal: bool, offset: int, **_: Any
) -> int:
    B, S, H, D = q.shape
    return backward_flops(B, H, S, k.shape[1], D, flash_tile(D, q.element_size()), Mask(causal, offset))


def _check(q: Any, k: Any, v: Any) -> None:
    """Raise ValueError for what the kernels do not take."""
    _check_shapes(q.shape, k.shape, v.shape)
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        names = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
        raise ValueError(f"q, k and v must all be float32, float16 or bfloat16: they are {names}")


def _check_like(name: str, x: Any, shape: Sequence[int], dtype: torch.dtype) -> None:
    if x.shape != torch.Size(shape) or x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} {tuple(shape)}: it is {x.dtype} {tuple(x.shape)}")


def _check_shapes(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> None:
    if len(q) == len(k) == len(v) == 4:
        if k != v or q[0] != k[0] or q[3] != k[3]:
            wrong = "k and v must have one shape, and q's batch and head_dim"
        elif k[2] == 0 or q[2] % k[2]:
            wrong = "query heads must be a multiple of key heads"
        elif q[3] not in FLASH_HEAD_DIMS:
            wrong = f"head_dim must be one of {', '.join(map(str, FLASH_HEAD_DIMS))}"
        else:
            return
    else:
        wrong = "flash attention takes [B, S, H, D] and twice [B, Z, K, D]"
    raise ValueError(f"{wrong}: q {tuple(q)}, k {tuple(k)}, v {tuple(v)}")


def tune_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
) -> dict[KernelName, dict[Candidate, float]]:
    """Time every candidate of every kernel on these inputs, in milliseconds, and keep the fastest for later calls."""
    out, lse = flash_forward(q, k, v, causal=causal)
    dout, delta = torch.randn_like(out), torch.ops.meshwright.flash_delta(out, out)
    outputs: dict[KernelName, tuple[torch.Tensor, ...]] = {
        "forward": (out, lse),
        "dkv": (torch.empty_like(k), torch.empty_like(v), lse, delta),
        "dq": (torch.empty_like(q), lse, delta),
    }
    tile, times = flash_tile(q.shape[3], q.element_size()), {}
    for kernel, filled in outputs.items():
        call = Call((q, k, v) if kernel == "forward" else (q, k, v, dout), causal, 0, tile)
        times[kernel] = tune(kernel, call.problem, partial(_launch, call, kernel, filled))
    return times


def _launch(call: Call, kernel: KernelName, outputs: tuple[torch.Tensor, ...], option: Candidate) -> None:
    call.launch(kernel, option, *outputs)

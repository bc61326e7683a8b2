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

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from meshwright.kernels.flash_tuning import Candidate, KernelName, Problem, chosen, tune
from meshwright.schemes.flash import HEAD_DIMS, Mask, backward_flops, flash_tile, forward_flops

LOG2_E = math.log2(math.e)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
L2_BYTES = 32 << 20
"""Keys and values of the heads that are computed side by side should fit in this."""
FEWEST_AT_ONCE = 4
DELTA_ROWS = 64


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


@torch.library.custom_op(
    "meshwright::flash_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, bool causal, int offset) -> (Tensor, Tensor)",
)
def _forward(q: Any, k: Any, v: Any, causal: bool, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _forward_outputs(q, k, v, causal, offset)
    if k.numel() == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    if out.numel():
        call = _Call((q, k, v), causal, offset)
        call.forward(chosen("forward", call.problem), out, lse)
    return out, lse


@_forward.register_fake
def _forward_outputs(q: Any, k: Any, v: Any, causal: bool, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k, v)
    B, S, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, S), dtype=torch.float32)


@torch.library.custom_op("meshwright::flash_delta", mutates_args=(), schema="(Tensor out, Tensor dout) -> Tensor")
def _delta(out: Any, dout: Any) -> torch.Tensor:
    delta = _delta_output(out, dout)
    if delta.numel():
        _, S, H, D = out.shape
        out, dout = _readable(out), _readable(dout)
        grid = (-(-delta.numel() // DELTA_ROWS),)
        sizes = H, S, delta.numel(), *out.stride()[:3], *dout.stride()[:3]
        with _on(out):
            _kernels("triton").delta[grid](out, dout, delta, *sizes, D=D, ROWS=DELTA_ROWS, num_warps=4)
    return delta


@_delta.register_fake
def _delta_output(out: Any, dout: Any) -> torch.Tensor:
    if out.shape != dout.shape:
        raise ValueError(f"dout must have the shape of out, {tuple(out.shape)}: it has {tuple(dout.shape)}")
    B, S, H, _ = out.shape
    return out.new_empty((B, H, S), dtype=torch.float32)


@torch.library.custom_op(
    "meshwright::flash_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, bool causal, int offset)"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward(
    dout: Any, q: Any, k: Any, v: Any, lse: Any, delta: Any, causal: bool, offset: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = _backward_outputs(dout, q, k, v, lse, delta, causal, offset)
    if k.numel() == 0 or q.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    call = _Call((q, k, v, dout), causal, offset)
    statistics = lse.contiguous(), delta.contiguous()
    call.dkv(chosen("dkv", call.problem), dk, dv, *statistics)
    call.dq(chosen("dq", call.problem), dq, *statistics)
    return dq, dk, dv


@_backward.register_fake
def _backward_outputs(
    dout: Any, q: Any, k: Any, v: Any, lse: Any, delta: Any, causal: bool, offset: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(q, k, v)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


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
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(x.dim() != 4 for x in (q, k, v)):
        raise ValueError(f"flash attention takes [B, S, H, D] and twice [B, Z, K, D]: {shapes}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k and v must have one shape, and q's batch and head_dim: {shapes}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key heads: {shapes}")
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}: {shapes}")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        names = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
        raise ValueError(f"q, k and v must all be float32, float16 or bfloat16: they are {names}")


# --- launching --------------------------------------------------------------------------------------------------------


class _Call:
    """Inputs of one call (q, k, v and, for backward, dout), as a kernel reads them."""

    def __init__(self, inputs: tuple[torch.Tensor, ...], causal: bool, offset: int) -> None:
        self.inputs = tuple(_readable(x) for x in inputs)
        q, k = self.inputs[:2]
        self.B, self.S, self.H, self.D = q.shape
        self.Z, self.K = k.shape[1:3]
        self.causal, self.offset = causal, offset
        self.tile = flash_tile(self.D, q.element_size())
        aligned = all(_is_aligned(x) for x in self.inputs)
        self.problem = Problem(_capability(q.device), q.element_size(), self.D, aligned)

    def forward(self, option: Candidate, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Fill out and lse."""
        self._launch("forward", option, (out, lse))

    def dkv(
        self, option: Candidate, dk: torch.Tensor, dv: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor
    ) -> None:
        """Fill dk and dv."""
        self._launch("dkv", option, (dk, dv, lse, delta))

    def dq(self, option: Candidate, dq: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor) -> None:
        """Fill dq."""
        self._launch("dq", option, (dq, lse, delta))

    def _launch(self, kernel: KernelName, option: Candidate, tensors: tuple[torch.Tensor, ...]) -> None:
        """A program for each head and block of rows: of keys for dkv, else of queries."""
        tile, q = self.tile, self.inputs[0]
        block_q, block_k = {"forward": tile[0:2], "dkv": tile[2:4], "dq": tile[4:6]}[kernel]
        length, rows, heads = (self.Z, block_k, self.K) if kernel == "dkv" else (self.S, block_q, self.H)
        num_heads, rows_of = self.B * heads, (block_q, block_k, block_k, block_q)
        arguments = [_tiles_of(x, n, option) for x, n in zip(self.inputs, rows_of, strict=False)]
        arguments += tensors
        if option.implementation == "triton":
            arguments += [stride for x in self.inputs for stride in x.stride()[:3]]
        arguments += [self.H, self.H // self.K, self.S, self.Z, self.offset, num_heads, self._at_once(num_heads)]
        arguments += [LOG2_E * self.D**-0.5] if kernel == "forward" else [LOG2_E * self.D**-0.5, self.D**-0.5]
        settings: dict[str, Any] = {"D": self.D, "BLOCK_Q": block_q, "BLOCK_K": block_k, "CAUSAL": self.causal}
        if option.implementation == "triton":
            settings |= {"DESCRIPTORS": option.descriptors, "PRECISION": _precision(q.dtype)}
            settings |= {"num_stages": option.num_stages}
        else:
            settings |= {"STAGES": option.num_stages} | ({"LATE": option.late} if kernel == "dkv" else {})
            settings["Q_SHARED"] = _shared_layout(block_q, self.D, q.dtype)
            settings["K_SHARED"] = _shared_layout(block_k, self.D, q.dtype)
        launch = getattr(_kernels(option.implementation), kernel)[-(-length // rows) * num_heads,]
        with _on(q):
            launch(*arguments, **settings, num_warps=option.num_warps)

    def _at_once(self, num_heads: int) -> int:
        """Heads side by side: a divisor of their number, so that no group is small."""
        bytes_of_head = 2 * max(self.S, self.Z) * self.D * self.inputs[0].element_size()
        most = max(FEWEST_AT_ONCE, L2_BYTES // bytes_of_head)
        return max((n for n in range(1, min(most, num_heads) + 1) if num_heads % n == 0), default=1)


def tune_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
) -> dict[KernelName, dict[Candidate, float]]:
    """Time every candidate of every kernel on these inputs, in milliseconds, and keep the fastest for later calls."""
    out, lse = flash_forward(q, k, v, causal=causal)
    dout, delta = torch.randn_like(out), torch.ops.meshwright.flash_delta(out, out)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    forward, backward = _Call((q, k, v), causal, 0), _Call((q, k, v, dout), causal, 0)
    launches: dict[KernelName, Callable[[Candidate], None]] = {
        "forward": lambda option: forward.forward(option, out, lse),
        "dkv": lambda option: backward.dkv(option, dk, dv, lse, delta),
        "dq": lambda option: backward.dq(option, dq, lse, delta),
    }
    return {kernel: tune(kernel, forward.problem, launch) for kernel, launch in launches.items()}


def _readable(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _is_aligned(x: torch.Tensor) -> bool:
    """Whether the copy engine can read it: 16-byte aligned, in every dim that has more than one place."""
    steps = (s * x.element_size() for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1)
    return x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def _tiles_of(x: torch.Tensor, rows: int, option: Candidate) -> Any:
    """A tensor [B, S, H, D] as an argument of a kernel: itself, or a descriptor [B, H, S, D] of tiles [rows, D]."""
    if not option.descriptors:
        return x
    B, S, H, D = x.shape
    b, s, h = (stride if n > 1 else 16 for stride, n in zip(x.stride()[:3], x.shape[:3], strict=True))
    block = [1, 1, rows, D]
    if option.implementation == "triton":
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(x, [B, H, S, D], [b, h, s, 1], block)
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    return GluonDescriptor(x, [B, H, S, D], [b, h, s, 1], block, _shared_layout(rows, D, x.dtype, outer=(1, 1)))


@functools.cache
def _shared_layout(rows: int, head_dim: int, dtype: torch.dtype, outer: tuple[int, ...] = ()) -> Any:
    """How the copy engine lays a tile [rows, D] down in shared memory, as tensor cores read it."""
    from triton.experimental.gluon import language as gl

    element = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([*outer, rows, head_dim], element)


@functools.cache
def _kernels(implementation: str) -> ModuleType:
    """The module with the kernels; Triton is imported only where they run."""
    if implementation == "hopper":
        from meshwright.kernels import flash_hopper

        return flash_hopper
    from meshwright.kernels import flash_triton

    return flash_triton


@functools.cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _on(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Launch where a tensor lies: Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _precision(dtype: torch.dtype) -> str:
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"

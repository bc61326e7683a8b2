"""The implementations that `bench attention` times, by name: what each calls, where it runs, and what it cannot do.

q_BSHD [B, S, H, D], k_BSKD and v_BSKD [B, S, K, D], all leaves; torch's take their [B, heads, S, D] views

naive               scores, scaled, masked, softmax, product: every score matrix in memory
naive-compiled      the same, by torch.compile
naive-max-autotune  the same with mode max-autotune-no-cudagraphs (graphs would own the memory that is counted)
sdpa-flash, sdpa-efficient, sdpa-cudnn, sdpa-math
                    torch's scaled_dot_product_attention, held to one backend, so that nothing falls back
sdpa-cpu            the one that torch has for a CPU
flash               `kernels.flash_attention`, ours
flex                torch's FlexAttention, compiled, its block mask made outside the timing
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from meshwright.bench.attention_cost import MEASURES, Cell, Measure
from meshwright.config.attention import FLASH_HEAD_DIMS, FLEX_LEAST_HEAD_DIM
from meshwright.config.legality import listed
from meshwright.kernels.flex import block_mask
from meshwright.model.build import DTYPES

Implementation = Literal[
    "naive",
    "naive-compiled",
    "naive-max-autotune",
    "sdpa-flash",
    "sdpa-efficient",
    "sdpa-cudnn",
    "sdpa-math",
    "sdpa-cpu",
    "flash",
    "flex",
]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

COMPILED = ("naive-compiled", "naive-max-autotune", "flex")
OURS = ("flash",)

_BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
    "sdpa-cpu": SDPBackend.FLASH_ATTENTION,
}
_COMPILE_MODES = {"naive-compiled": None, "naive-max-autotune": "max-autotune-no-cudagraphs"}


class Inputs(NamedTuple):
    """q, k and v of a cell, shared by all implementations."""

    q_BSHD: torch.Tensor
    k_BSKD: torch.Tensor
    v_BSKD: torch.Tensor

    @classmethod
    def of(cls, cell: Cell, device: torch.device) -> Inputs:
        """Drawn anew, the same each time."""
        generator = torch.Generator(device).manual_seed(0)

        def drawn(heads: int) -> torch.Tensor:
            shape = cell.batch, cell.seq, heads, cell.head_dim
            values = torch.randn(shape, generator=generator, device=device, dtype=DTYPES[cell.dtype])
            return values.requires_grad_()

        return cls(drawn(cell.heads), drawn(cell.kv_heads), drawn(cell.kv_heads))


def not_available(name: str, device_kind: str, cell: Cell) -> str:
    """Why an implementation cannot run on a device, or cannot run this cell there; empty if it can."""
    if device_kind == "cpu" and name in OURS:
        return "needs a GPU (on a CPU only Triton's interpreter runs it, which is not timed)"
    if device_kind == "cpu" and name in ("sdpa-flash", "sdpa-efficient", "sdpa-cudnn"):
        return "needs a GPU: on a CPU use sdpa-cpu"
    if device_kind != "cpu" and name == "sdpa-cpu":
        return "needs a CPU: on a GPU use sdpa-flash, sdpa-efficient or sdpa-cudnn"
    if name in OURS and cell.head_dim not in FLASH_HEAD_DIMS:
        return f"takes head_dim {listed(FLASH_HEAD_DIMS)}, not {cell.head_dim}"
    if device_kind != "cpu" and name == "flex" and cell.head_dim < FLEX_LEAST_HEAD_DIM:
        return f"takes head_dim {FLEX_LEAST_HEAD_DIM} or more, not {cell.head_dim}"
    return ""


def not_measured(name: str, device_kind: str) -> dict[Measure, str]:
    """Measures that an implementation lacks on a device, and why."""
    if name == "flex" and device_kind == "cpu":
        return {measure: "backward is not supported by torch on a CPU" for measure in MEASURES if measure != "forward"}
    return {}


@dataclass
class Subject:
    """An implementation on the inputs of a cell. `dout` has the layout of its own output, known after a first call."""

    name: str
    inputs: Inputs
    call: Callable[[], torch.Tensor]
    differentiable: bool = True
    extras: tuple[torch.Tensor, ...] = ()
    """Tensors beside the inputs that were there before."""
    dout: torch.Tensor | None = None

    def forward(self) -> torch.Tensor:
        """The output, with a graph where backward exists."""
        with torch.set_grad_enabled(self.differentiable):
            return self.call()

    def backward(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """dq, dk and dv; frees the graph of `out`."""
        return torch.autograd.grad(out, self.inputs, self.gradient(out))

    def gradient(self, out: torch.Tensor) -> torch.Tensor:
        """The gradient of the output, drawn once."""
        if self.dout is None:
            self.dout = torch.randn_like(out, requires_grad=False)
        return self.dout


def build(name: str, cell: Cell, inputs: Inputs, mask: torch.Tensor | None) -> Subject:
    """A subject; compiling happens at its first call. `mask` is of naive attention: True where a score is hidden."""
    if name in OURS:
        return Subject(name, inputs, lambda: _Flash.apply(*inputs, cell.causal))
    views = [x.transpose(1, 2) for x in inputs]
    if name == "flex":
        return _flex(cell, inputs, views)
    if name in _BACKENDS:
        return Subject(name, inputs, lambda: _sdpa(_BACKENDS[name], cell, views))
    function: Callable[..., torch.Tensor] = naive
    if name != "naive":
        function = torch.compile(naive, dynamic=False, fullgraph=True, mode=_COMPILE_MODES[name])
    return Subject(name, inputs, lambda: function(*views, mask), extras=() if mask is None else (mask,))


def naive_mask(cell: Cell, device: torch.device) -> torch.Tensor | None:
    """[S, S], True above the diagonal; None where attention is full."""
    if not cell.causal:
        return None
    return torch.ones(cell.seq, cell.seq, dtype=torch.bool, device=device).triu_(1)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(q kᵀ/√D) v of [B, heads, S, D], as it is written in a textbook; `attention_cost` counts its tensors."""
    B, H, S, D = q.shape
    q_NSD, k_NSD, v_NSD = (_folded(x, H) for x in (q, k, v))
    x_NSS = torch.bmm(q_NSD, k_NSD.transpose(1, 2))
    x_NSS = x_NSS * D**-0.5
    if mask is not None:
        x_NSS = x_NSS.masked_fill(mask, -torch.inf)
    x_NSS = x_NSS.softmax(dim=-1)
    return torch.bmm(x_NSS, v_NSD).view(B, H, S, D)


def _folded(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B·H, S, D], heads repeated where several queries share one."""
    B, K, S, D = x.shape
    if heads != K:
        x = x.unsqueeze(2).expand(B, K, heads // K, S, D)
    return x.reshape(B * heads, S, D)


def _sdpa(backend: SDPBackend, cell: Cell, views: list[torch.Tensor]) -> torch.Tensor:
    q, k, v = views
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=cell.causal, enable_gqa=cell.heads != cell.kv_heads)


def _flex(cell: Cell, inputs: Inputs, views: list[torch.Tensor]) -> Subject:
    mask = block_mask(cell.seq, cell.seq, True, inputs.q_BSHD.device) if cell.causal else None
    differentiable = inputs.q_BSHD.device.type != "cpu"
    if not differentiable:  # torch refuses inputs that want gradients, whether or not there is a graph
        views = [x.detach() for x in views]
    compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    grouped = cell.heads != cell.kv_heads
    return Subject(
        "flex",
        inputs,
        lambda: compiled(*views, block_mask=mask, enable_gqa=grouped),
        differentiable=differentiable,
    )


class _Flash(torch.autograd.Function):
    """Our kernels, called as they are."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        from meshwright.kernels.flash_attention import flash_forward

        out, lse = flash_forward(q, k, v, causal=causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        from meshwright.kernels.flash_attention import flash_backward

        return *flash_backward(dout, *ctx.saved_tensors, causal=ctx.causal), None

"""What one rank does in `bench ring`: attention over its part of the sequence, forward and backward.

`account_rank` runs it under the recorder, `formula` writes it by `schemes.context`, `time_rank` takes the seconds.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from meshwright.account import Footprint, Ledger, Trace, Work
from meshwright.audit.recorder import Recorder
from meshwright.comm.collectives import Axis
from meshwright.comm.mesh import World
from meshwright.config.tree import Layout, Model, Training
from meshwright.kernels.attention import choose_kernel
from meshwright.parallel.context import ContextAttention
from meshwright.schemes import context as scheme
from meshwright.schemes.tape import Sizes, Tape

SITE = "attention"

Precision = Literal["float32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The problem as a whole, and how often it is timed."""

    seq: int = 4096
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    batch: int = 1
    precision: Precision = "float32"
    samples: int = 15

    @property
    def model(self) -> Model:
        """As the formulas take it; only its attention is used."""
        width = self.heads * self.head_dim
        return Model(heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, d_model=width, d_ff=width)

    @property
    def training(self) -> Training:
        """Likewise."""
        return Training(batch=self.batch, seq_len=self.seq, precision=self.precision, device="cpu")

    def sizes(self, layout: Layout, rank: int) -> Sizes:
        """What one rank computes on."""
        return Sizes.of(self.model, layout, self.training, rank)

    def command(self) -> str:
        """What measures it again."""
        options = (f"--{name.replace('_', '-')} {value}" for name, value in vars(self).items())
        return f"meshwright bench ring {' '.join(options)}"


# --- the account of a rank --------------------------------------------------------------------------------------------


class Account(NamedTuple):
    """What one rank computes, sends and holds in forward and backward of attention."""

    forward_flops: int
    backward_flops: int
    wire_bytes: int
    peak_bytes: int

    @classmethod
    def of(cls, trace: Trace) -> Account:
        """Folded from a trace, a formula's or the recorder's."""
        work = Work.of(trace)
        forward, backward = (work.flops(phase=phase, kind="attention") for phase in ("forward", "backward"))
        return cls(forward, backward, Ledger.of(trace).wire_bytes(), Footprint.of(trace).peak)


def formula(setting: Setting, layout: Layout) -> list[Account]:
    """By formula, a rank each."""
    return [Account.of(_tape(setting.sizes(layout, rank)).trace()) for rank in range(layout.world)]


def _tape(sizes: Sizes) -> Tape:
    """q, k and v; attention; what reads its output, and gives its gradient; attention's backward."""
    tape, attention = Tape(), scheme.ContextAttention(sizes)
    q_bytes, kv_bytes = (sizes.N * heads * sizes.D * sizes.c for heads in (sizes.H, sizes.K))
    tape.alloc(q_bytes + 2 * kv_bytes, attention.input_category)
    attention.forward(tape)
    with tape.at(phase="backward"):
        tape.alloc(q_bytes)
        if not attention.shares_out:
            tape.release(q_bytes)
        attention.backward(tape)
        tape.free(q_bytes)
        tape.free(2 * kv_bytes, attention.dkv_category)
    return tape


def account_rank(setting: Setting, layout: Layout) -> Account:
    """By the recorder, on this rank. Collective over the layout's ranks."""
    sizes, attend = _on_this_rank(setting, layout)
    with Recorder() as recorder:
        out = attend(list(_Made.apply(torch.empty(0, requires_grad=True), sizes)), SITE)
        end = _Read.apply(out)
        del out
        end.backward(torch.empty(0))
    return Account.of(recorder.trace())


class _Made(torch.autograd.Function):
    """q, k and v as results of something: nobody but attention holds them, or their gradients."""

    @staticmethod
    def forward(ctx: Any, _: torch.Tensor, sizes: Sizes) -> tuple[torch.Tensor, ...]:
        return tuple(torch.ones(shape, dtype=_dtype(sizes)) for shape in _shapes(sizes))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return None, None


class _Read(torch.autograd.Function):
    """What reads attention's output and keeps it for its own backward, as the output projection does."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(out)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(ctx.saved_tensors[0])


# --- the seconds of a rank --------------------------------------------------------------------------------------------


def time_rank(setting: Setting, layout: Layout) -> float:
    """Seconds of forward and backward on this rank, from a barrier on. Collective over the layout's ranks."""
    sizes, attend = _on_this_rank(setting, layout)
    generator = torch.Generator().manual_seed(dist.get_rank())
    q_shape, *_ = shapes = _shapes(sizes)
    drawn = [torch.randn(s, generator=generator, dtype=_dtype(sizes)) for s in (*shapes, q_shape)]
    *leaves, dout = drawn
    for leaf in leaves:
        leaf.requires_grad_()
    dist.barrier()
    began = time.perf_counter()
    torch.autograd.grad(attend(list(leaves), SITE), leaves, dout)
    return time.perf_counter() - began


def _on_this_rank(setting: Setting, layout: Layout) -> tuple[Sizes, ContextAttention]:
    sizes, axes = setting.sizes(layout, dist.get_rank()), _axes(layout)
    kernel = choose_kernel("sdpa", "cpu", _dtype(sizes))
    return sizes, ContextAttention(axes["ulysses"], axes["ring"], layout.ring_order, kernel)


@functools.cache
def _axes(layout: Layout) -> dict[str, Axis]:
    return World.create(layout, torch.device("cpu")).axes


def _dtype(sizes: Sizes) -> torch.dtype:
    return getattr(torch, sizes.dtype)


def _shapes(sizes: Sizes) -> list[tuple[int, int, int, int]]:
    """Of q [B, S, H, D], and of k and v [B, S, K, D]."""
    return [(sizes.B, sizes.S, heads, sizes.D) for heads in (sizes.H, sizes.K, sizes.K)]

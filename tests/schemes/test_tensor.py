"""Tensor parallelism by formula, against figures worked out by hand and the paper's counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.account import Footprint, Ledger, Trace, Work
from meshwright.config.tree import Layout, Model, Training
from meshwright.schemes.decoder import Block
from meshwright.schemes.tape import Sizes, Tape

LLAMA = Model(layers=32, d_model=4096, d_ff=14336, heads=32, kv_heads=8, head_dim=128, vocab_size=128256)
GPT = Model(
    layers=48,
    d_model=6144,
    d_ff=24576,
    heads=64,
    kv_heads=64,
    head_dim=96,
    vocab_size=51200,
    norm="layernorm",
    positions="learned",
    mlp="gelu",
)


def block(model: Model, tensor: int, batch: int, seq_len: int) -> tuple[Trace, Trace]:
    """The forward of one block, and its backward, in bf16 on CUDA."""
    training = Training(batch=batch, seq_len=seq_len, precision="bf16", device="cuda")
    sizes = Sizes.of(model, Layout(tensor=tensor), training)
    forward, backward = Tape(), Tape()
    with forward.at(phase="forward"):
        Block(model, sizes).forward(forward, "layers.0")
    with backward.at(phase="backward"):
        Block(model, sizes).backward(backward, "layers.0")
    return forward.trace(), backward.trace()


def saved(trace: Trace) -> int:
    """Net bytes of saved activations."""
    return sum(e.delta_bytes for e in trace.expanded() if getattr(e, "category", "") == "saved_activations")


@pytest.mark.parametrize("tensor", [2, 8])
@pytest.mark.parametrize("model", [LLAMA, GPT], ids=["llama", "gpt"])
def test_two_all_reduces_forward_and_two_backward(model: Model, tensor: int) -> None:
    """Shoeybi et al. 2019, figure 4: f and g once each way for attention and for the MLP, each of B·S·E elements."""
    for trace in block(model, tensor, batch=4, seq_len=2048):
        ledger = Ledger.of(trace)
        assert {(key.operation, key.payload_bytes) for key in ledger.rows} == {
            ("all_reduce", 4 * 2048 * model.d_model * 2)
        }
        assert sum(ledger.rows.values()) == 2


def test_saved_activations_of_a_llama_block_by_hand() -> None:
    """docs/schemes/tensor.md's table, N = 8192 tokens, T = 8: every line in bytes."""
    N = 8192
    lines = {
        "inputs and outputs of both norms": 4 * N * 4096 * 2,
        "rstd of both norms": 2 * 4 * N,
        "q, k, v": N * (4 + 2 * 1) * 128 * 2,
        "attention's output": N * 4 * 128 * 2,
        "log-sum-exp": 4 * N * 4,
        "gate, up, product": 3 * N * 1792 * 2,
    }
    random_state = 24  # of the CUDA kernel
    forward, backward = block(LLAMA, 8, batch=1, seq_len=N)
    assert saved(forward) == sum(lines.values()) + random_state == 377_683_992
    assert saved(backward) == -saved(forward), "backward lets go of exactly what forward kept"


def test_what_forward_makes_backward_frees() -> None:
    for model in (LLAMA, GPT, replace(GPT, bias=True, norm="rmsnorm")):
        for tensor in (1, 8):
            forward, backward = block(model, tensor, batch=2, seq_len=64)
            level = Footprint.of(Trace((*forward.events, *backward.events)))
            net = sum(e.delta_bytes for t in (forward, backward) for e in t.expanded() if hasattr(e, "delta_bytes"))
            assert net == 0, "the gradient of the next stream became that of this one, all else is gone"
            assert level.peak > 0


def test_flops_of_a_gpt_block() -> None:
    """Korthikanti et al. 2022: a layer forward is 24·B·s·h² + 4·B·s²·h, divided by T; backward twice the matmuls."""
    B, s, h, T = 4, 2048, 6144, 8
    forward, backward = (Work.of(trace) for trace in block(GPT, T, batch=B, seq_len=s))
    assert forward.flops(kind="matmul") * T == 24 * B * s * h * h
    assert forward.flops(kind="attention") * T == 4 * B * s * s * h
    assert backward.flops(kind="matmul") == 2 * forward.flops(kind="matmul")
    assert backward.flops(kind="attention") * 2 == 5 * forward.flops(kind="attention"), (
        "scores again, then four products"
    )

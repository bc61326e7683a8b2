"""`bench attention` by formula: FLOPs, bytes, limits, and memory that the recorder counts, byte for byte."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from meshwright.bench import attention_subjects as subjects
from meshwright.bench.attention_clock import CpuMeter, Measured
from meshwright.bench.attention_cost import Cell, memory
from meshwright.config.hardware import load_device

SHAPES = [
    {"batch": 1, "heads": 1, "kv_heads": 1},
    {"batch": 2, "heads": 1, "kv_heads": 1},
    {"batch": 1, "heads": 4, "kv_heads": 4},
    {"batch": 2, "heads": 4, "kv_heads": 4},
    {"batch": 1, "heads": 4, "kv_heads": 2},
    {"batch": 1, "heads": 4, "kv_heads": 1},
    {"batch": 2, "heads": 4, "kv_heads": 1},
    {"batch": 2, "heads": 4, "kv_heads": 2},
]


def measured(name: str, cell: Cell) -> Measured:
    """Of a second call, on the CPU."""
    device = torch.device("cpu")
    mask = subjects.naive_mask(cell, device) if name == "naive" else None
    subject = subjects.build(name, cell, subjects.Inputs.of(cell, device), mask)
    subject.backward(subject.forward())
    found = CpuMeter().memory(subject)
    assert isinstance(found, Measured)
    return found


def test_useful_flops_are_those_of_visible_pairs() -> None:
    full = Cell(dtype="bf16", head_dim=64, seq=1024, batch=2, heads=16, kv_heads=4, causal=False)
    causal = Cell(dtype="bf16", head_dim=64, seq=1024, batch=2, heads=16, kv_heads=4, causal=True)
    assert full.flops("forward") == 4 * 2 * 16 * 64 * 1024**2
    assert causal.flops("forward") == 4 * 2 * 16 * 64 * sum(range(1, 1025))
    assert causal.flops("backward") == 10 * 2 * 16 * 64 * sum(range(1, 1025))
    assert causal.flops("both") == causal.flops("forward") + causal.flops("backward")


def test_bytes_count_each_tensor_once() -> None:
    cell = Cell(dtype="bf16", head_dim=64, seq=1024, batch=2, heads=16, kv_heads=4)
    q, kv, lse = 2 * 2 * 1024 * 16 * 64, 2 * 2 * 1024 * 4 * 64, 4 * 2 * 1024 * 16
    assert cell.moved_bytes("forward") == 2 * q + 2 * kv + lse
    assert cell.moved_bytes("backward") == 4 * q + 4 * kv + lse


def test_limits() -> None:
    """Long sequences are bound by FLOPs, short ones by bytes; unknown figures give none."""
    h100 = load_device("h100")
    long = Cell(dtype="bf16", head_dim=128, seq=16384, heads=16, kv_heads=16)
    assert long.limit("forward", h100) == (long.flops("forward") / 989e12, "compute")
    short = Cell(dtype="bf16", head_dim=128, seq=128, heads=16, kv_heads=16)
    assert short.limit("forward", h100) == (short.moved_bytes("forward") / 3350e9, "memory")
    assert short.limit("forward", load_device("cpu")) is None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
@pytest.mark.parametrize(("seq", "head_dim"), [(64, 16), (16, 64)])
def test_naive_memory_is_as_predicted(shape: dict[str, int], seq: int, head_dim: int, dtype: str, causal: bool) -> None:
    cell = Cell(dtype=dtype, head_dim=head_dim, seq=seq, causal=causal, **shape)
    predicted, found = memory("naive", cell), measured("naive", cell)
    assert (found.held_bytes, found.peak_bytes) == (predicted.held_bytes, predicted.peak)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_fused_memory_is_as_predicted(dtype: str) -> None:
    cell = Cell(dtype=dtype, head_dim=16, seq=64, batch=2, heads=4, kv_heads=4)
    predicted, found = memory("sdpa-cpu", cell), measured("sdpa-cpu", cell)
    assert predicted.peak_certainty == "exact"
    assert (found.held_bytes, found.peak_bytes) == (predicted.held_bytes, predicted.peak)


@pytest.fixture
def flash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels' contract in torch: what they make and keep, which needs no GPU."""

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        B, S, H, _D = q.shape
        return torch.zeros_like(q, requires_grad=False), torch.zeros(B, H, S)

    def backward(dout: torch.Tensor, *saved: torch.Tensor, **_: Any) -> tuple[torch.Tensor, ...]:
        delta = torch.zeros_like(saved[4])
        gradients = tuple(torch.zeros_like(x) for x in saved[:3])
        del delta
        return gradients

    module: Any = ModuleType("flash_attention")
    module.flash_forward, module.flash_backward = forward, backward
    monkeypatch.setitem(sys.modules, "meshwright.kernels.flash_attention", module)


@pytest.mark.parametrize("name", subjects.OURS)
@pytest.mark.parametrize("shape", SHAPES[2:5], ids=str)
def test_flash_keeps_one_number_a_row(name: str, shape: dict[str, int], flash_on_cpu: None) -> None:
    cell = Cell(dtype="bf16", head_dim=16, seq=64, **shape)
    predicted = memory(name, cell)
    assert predicted.held == {"lse": 4 * cell.batch * cell.heads * cell.seq}
    assert measured(name, cell).held_bytes == predicted.held_bytes


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_peak_of_flash_is_as_predicted(shape: dict[str, int], dtype: str, flash_on_cpu: None) -> None:
    """Backward makes delta, dq, dk and dv, and no head of keys or values twice."""
    cell = Cell(dtype=dtype, head_dim=16, seq=64, **shape)
    predicted = memory("flash", cell)
    assert predicted.peak_certainty == "exact"
    assert predicted.peak == 2 * cell.q_bytes + 2 * cell.kv_bytes + 2 * cell.row_bytes
    assert measured("flash", cell).peak_bytes == predicted.peak


def test_which_kernels_share_heads_is_known_in_one_place() -> None:
    """torch's flash kernel shares them, and yet its backward makes dk and dv for every query head."""
    grouped, one = (Cell(dtype="bf16", head_dim=64, seq=256, heads=8, kv_heads=kv_heads) for kv_heads in (2, 8))
    kept = 2 * (one.kv_bytes - grouped.kv_bytes)
    for name, expanded in (("flash", 0), ("flex", 0), ("sdpa-flash", 2), ("sdpa-cpu", 2), ("sdpa-efficient", 2)):
        assert memory(name, one).peak - memory(name, grouped).peak == kept - expanded * grouped.q_bytes, name
    assert memory("sdpa-flash", grouped).held_certainty == "exact"
    assert memory("sdpa-cpu", grouped).held_certainty == "estimate"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_naive_attention_is_attention(causal: bool, kv_heads: int) -> None:
    cell = Cell(dtype="float32", head_dim=16, seq=32, batch=2, heads=4, kv_heads=kv_heads, causal=causal)
    inputs = subjects.Inputs.of(cell, torch.device("cpu"))
    found = {}
    for name in ("naive", "sdpa-math"):
        mask = subjects.naive_mask(cell, torch.device("cpu"))
        subject = subjects.build(name, cell, inputs, mask)
        out = subject.forward()
        found[name] = (out, *torch.autograd.grad(out.square().sum(), inputs))
    for ours, theirs in zip(found["naive"], found["sdpa-math"], strict=True):
        torch.testing.assert_close(ours, theirs)

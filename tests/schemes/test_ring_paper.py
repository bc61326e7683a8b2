"""When a hop is hidden: section 3 of the Ring Attention paper, its table 2, and what our schedules need."""

from __future__ import annotations

import pytest

from meshwright.account import Compute, Issue
from meshwright.config.tree import Layout, Model, Training
from meshwright.schemes.ring import Order, RingCore
from meshwright.schemes.tape import Sizes, Tape

TABLE_2 = {
    "A100 NVLink": (312e12, 300e9, 1.0, 6.2),
    "A100 InfiniBand": (312e12, 12.5e9, 24.5, 149.5),
    "TPU v3": (123e12, 112e9, 1.1, 6.6),
    "TPU v4": (275e12, 268e9, 1.0, 6.2),
    "TPU v5e": (196e12, 186e9, 1.1, 6.3),
}
"""FLOP/s, bytes/s; thousand tokens of the smallest block and of the smallest sequence, as printed."""

SIZE, TOKENS = 4, 1024


def flops_per_byte(order: Order, *, backward: bool, kv_heads: int = 8) -> float:
    """Of a step between the first and the last of the last rank: its attention over what travels under it."""
    model = Model(d_model=1024, heads=8, kv_heads=kv_heads, head_dim=128)
    layout = Layout(ring=SIZE, ring_order=order)
    training = Training(batch=1, seq_len=SIZE * TOKENS, precision="bf16", device="cuda")
    core, tape = RingCore(Sizes.of(model, layout, training, rank=SIZE - 1)), Tape()
    if backward:
        core.backward(tape)
    else:
        core.forward(tape, "saved_activations", "saved_activations")
    steps: list[tuple[int, int]] = []
    sent = 0
    for event in tape.trace().expanded():
        if isinstance(event, Issue):
            sent += event.payload_bytes
        elif isinstance(event, Compute) and event.kind == "attention":
            steps.append((event.flops, sent))
            sent = 0
    assert len(steps) == SIZE
    flops, sent = steps[1]
    return flops / sent


@pytest.mark.parametrize("device", TABLE_2)
def test_table_2(device: str) -> None:
    """C = F/b and 6·C. The InfiniBand row is printed below its own formula, by 2 % and by 0.2 %."""
    flops, bandwidth, block, seq = TABLE_2[device]
    found = flops / bandwidth / 1e3, 6 * flops / bandwidth / 1e3
    if device == "A100 InfiniBand":
        assert found == pytest.approx((24.96, 149.76))
        assert found == pytest.approx((block, seq), rel=0.02)
    else:
        assert [round(figure, 1) for figure in found] == [block, seq]


def test_a_block_computes_as_many_flops_a_byte_as_it_has_tokens() -> None:
    """4·h·C² FLOPs against 4·h·C bytes: C, so C ≥ F/b hides the hop."""
    assert flops_per_byte("contiguous", backward=False) == TOKENS


@pytest.mark.parametrize(
    ("order", "backward", "factor"),
    [("contiguous", False, 1.0), ("zigzag", False, 2.0), ("contiguous", True, 1.2), ("zigzag", True, 2.4)],
)
def test_tokens_that_hide_a_hop(order: Order, backward: bool, factor: float) -> None:
    """In units of F/b, as ring.md has them. Zigzag computes half a block; backward 10·h·C² against 12·h·C bytes."""
    assert TOKENS / flops_per_byte(order, backward=backward) == pytest.approx(factor)
    assert flops_per_byte(order, backward=backward, kv_heads=2) == 4 * flops_per_byte(order, backward=backward)

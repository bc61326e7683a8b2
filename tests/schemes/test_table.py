"""The table of schemes against figures worked out by hand."""

from __future__ import annotations

import pytest

from meshwright.errors import UserError
from meshwright.schemes.table import table

S, H, P = 4096, 2048, 8


def test_megatron_sends_four_activations_a_block() -> None:
    """Two all-reduces of S·H forward, two backward, in bf16; one rank sends 2·7/8 of each."""
    row = table(S, H, P)[0]
    assert (row.operation, row.calls_forward, row.calls_backward) == ("all_reduce", 2, 2)
    assert (row.elements, row.bytes) == (4 * S * H, 8 * S * H)
    assert row.wire_bytes == 2 * 7 * row.bytes // 8


def test_megatron_keeps_by_formula() -> None:
    """In bf16, by 2·S·H: the inputs of both norms and the outputs of both, whole; q, k, v, out and the MLP's two hidden
    layers of 4, an eighth: 4 + 12/8. Float32 rows: mean and deviation of two norms; log-sum-exp of 2 heads a rank, with
    24 bytes of the kernel's random state.
    """
    row = table(S, H, P)[0]
    assert row.saved_bytes == 2 * S * H * (4 + 12 / P) + 4 * S * (2 * 2 + 2) + 24


def test_naive_data_parallelism_sends_each_gradient() -> None:
    """12·H² weights and two norms of H, in eight float32 gradients, all after backward; nothing kept is divided."""
    row = table(S, H, P)[1]
    assert (row.operation, row.calls_forward, row.calls_backward) == ("all_reduce", 0, 8)
    assert (row.elements, row.bytes) == (12 * H * H + 2 * H, 4 * (12 * H * H + 2 * H))
    assert row.saved_bytes == 2 * S * H * 16 + 4 * S * (2 * 2 + 16) + 24


def test_activations_grow_with_the_batch_and_gradients_do_not() -> None:
    one, three = table(S, H, P), table(S, H, P, batch=3)
    assert three[0].elements == 3 * one[0].elements
    assert three[1].elements == one[1].elements


def test_one_rank_sends_nothing() -> None:
    for row in table(S, H, 1):
        assert (row.operation, row.calls_forward, row.calls_backward, row.bytes) == ("none", 0, 0, 0)


def test_bad_sizes() -> None:
    with pytest.raises(UserError, match=r"^--degree 3 does not divide --hidden 2048 .*: use a hidden of 2046 or 2049$"):
        table(S, H, 3)
    with pytest.raises(UserError) as error:
        table(0, H, -1)
    assert len(str(error.value).splitlines()) == 2

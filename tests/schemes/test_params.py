"""Parameters: their parts cover the whole once, padding excluded, and partial gradients are named."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.config.tree import Layout, Model
from meshwright.schemes.params import ParamSpec, Split, num_parameters, param_specs


@given(size=st.integers(1, 60), log_degree=st.integers(0, 4), log_copies=st.integers(0, 4))
def test_parts_cover_a_parameter_once(size: int, log_degree: int, log_copies: int) -> None:
    degree, copies = 2**log_degree, 2 ** min(log_copies, log_degree)
    spec = ParamSpec("w", (size, 3), Split("tensor", degree, 0, degree // copies))
    seen = [row for rank in range(0, degree, copies) for row in range(*spec.span(rank))]
    assert seen == list(range(size))
    assert all(spec.span(rank) == spec.span(rank - rank % copies) for rank in range(degree))
    assert all(end - start <= spec.local_shape[0] for start, end in map(spec.span, range(degree)))
    assert spec.partial_over == (None if copies == 1 else ("tensor", copies))


def test_key_and_value_are_shared_below_the_degree() -> None:
    model = Model(layers=1, d_model=32, d_ff=64, heads=8, kv_heads=2, head_dim=4, vocab_size=30, bias=True)
    specs = {spec.name: spec for spec in param_specs(model, Layout(tensor=8), 16)}
    assert specs["layers.0.attention.key.weight"].local_shape == (4, 32)
    assert [specs["layers.0.attention.key.weight"].span(t) for t in (0, 3, 4, 7)] == [(0, 4), (0, 4), (4, 8), (4, 8)]
    partial = {name for name, spec in specs.items() if spec.partial_over}
    assert partial == {f"layers.0.attention.{p}.{leaf}" for p in ("key", "value") for leaf in ("weight", "bias")}
    assert specs["embedding.weight"].local_shape == (4, 32), "30 rows on 8 ranks: 4 each, the last two padded"
    assert specs["layers.0.attention.output.bias"].split is None, "added after the sum, whole on every rank"


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_the_layout_changes_no_global_shape_and_no_seed(tensor: int) -> None:
    model = Model(layers=2, vocab_size=257, heads=8, kv_heads=4)
    whole, split = (param_specs(model, layout, 16) for layout in (Layout(), Layout(tensor=tensor)))
    assert [(s.name, s.shape, s.std, s.seed(7)) for s in whole] == [(s.name, s.shape, s.std, s.seed(7)) for s in split]
    assert len({s.seed(7) for s in whole}) == len(whole)
    assert sum(math.prod(s.shape) for s in whole) == num_parameters(model, 16)

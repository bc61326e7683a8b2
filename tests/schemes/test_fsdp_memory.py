"""FSDP on paper against the exercise's figures, the planner's account of the same model, and every degree tried."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.config.files import load_job
from meshwright.config.tree import Model
from meshwright.errors import UserError
from meshwright.planner.blocks import formula_of_blocks
from meshwright.schemes.fsdp_memory import HALF, SHARDED, Paper, text, worksheet

V5P = {"model": "xxl-ffn", "tokens": 8192, "device_gb": 95.0}
H100 = {"model": "xxl-ffn", "tokens": 8192, "device_gb": 80.0}
A = 8192 * 17_547_264

pairs = st.builds(
    lambda layers, d, ff, bias: Model(block="ffn", layers=layers, d_model=d, d_ff=ff, mlp="gelu", bias=bias),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
)
papers = st.builds(Paper, pairs, st.integers(1, 50), st.integers(1, 100_000))
shares = st.sampled_from(list(SHARDED.values()))


def figures(asked: dict[str, Any]) -> dict[str, Any]:
    return worksheet(**asked)["figures"]


def test_terms_of_the_exercise() -> None:
    found = figures(V5P)
    assert found["parameters"] == 126 * 2 * 16384 * 53248 == 219_848_638_464
    assert found["state_gib"] == {"masters": 819.0, "gradients": 819.0, "optimiser_states": 1638.0}
    assert found["saved_bytes_per_token"] == 126 * 2 * (16384 + 53248) == 17_547_264
    assert found["activation_bytes"] == A
    assert found["gathered_bytes"] == {"one_unit": 4 * 16384 * 53248, "with_prefetch": 8 * 16384 * 53248}


@pytest.mark.parametrize(("asked", "states", "half"), [(V5P, 38, 156), (H100, 44, 442)])
def test_degrees_of_the_exercise(asked: dict[str, Any], states: int, half: int) -> None:
    """By the formula as it is written, tried from 1."""
    room, P = asked["device_gb"] * 1e9, 219_848_638_464
    assert next(n for n in range(1, 1000) if 16 * P / n <= room) == states
    assert next(n for n in range(1, 1000) if 16 * P / n + A * (1 / 2 + 1 / (2 * n)) <= room) == half
    found = figures(asked)["activations"]
    assert found["none"]["smallest_degree"] == states
    assert found["half_sharded"]["smallest_degree"] == half
    assert found["not_sharded"]["smallest_degree"] is None


def test_terms_are_those_of_the_planner() -> None:
    """One device, one sequence: the same tensors in its footprint, but for AdamW's step counters of 4 bytes each."""
    sizes = {"batch": "1", "seq_len": "8192", "device": "cuda"}
    job = load_job("xxl-ffn", [(f"training.{name}", value) for name, value in sizes.items()])
    counted, ours = formula_of_blocks(job).footprint.bytes, figures(V5P)["state_bytes"]
    assert (counted["parameters"], counted["gradients"]) == (ours["masters"], ours["gradients"])
    assert counted["optimiser_states"] == ours["optimiser_states"] + 4 * 2 * 126
    assert counted["saved_activations"] == A


def test_expression_is_bytes_per_device() -> None:
    """The printed text, read as arithmetic."""
    written = figures(V5P)["bytes_per_device"].replace(",", "").replace("·", "*")
    for degree in (1, 38, 156, 442):
        found = eval(written, {"N": Fraction(degree), "T": 8192})
        exact = Paper(load_job("xxl-ffn").model, 8192, 1).bytes_per_device(degree)
        assert found == pytest.approx(float(exact), rel=1e-12)
    assert figures(V5P)["activations"]["half_sharded"]["bytes"] == 94_882_899_811


@given(papers, shares)
def test_smallest_degree_fits_and_the_next_below_does_not(paper: Paper, sharded: Fraction | None) -> None:
    degree = paper.smallest_degree(sharded)
    if degree is None:
        assert paper.bytes_per_device(10**12, sharded) > paper.device_bytes
        return
    assert paper.bytes_per_device(degree, sharded) <= paper.device_bytes
    assert degree == 1 or paper.bytes_per_device(degree - 1, sharded) > paper.device_bytes


@given(papers, shares, st.integers(1, 5000))
def test_gathered_weights_take_room_from_the_device(paper: Paper, sharded: Fraction | None, reserved: int) -> None:
    smaller = Paper(paper.model, paper.tokens, paper.device_bytes - reserved)
    assert paper.smallest_degree(sharded, reserved) == smaller.smallest_degree(sharded)


@given(papers, shares)
def test_degree_of_rows(paper: Paper, sharded: Fraction | None) -> None:
    """It fits and the next below does not; none only where a row of the largest weight per rank is too much."""

    def fits(degree: int) -> bool:
        kept = 0 if sharded is None else paper.activation_bytes(sharded, degree)
        return paper.rank_state_bytes(degree) + kept <= paper.device_bytes

    degree = paper.smallest_degree_of_rows(sharded)
    if degree is None:
        assert not fits(max(paper.smallest_degree(sharded) or 1, paper.model.d_model, paper.model.d_ff))
    else:
        assert fits(degree) and (degree == 1 or not fits(degree - 1))


@given(papers)
def test_rows_that_divide_are_the_formula(paper: Paper) -> None:
    assert paper.rank_state_bytes(1) == paper.bytes_per_device(1, None) == 16 * paper.num_parameters


def test_prose_about_rows() -> None:
    """156 and 442, and 44, are too few where rows are whole: by 10 MB, 112 MB and 40 MB."""
    paper = Paper(load_job("xxl-ffn").model, 8192, 0)
    for degree, room, kept, over in ((156, 95e9, True, 10), (442, 80e9, True, 112), (44, 80e9, False, 40)):
        nbytes = paper.rank_state_bytes(degree) + (paper.activation_bytes(HALF, degree) if kept else 0)
        assert round((float(nbytes) - room) / 1e6) == over
    assert figures(V5P)["activations"]["half_sharded"]["smallest_degree_of_rows"] == 157
    assert figures(H100)["activations"]["half_sharded"]["smallest_degree_of_rows"] == 444
    assert figures(H100)["activations"]["none"]["smallest_degree_of_rows"] == 45


def test_worksheet_and_text() -> None:
    found = worksheet(**V5P)
    assert (found["name"], found["inputs"]) == ("fsdp-memory", V5P)
    json.dumps(found, allow_nan=False)
    derivation = text(**V5P)
    for part in ("219,848,638,464", "1638.0 GiB", "17,547,264 B per token", "94,882,899,811"):
        assert part in derivation
    assert max(map(len, derivation.splitlines())) <= 105


def test_a_model_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.toml"
    path.write_text('[model]\nblock = "ffn"\nlayers = 2\nd_model = 8\nd_ff = 24\nmlp = "gelu"\n')
    found = figures({"model": str(path), "tokens": 3, "device_gb": 1.0})
    assert found["parameters"] == 2 * 2 * 8 * 24
    assert found["activation_bytes"] == 3 * 2 * 2 * (8 + 24)


def test_mistakes_come_at_once() -> None:
    with pytest.raises(UserError) as error:
        worksheet(model="quickstart", tokens=0, device_gb=-1.0)
    assert str(error.value).splitlines() == [
        "--tokens 0 must be between 1 and 2**40: use 1",
        "--device-gb -1.0 must be between 1 and 1000000.0: use 1",
        "--model quickstart is a decoder (this exercise counts the inputs of two linear layers a block): use xxl-ffn, "
        "a file with model.block = ffn, or meshwright plan quickstart",
    ]
    with pytest.raises(UserError, match="xxl-fn is neither a file nor in the catalog's models: did you mean xxl-ffn"):
        worksheet(model="xxl-fn", tokens=1, device_gb=95.0)

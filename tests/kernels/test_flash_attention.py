"""The flash kernels, forward and backward, against float64: on the GPU, or through Triton's interpreter.

Blocks are made small, so that problems of a few dozen tokens have three blocks of queries and of keys, both ragged.
"""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import sampled
from reference import strides
from reference.flash import DTYPES, Problem, assert_flash, assert_judged, flash, tiled, worst

from meshwright.kernels import flash_attention, flash_launch
from meshwright.kernels.flash_attention import flash_backward, flash_forward
from meshwright.kernels.reference import tiled_attention
from meshwright.schemes.flash import FlashTile

SMALL = FlashTile(16, 16, 16, 16, 16, 16)
"""For 40 queries or keys: two whole blocks and a rest."""

OBLONG = (FlashTile(32, 16, 16, 32, 32, 16), FlashTile(16, 32, 32, 16, 16, 32), FlashTile(64, 16, 16, 64, 64, 16))
"""For 72: at least two blocks either way, the last ragged. The diagonal crosses them in more than one place."""


@pytest.fixture
def flash_tiles(monkeypatch):
    """`flash_tiles(tile)` sets the blocks of every call; small ones at first."""

    def use(tile):
        monkeypatch.setattr(flash_attention, "flash_tile", lambda head_dim, itemsize: tile)

    use(SMALL)
    return use


small = pytest.mark.usefixtures("flash_tiles")

# --- what is computed -------------------------------------------------------------------------------------------------

HEADS = ((1, 1), (2, 1), (4, 2), (4, 1), (2, 2))


@small
@pytest.mark.parametrize(
    ("dtype", "D", "causal", "heads"),
    sampled(itertools.product(DTYPES, (16, 32, 64, 128, 256), (True, False), HEADS), every=21),
)
def test_flash_dtypes_head_dims_and_heads(flash_device, dtype, D, causal, heads):
    assert_flash(Problem(H=heads[0], K=heads[1], D=D, causal=causal), dtype, flash_device)


SHAPES = {
    "whole blocks": Problem(48, 48),
    "whole blocks, full": Problem(48, 48, causal=False),
    "one block": Problem(16, 16),
    "less than a block": Problem(5, 5),
    "less than a block, full": Problem(5, 3, causal=False),
    "one query, all keys": Problem(1, 40, offset=39),
    "one key": Problem(40, 1),
    "one query, one key": Problem(1, 1),
    "more keys": Problem(40, 56, offset=16),
    "more keys, full": Problem(33, 70, causal=False),
    "more queries": Problem(56, 40),
    "more queries, full": Problem(56, 40, causal=False),
    "one past a block": Problem(17, 33),
    "one past a block, full": Problem(33, 17, causal=False),
    "offset of half a block": Problem(40, 40, offset=8),
    "offset of a block": Problem(40, 40, offset=16),
    "offset of one": Problem(40, 40, offset=1),
    "one less than a block": Problem(40, 40, offset=15),
    "two less than a block": Problem(40, 40, offset=14),
    "offset of minus one": Problem(40, 40, offset=-1),
    "minus one less than a block": Problem(40, 40, offset=-15),
    "every key is seen": Problem(40, 40, offset=39),
    "every key but one": Problem(40, 40, offset=38),
    "offset beyond all keys": Problem(40, 40, offset=1000),
    "offset beyond 32 bits": Problem(40, 40, offset=2**31 - 10),
    "offset far below": Problem(40, 40, offset=-(2**40)),
    "some queries see nothing": Problem(40, 40, offset=-5),
    "a block sees nothing": Problem(40, 40, offset=-16),
    "more than a block sees nothing": Problem(40, 40, offset=-23),
    "the last query sees one key": Problem(40, 40, offset=-39),
    "nobody sees anything": Problem(40, 40, offset=-40),
    "nobody, by far": Problem(40, 24, offset=-1000),
    "no keys": Problem(40, 0, offset=3),
    "no keys, full": Problem(40, 0, causal=False),
    "a batch": Problem(33, 33, B=3, H=2, K=2),
}


def in_turns(cases):
    """Each case with each dtype; by default with one, which is another for the next case."""
    pairs = [(case, dtype, (i + j) % len(DTYPES)) for i, case in enumerate(cases) for j, dtype in enumerate(DTYPES)]
    return [
        pytest.param(case, dtype, marks=[pytest.mark.slow] if later else [], id=f"{case} {dtype}")
        for case, dtype, later in pairs
    ]


@small
@pytest.mark.parametrize(("shape", "dtype"), in_turns(SHAPES))
def test_flash_lengths_and_offsets(flash_device, shape, dtype):
    assert_flash(SHAPES[shape], dtype, flash_device)


@pytest.mark.parametrize(
    ("tile", "causal", "offset", "dtype"),
    sampled(itertools.product(OBLONG, (True, False), (0, 20, -20), (torch.float32, torch.bfloat16)), every=12),
)
def test_flash_oblong_blocks(flash_device, flash_tiles, tile, causal, offset, dtype):
    flash_tiles(tile)
    assert_flash(Problem(72, 72, causal=causal, offset=offset), dtype, flash_device)


@small
@pytest.mark.slow
@given(
    S=st.integers(1, 70),
    Z=st.integers(0, 70),
    heads=st.sampled_from(HEADS),
    D=st.sampled_from((16, 32)),
    causal=st.booleans(),
    offset=st.integers(-80, 80),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flash_any_shape(flash_device, S, Z, heads, D, causal, offset, dtype):
    """Compared with its textbook: of a handful of numbers the naive ones may all happen to be rounded well."""
    assert_flash(Problem(S, Z, *heads, D, causal, offset), dtype, flash_device, peer=tiled)


@pytest.mark.parametrize(
    ("dtype", "D", "causal"), sampled(itertools.product(DTYPES, (64, 256), (True, False)), every=7)
)
def test_flash_blocks_as_they_are(flash_device, dtype, D, causal):
    """Three of the largest blocks either way, the last ragged."""
    length = 300 if D == 64 else 140
    assert_flash(Problem(length, length - 10, D=D, causal=causal), dtype, flash_device)


@small
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_flash_heads_in_groups(flash_device, monkeypatch, at_once):
    """Programs take so many heads side by side; elsewhere all of a small problem are one group."""
    monkeypatch.setattr(flash_launch, "_at_once", lambda num_heads, length, plan: at_once)
    monkeypatch.setattr(flash_launch, "_step", flash_launch._step.__wrapped__)
    assert_flash(Problem(20, 20, H=3, K=3, B=2), torch.float32, flash_device)


@small
def test_flash_large_scores(flash_device):
    """Scores of hundreds: the softmax is one-hot, and nothing overflows.

    Weights made again from a log-sum-exp of hundreds have its rounding, which whole rows have not.
    """
    for dtype in (torch.float32, torch.float16):
        q, k, v, dout = Problem(H=1).tensors(dtype, flash_device)
        found = flash(20 * q, 20 * k, v, dout, causal=True)
        assert all(x.isfinite().all() for x in found)
        assert_judged(found, [20 * q, 20 * k, v, dout], tiled, causal=True)


@small
@pytest.mark.parametrize("fault", [{"offset": 1}, {"offset": -1}, {"offset": 16}, {"causal": False}], ids=str)
def test_flash_a_wrong_mask_is_noticed(flash_device, fault):
    """A test of the tests."""
    with pytest.raises(AssertionError):
        assert_flash(Problem(), torch.bfloat16, flash_device, lambda *given, **mask: flash(*given, **(mask | fault)))


FAULTS = {
    "out is scaled by 1 + 2^-7": ("out", lambda x: x * (1 + 2**-7)),
    "base-2 log-sum-exp": ("lse", lambda x: x / 0.6931472),
    "dq misses 1/sqrt(D)": ("dq", lambda x: 4 * x),
    "dk of one query head only": ("dk", lambda x: x / 2),
    "dv of the neighbouring key": ("dv", lambda x: x.roll(1, 1)),
}


@small
def test_flash_a_wrong_result_is_noticed(flash_device):
    problem = Problem()
    given = problem.tensors(torch.bfloat16, flash_device)
    found = flash(*given, **problem.mask)
    for name, spoil in FAULTS.values():
        spoilt = found._replace(**{name: spoil(getattr(found, name))})
        with pytest.raises(AssertionError, match=name):
            assert_judged(spoilt, given, **problem.mask)


# --- in whatever storage ----------------------------------------------------------------------------------------------


STORAGES = (
    "heads_first",
    "packed",
    "padded",
    "odd",
    "dims_apart",
    "shared_heads",
    "shared_batch",
    "one_number",
    "all_unlike",
)


@small
@pytest.mark.parametrize(("storage", "dtype"), in_turns(STORAGES))
def test_flash_storage(flash_device, storage, dtype):
    problem = Problem(19, 19, H=4, K=2, B=2)
    given = getattr(strides, storage)(problem.tensors(dtype, flash_device))
    assert_flash(problem, dtype, flash_device, given=given)


@small
def test_flash_saved_tensors_of_any_storage(flash_device):
    """A ring gives backward rows of the whole output and log-sum-exp."""
    problem = Problem(24, 24, H=4, K=2, B=2, offset=-3)
    q, k, v, dout = problem.tensors(torch.float32, flash_device)
    out, lse = flash_forward(q, k, v, **problem.mask)
    expected = flash_backward(dout, q, k, v, out, lse, **problem.mask)
    wide = lse.new_zeros(2, 4, 60)
    wide[..., 7:31] = lse
    for stored in (wide[..., 7:31], lse.mT.contiguous().mT, lse.transpose(0, 1).contiguous().transpose(0, 1)):
        found = flash_backward(dout, q, k, v, strides.heads_first([out])[0], stored, **problem.mask)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@small
def test_flash_inputs_are_left_alone(flash_device):
    given = Problem().tensors(torch.bfloat16, flash_device)
    before = [x.clone() for x in given]
    out, lse = flash_forward(*given[:3], causal=True)
    saved = out.clone(), lse.clone()
    flash_backward(given[3], *given[:3], out, lse, causal=True)
    assert all(torch.equal(a, b) for a, b in zip([*given, out, lse], [*before, *saved], strict=True))


# --- more than 2³¹ elements -------------------------------------------------------------------------------------------

FAR = 3 * 2**29
"""The third of something begins past element 2³¹, though each step is less than that."""


@pytest.fixture(scope="module")
def flash_vast():
    """3·2³⁰ and some elements of bfloat16, 6 GiB: on the CPU nothing but the pages that are touched exists."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    try:
        return torch.empty(2 * FAR + 2**20, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:
        pytest.skip(f"this machine promises no 6 GiB of memory: {error}")


FAR_APART = {
    "batch": (Problem(20, 20, H=2, K=1, B=3), lambda H, S, D: (FAR, H * D, D)),
    "head": (Problem(20, 20, H=3, K=3), lambda H, S, D: (S * D, D, FAR)),
    "token": (Problem(20, 20, H=2, K=1), lambda H, S, D: (S * D, 2 * FAR // 19, D)),
    "one batch past all": (Problem(20, 20, H=2, K=1, B=2), lambda H, S, D: (2 * FAR, H * D, D)),
}


@small
@pytest.mark.parametrize("far_apart", FAR_APART)
def test_flash_addresses_past_32_bits(flash_device, flash_vast, far_apart):
    problem, strides = FAR_APART[far_apart]
    given = []
    for index, x in enumerate(problem.tensors(torch.bfloat16, flash_device)):
        _, S, H, D = x.shape
        there = flash_vast.as_strided(x.shape, (*strides(H, S, D), 1), index * 2**16)
        given.append(there.copy_(x))
    assert_flash(problem, torch.bfloat16, flash_device, given=given)


# --- again ------------------------------------------------------------------------------------------------------------


@small
def test_flash_equal_inputs_give_equal_bits(flash_device):
    """On a GPU: enough programs at once for sums to come in another order, if there were any that could."""
    on_gpu = flash_device.type == "cuda"
    problem = Problem(2048 if on_gpu else 40, 2000 if on_gpu else 40, H=8 if on_gpu else 2, D=64)
    for dtype in DTYPES if on_gpu else (torch.bfloat16,):
        given = problem.tensors(dtype, flash_device)
        first, *others = [flash(*given, **problem.mask) for _ in range(3 if on_gpu else 2)]
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@small
def test_flash_equals_its_textbook(flash_device):
    """The kernel and `tiled_attention` do the same in the same order: what differs is how exponentials are made."""
    q, k, v, _ = Problem(H=4, K=2).tensors(torch.float32, flash_device)
    for found, expected in zip(
        flash_forward(q, k, v, causal=True),
        tiled_attention(q, k, v, causal=True, block_q=16, block_k=16),
        strict=True,
    ):
        assert worst(found, expected.double()) <= 2e-6

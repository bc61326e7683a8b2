"""Norms, rotary embedding, positions and activations: outputs and every gradient against plain formulas."""

import math

import pytest
import torch
from reference.precision import assert_exact, assert_within_twice

from meshwright.config.tree import RopeScaling
from meshwright.kernels import pointwise

B, S, E, P, N, D = 3, 5, 16, 9, 2, 8
EPS = 1e-3


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def plain_rms_norm(x, w):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS) * w, x * 1


def plain_layer_norm(x, w, b=0.0):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + EPS) * w + b, x * 1


def ours_rope(x, positions):
    dtype = pointwise.accumulation_dtype(x.dtype)
    return pointwise.rope(x, pointwise.rope_tables(positions, D, 100.0, RopeScaling(), dtype))


def plain_rope(x, positions):
    frequencies = torch.tensor([100.0 ** (-2 * j / D) for j in range(D // 2)], dtype=torch.float64)
    angles = positions.double()[:, None, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def plain_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


x, w, b = randn(B, S, E), randn(E), randn(E, seed=1)
heads, positions = randn(B, S, N, D), torch.tensor([0, 1, 5, 2, 7])

OPERATIONS = {
    "rms_norm": (lambda x, w: pointwise.rms_norm(x, w, EPS), plain_rms_norm, (x, w), (1,)),
    "rms_norm without residual": (
        lambda x, w: pointwise.rms_norm(x, w, EPS)[0],
        lambda x, w: plain_rms_norm(x, w)[0],
        (x, w),
        (1,),
    ),
    "layer_norm": (lambda x, w, b: pointwise.layer_norm(x, w, b, EPS), plain_layer_norm, (x + 2, w, b), (1, 2)),
    "layer_norm without bias": (
        lambda x, w: pointwise.layer_norm(x, w, None, EPS)[0],
        lambda x, w: plain_layer_norm(x, w)[0],
        (x, w),
        (1,),
    ),
    "rope": (ours_rope, plain_rope, (heads, positions), ()),
    "add_positions": (
        pointwise.add_positions,
        lambda x, table, p: x + table[p],
        (x, randn(P, E), positions),
        (1,),
    ),
    "gated_silu": (pointwise.gated_silu, lambda g, u: g * torch.sigmoid(g) * u, (x, randn(B, S, E, seed=2)), ()),
    "gelu": (pointwise.gelu, plain_gelu, (x,), ()),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_float64(name):
    ours, plain, inputs, _ = OPERATIONS[name]
    assert_exact(ours, plain, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_twice_the_error_of_plain_pytorch(name, dtype):
    ours, plain, inputs, masters = OPERATIONS[name]
    assert_within_twice(ours, plain, inputs, dtype, masters)


@pytest.mark.parametrize("name", OPERATIONS)
def test_inputs_and_output_gradients_stay(name):
    """Work in place is done on tensors of our own."""
    ours, _, inputs, _ = OPERATIONS[name]
    leaves = [v.clone().requires_grad_(v.is_floating_point()) for v in inputs]
    outputs = ours(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    dys = [torch.randn_like(y) for y in outputs]
    before = [dy.clone() for dy in dys]
    torch.autograd.backward(outputs, dys)
    assert all(torch.equal(leaf, value) for leaf, value in zip(leaves, inputs, strict=True))
    assert all(torch.equal(dy, copy) for dy, copy in zip(dys, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    """Outputs and input gradients in the compute dtype, parameter gradients in the parameter's."""
    leaf, weight = x.to(dtype).requires_grad_(), w.float().requires_grad_()
    for ours in (
        lambda: pointwise.rms_norm(leaf, weight, EPS),
        lambda: pointwise.layer_norm(leaf, weight, weight, EPS),
    ):
        h, residual = ours()
        assert h.dtype == residual.dtype == dtype
        dx, dw = torch.autograd.grad((h.sum(), residual.sum()), (leaf, weight))
        assert (dx.dtype, dw.dtype) == (dtype, torch.float32)


def test_rope_turns_by_distance_only():
    """Scores of queries and keys depend on the difference of their positions."""
    q, k = randn(1, S, 1, D), randn(1, S, 1, D, seed=1)
    near, far = torch.arange(S), torch.arange(S) + 1000

    def scores(positions):
        return torch.einsum("bsnd,btnd->bst", ours_rope(q, positions), ours_rope(k, positions))

    assert torch.allclose(scores(near), scores(far), rtol=0, atol=1e-11)


LLAMA_3_1 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192)


def test_scaled_frequencies_by_hand():
    """Of 1000 original positions: 159 and 15.9 turns stay, 1.59 is between 1 and 4, 0.159 is divided by 4."""
    turns = 0.01 * 1000 / (2 * math.pi)
    kept = (turns - 1) / 3
    between = 0.01 * kept + 0.0025 * (1 - kept)
    assert between == pytest.approx(0.003978873577, rel=1e-9)
    frequencies = pointwise.rope_frequencies(8, 10000.0, RopeScaling(4.0, 1.0, 4.0, 1000))
    assert frequencies.tolist() == pytest.approx([1.0, 0.1, between, 0.00025], rel=1e-14)


def test_frequencies_of_llama_3_1():
    """Computed once with 40 decimal digits: pairs 1 and 28 keep theirs, 29 to 34 are between, from 35 an eighth."""
    frequencies = pointwise.rope_frequencies(128, 500000.0, LLAMA_3_1)
    assert frequencies.dtype == torch.float64 and frequencies.shape == (64,)
    assert {pair: frequencies[pair].item() for pair in (0, 1, 28, 29, 32, 34, 35, 63)} == pytest.approx(
        {
            0: 1.0,
            1: 0.814617233856544704,
            28: 0.00321144599475259102,
            29: 0.00216657076350335861,
            32: 0.000524846160992954670,
            34: 0.000178507812767996419,
            35: 0.0000955621235396468302,
            63: 0.000000306892598891451109,
        },
        rel=1e-13,
    )


def test_a_factor_of_1_scales_nothing():
    """Whatever the other fields say, bit for bit."""
    plain = 10000.0 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    for scaling in (RopeScaling(), RopeScaling(factor=1.0, low_freq_factor=0.3, original_positions=50)):
        assert torch.equal(pointwise.rope_frequencies(128, 10000.0, scaling), plain)
    angles = positions[:, None] * plain
    tables = pointwise.rope_tables(positions, 128, 10000.0, RopeScaling(), torch.float64)
    assert torch.equal(tables, torch.stack((angles.cos(), angles.sin()))[:, :, None])


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [
        (128, 500000.0, LLAMA_3_1),
        (64, 500000.0, RopeScaling(factor=32.0)),
        (8, 1000.0, RopeScaling(4.0, 0.25, 2.0, 16)),
    ],
    ids=["Llama 3.1", "Llama 3.2", "tiny"],
)
def test_scaled_tables_equal_those_of_transformers(head_dim, theta, scaling):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_positions,
    }
    config = transformers.LlamaConfig(head_dim=head_dim, max_position_embeddings=131072, rope_parameters=parameters)
    theirs, amplitude = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert amplitude == 1
    # Theirs are float32: an eps of the logarithm, up to ln(theta) = 13, is lost, and a few more in the interpolation.
    precision = 16 * torch.finfo(torch.float32).eps
    ours = pointwise.rope_frequencies(head_dim, theta, scaling)
    assert ((ours - theirs).abs() <= precision * theirs).all()

    where = torch.tensor([0, 1, 15, 16, 8191, 8192, 131071])
    angles = where[:, None] * theirs.double()
    tables = pointwise.rope_tables(where, head_dim, theta, scaling, torch.float64)
    assert tables.shape == (2, len(where), 1, head_dim // 2)
    error = (tables[:, :, 0] - torch.stack((angles.cos(), angles.sin()))).abs()
    assert (error <= precision * angles).all()  # a cosine changes no faster than its angle

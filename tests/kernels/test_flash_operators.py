"""The flash kernels as operators of torch: schema, fake tensors for a rehearsal, and FLOPs of the tiles they visit."""

import itertools

import pytest
import torch
from jobs import sampled
from reference.flash import Problem
from reference.strides import dims_apart, heads_first, plain
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from meshwright.kernels import flash_attention
from meshwright.kernels.flash_attention import flash_backward, flash_forward
from meshwright.schemes.flash import FlashTile, Mask, backward_flops, forward_flops, visited_tiles

TILE = FlashTile(32, 16, 16, 32, 16, 16)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(flash_attention, "flash_tile", lambda head_dim, itemsize: TILE)


PROBLEMS = {
    "causal": Problem(40, 40),
    "full": Problem(40, 24, causal=False),
    "offset": Problem(40, 56, H=4, K=2, offset=9),
    "rows that see nothing": Problem(40, 40, offset=-20),
    "nobody sees anything": Problem(40, 40, offset=-40),
    "no keys": Problem(40, 0, causal=False),
}
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("name", PROBLEMS)
def test_flash_operator_check(flash_device, name):
    """torch's own: nothing but what the schema says is changed, outputs are no views, fake equals real."""
    problem = PROBLEMS[name]
    q, k, v, dout = problem.tensors(torch.float32, flash_device)
    checks = "test_schema", "test_faketensor", "test_autograd_registration"
    operators, mask = torch.ops.meshwright, (problem.causal, problem.offset)
    torch.library.opcheck(operators.flash_forward.default, (q, k, v, *mask), test_utils=checks)
    out, lse = operators.flash_forward(q, k, v, *mask)
    torch.library.opcheck(operators.flash_delta.default, (out, dout), test_utils=checks)
    delta = operators.flash_delta(out, dout)
    torch.library.opcheck(operators.flash_backward.default, (dout, q, k, v, lse, delta, *mask), test_utils=checks)


def described(x):
    return x.shape, x.stride(), x.dtype, x.device.type


@pytest.mark.parametrize("storage", [plain, heads_first, dims_apart])
@pytest.mark.parametrize(("name", "dtype"), sampled(itertools.product(PROBLEMS, DTYPES), every=5))
def test_flash_fake_results_are_laid_out_as_real_ones(flash_device, name, dtype, storage):
    problem = PROBLEMS[name]
    real = storage(problem.tensors(dtype, flash_device))

    def run(q, k, v, dout):
        out, lse = flash_forward(q, k, v, **problem.mask)
        return out, lse, *flash_backward(dout, q, k, v, out, lse, **problem.mask)

    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = run(*(mode.from_tensor(x) for x in real))
    assert [described(x) for x in fake] == [described(x) for x in run(*real)]


@pytest.mark.parametrize("name", PROBLEMS)
def test_flash_flops_are_those_of_the_tiles_visited(flash_device, flash_counted, name):
    """By formula, by torch's counter, and, where the kernels are interpreted, by what they multiplied."""
    problem = PROBLEMS[name]
    q, k, v, dout = problem.tensors(torch.float32, flash_device)
    sizes = problem.B, problem.H, problem.S, problem.Z, problem.D, TILE, Mask(problem.causal, problem.offset)
    with FlopCounterMode(display=False) as counter:
        out, lse = flash_forward(q, k, v, **problem.mask)
        forward = counter.get_total_flops(), flash_counted and flash_counted.flops
        flash_backward(dout, q, k, v, out, lse, **problem.mask)
    expected = forward_flops(*sizes), backward_flops(*sizes)
    assert (forward[0], counter.get_total_flops() - forward[0]) == expected
    if flash_counted is not None:
        assert (forward[1], flash_counted.flops - forward[1]) == expected


def test_flash_flops_by_hand():
    """40 queries and keys, causal. Forward, 32 × 16: the first block sees 2 of 3 blocks of keys, the second all."""
    assert visited_tiles(40, 40, 32, 16, True) == 2 + 3
    assert visited_tiles(40, 40, 16, 32, True) == 1 + 1 + 2
    assert visited_tiles(40, 40, 16, 16, True) == 1 + 2 + 3
    sizes = 3, 2, 40, 40, 64, TILE, Mask(True)
    product = 2 * 3 * 2 * 64
    assert forward_flops(*sizes) == 2 * product * 5 * 32 * 16
    assert backward_flops(*sizes) == 4 * product * 4 * 16 * 32 + 3 * product * 6 * 16 * 16


REFUSED = {
    "three dims": (lambda q, k, v: (q[0], k[0], v[0]), r"takes \[B, S, H, D\]"),
    "other values": (lambda q, k, v: (q, k, v[:, 1:]), "must have one shape"),
    "another batch": (lambda q, k, v: (q.expand(2, -1, -1, -1), k, v), "q's batch"),
    "3 heads for 2": (lambda q, k, v: (q[:, :, :3], k, v), "a multiple of key heads"),
    "head_dim 24": (
        lambda q, k, v: tuple(x.repeat(1, 1, 1, 2)[..., :24] for x in (q, k, v)),
        "head_dim must be one of 16",
    ),
    "float64": (lambda q, k, v: (q.double(), k.double(), v.double()), "they are float64, float64, float64"),
    "two dtypes": (lambda q, k, v: (q, k.half(), v), "they are float32, float16, float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_flash_refuses_what_it_does_not_take(flash_device, name):
    spoil, message = REFUSED[name]
    q, k, v, _ = Problem(8, 8, H=4, K=2).tensors(torch.float32, flash_device)
    with pytest.raises(ValueError, match=message):
        flash_forward(*spoil(q, k, v), causal=True)


SPOILT = {
    "dout of another dtype": ({"dout": torch.Tensor.half}, "dout must be torch.float32"),
    "half of dout": ({"dout": lambda x: x[:, :4]}, r"dout must be torch.float32 \(1, 8, 4, 16\)"),
    "a shorter lse": ({"lse": lambda x: x[..., :4]}, r"lse must be torch.float32 \(1, 4, 8\)"),
    "lse in half precision": ({"lse": torch.Tensor.half}, "lse must be torch.float32"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_flash_backward_refuses_what_does_not_belong_together(flash_device, name):
    """It would read past the end of what is too short, or take numbers for others."""
    spoil, message = SPOILT[name]
    q, k, v, dout = Problem(8, 8, H=4, K=2).tensors(torch.float32, flash_device)
    out, lse = flash_forward(q, k, v, causal=True)
    given = {"dout": dout, "lse": lse}
    given |= {key: change(given[key]) for key, change in spoil.items()}
    with pytest.raises(ValueError, match=message):
        flash_backward(given["dout"], q, k, v, out, given["lse"], causal=True)
    with pytest.raises(ValueError, match="dout must be"):
        torch.ops.meshwright.flash_delta(out, dout[:, :4])

"""Every launch of the flash kernels that this GPU may choose, in its own tiles, against float64.

Lengths are ragged, with at least three blocks of queries and of keys.
"""

from dataclasses import replace

import pytest
import torch
from reference.flash import Problem, assert_flash

from meshwright.config.attention import FLASH_HEAD_DIMS
from meshwright.kernels import flash_attention, flash_launch
from meshwright.kernels.flash_tuning import KERNELS, candidates
from meshwright.kernels.flash_tuning import Problem as Launched

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CAUSAL = (
    Problem(S=333, Z=333, H=4, K=2, B=2),
    Problem(S=290, Z=517, H=2, K=1, offset=227),
    Problem(S=517, Z=290, H=2, K=1, offset=-150),
    Problem(S=1, Z=300, H=2, K=1, offset=299),
)
FULL = Problem(S=290, Z=385, H=2, K=1, causal=False)
"""Two heads share one in all of them: another number, and another kind of mask, would be compiled anew."""


def capability():
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return 10 * major + minor


def launches():
    """dtype, head_dim, kernel and candidate: all for bfloat16 at 64 and 128, the defaults elsewhere."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in FLASH_HEAD_DIMS:
            every = dtype == torch.bfloat16 and head_dim in (64, 128)
            for kernel in KERNELS:
                launched = [Launched(capability(), dtype.itemsize, head_dim, aligned) for aligned in (True, False)]
                options = dict.fromkeys(option for one in launched for option in candidates(kernel, one))
                for index, option in enumerate(list(options)[: None if every else 1]):
                    name = f"{dtype} {head_dim} {kernel} {option}"
                    yield pytest.param(dtype, head_dim, kernel, option, index == 0, id=name)


@pytest.mark.parametrize(("dtype", "head_dim", "kernel", "option", "is_default"), list(launches()))
def test_flash_launches_on_this_gpu(monkeypatch, dtype, head_dim, kernel, option, is_default):
    default = flash_launch.chosen

    def choose(name, launched):
        return option if name == kernel else default(name, launched)

    monkeypatch.setattr(flash_launch, "chosen", choose)
    for problem in (*CAUSAL, *([FULL] if is_default else [])):
        assert_flash(replace(problem, D=head_dim), dtype, torch.device("cuda"))


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_flash_other_shares_of_heads(head_dim, heads, kv_heads):
    problem = Problem(S=300, Z=300, H=heads, K=kv_heads, D=head_dim)
    assert_flash(problem, torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_flash_equal_bits_on_this_gpu(head_dim):
    """Enough programs at once for sums to come in another order, if any could."""
    problem = Problem(S=4096, Z=4096, H=16, K=4, D=head_dim)
    q, k, v, dout = problem.tensors(torch.bfloat16, torch.device("cuda"))
    results = []
    for _ in range(3):
        out, lse = flash_attention.flash_forward(q, k, v, causal=True)
        results.append((out, lse, *flash_attention.flash_backward(dout, q, k, v, out, lse, causal=True)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_flash_strides_that_descriptors_cannot_read():
    """Rows of an odd length: read by pointers."""
    problem, odd = Problem(S=300, Z=300, H=2, K=2, D=64), []
    for x in problem.tensors(torch.bfloat16, torch.device("cuda")):
        storage = torch.empty(*x.shape[:-1], 67, dtype=x.dtype, device=x.device)
        odd.append(storage[..., 1:65].copy_(x))
    assert_flash(problem, torch.bfloat16, torch.device("cuda"), given=odd)


def test_flash_more_than_32_bits_of_elements_on_this_gpu():
    """2³¹ elements of q and out: the last sequence is as right as if it were alone."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    B, S, H, D = 2**14 + 1, 64, 16, 128
    given = [torch.randn(B, S, heads, D, device="cuda", dtype=torch.bfloat16) for heads in (H, 2, 2)]
    assert given[0].numel() > 2**31
    out, lse = flash_attention.flash_forward(*given, causal=True)
    last = [x[-1:].clone() for x in given]
    alone = flash_attention.flash_forward(*last, causal=True)
    assert torch.equal(out[-1:], alone[0]) and torch.equal(lse[-1:], alone[1])
    gradients = flash_attention.flash_backward(out, *given, out, lse, causal=True)
    alone_gradients = flash_attention.flash_backward(alone[0], *last, *alone, causal=True)
    assert all(torch.equal(a[-1:], b) for a, b in zip(gradients, alone_gradients, strict=True))

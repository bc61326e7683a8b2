"""Triton's interpreter computes what a GPU would, where the flash kernels rely on it."""

import os

import numpy as np
import pytest
import torch
from reference.interpreter import VARIABLE, interpreted, rounded, widened

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


def as_interpreted(function):
    """What `triton.jit` returns where the environment says so."""
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(function)


def product(a_ptr, b_ptr, c_ptr, length, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    c = tl.zeros([N, N], tl.float32)
    for _ in range(0, length, N):
        c = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), c)
    tl.store(c_ptr + at, c.to(c_ptr.dtype.element_ty))


def nothing_seen(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.where(x == x, tl.exp2(x - tl.max(x, 0)), tl.log2(x)))


def bfloat16_sum(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + tl.load(x_ptr + i))


def far_away(x_ptr, y_ptr, step, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i * step, mask=i < 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_flash_interpreter_products(flash_counted, flash_device, dtype):
    """Small integers: exact in every order of summation, and rounded once, at the end."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-9, 10, (16, 16), generator=generator).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    as_interpreted(product)[(1,)](a, b, c, 33, N=16)
    assert torch.equal(c, (3 * (a.float() @ b.float())).to(dtype))
    assert flash_counted.products == [(16, 16, 16)] * 3
    assert flash_counted.flops == 3 * 2 * 16**3


def test_flash_interpreter_sums_products_as_pytorch(flash_device):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    c = torch.empty_like(a)
    as_interpreted(product)[(1,)](a, b, c, 1, N=256)
    assert torch.equal(c, a @ b)


def test_flash_interpreter_infinities(flash_device):
    x, y = torch.full((16,), -torch.inf), torch.empty(16)
    as_interpreted(nothing_seen)[(1,)](x, y, N=16)
    assert y.isnan().all()


def test_flash_interpreter_refuses_to_add_bits(flash_device):
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="cast to float32 first"):
        as_interpreted(bfloat16_sum)[(1,)](x, torch.empty_like(x), N=16)


def test_flash_interpreter_notices_an_index_past_32_bits(flash_device):
    x, y = torch.zeros(16), torch.zeros(16)
    as_interpreted(far_away)[(1,)](x, y, 2**27, N=16)
    with pytest.raises(Exception, match="int32 overflow"):
        as_interpreted(far_away)[(1,)](x, y, 2**28, N=16)


def test_flash_interpreter_rounds_as_torch():
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8 + 2**-16), 3e38, 1e-40, torch.inf, -torch.inf, 0.0])
    bits = rounded(values.numpy())
    assert bits.dtype == np.uint16
    assert torch.equal(torch.from_numpy(widened(bits)), values.bfloat16().float())


def test_flash_interpreter_leaves_nothing_behind():
    from triton.runtime import interpreter

    before = dict(vars(interpreter.InterpreterBuilder)), dict(os.environ)
    with interpreted():
        assert os.environ[VARIABLE] == "1"
    assert (dict(vars(interpreter.InterpreterBuilder)), dict(os.environ)) == before
    assert VARIABLE not in os.environ


def test_flash_interpreter_has_the_kernels_from_the_start():
    """Whatever was imported first, and in whatever order tests run."""
    from triton.runtime.interpreter import InterpretedFunction

    assert isinstance(tl.max, InterpretedFunction)

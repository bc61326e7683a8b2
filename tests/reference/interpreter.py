"""Triton's interpreter as the device of kernels where there is no GPU, mended where it differs from one.

Whether a function is interpreted is decided where it is decorated, by the environment: Triton's own library (`tl.max`)
at the first `import triton`, which torch's FLOP counter does, and our kernels when they are imported. So
`import_interpreted` must come before any such import; it leaves the environment as it was. Then kernels run inside
`interpreted()`, and only there: elsewhere in the process nothing has changed but that Triton compiles nothing.

Mended, each with a test in `test_flash_interpreter.py`:
- products of bfloat16 multiply the bits, as integers (other arithmetic would, too: it is refused);
- numpy's BLAS may sum one by one where PyTorch's sums in parts: kernels would be twice as far off as what they are
  compared with;
- float32 is cut off, not rounded, to bfloat16;
- infinities raise numpy's warnings, which pytest makes errors;
- integers past 32 bits wrap round without a word: they are refused;
- after a launch every storage is copied onto itself, whatever its size;
- each call of a function within a kernel prepares all of Triton's language again, a quarter of the time;
- Triton 3.6 cannot loop with the numpy of today.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch

VARIABLE = "TRITON_INTERPRET"


def import_interpreted() -> None:
    """Import Triton and our kernels as interpreted functions, on a machine without CUDA. First of all imports."""
    if torch.cuda.is_available():
        return
    with mock.patch.dict(os.environ, {VARIABLE: "1"}):
        try:
            import triton.language as tl
        except ImportError:
            return  # tests of kernels are skipped
        assert type(tl.max).__name__ == "InterpretedFunction", "something imported Triton before the tests did"
        import meshwright.kernels.flash_triton  # noqa: F401


class Counted:
    """What the kernels did."""

    def __init__(self) -> None:
        self.flops = 0
        """Of matrix products: two for each multiplication."""
        self.products: list[tuple[int, int, int]] = []
        """Rows, columns and summed length of each."""


@contextmanager
def interpreted() -> Iterator[Counted]:
    """Kernels run, as on a GPU; what they multiply is counted."""
    from triton.runtime import interpreter

    counted, builder, executor = Counted(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    prepared: set[int] = set()
    options = interpreter.interpreter_builder.options
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {VARIABLE: "1"}))
        stack.enter_context(np.errstate(all="ignore"))
        for owner, name, value in (
            (builder, "create_dot", _dot(interpreter, counted)),
            (builder, "cast_impl", _cast(interpreter, builder.cast_impl)),
            (builder, "binary_op", _binary(builder.binary_op)),
            (interpreter.interpreter_builder, "options", replace(options, sanitize_overflow=False)),  # ours is faster
            (executor, "_restore_args_dev", lambda *_: None),  # on the CPU they are the same memory
            (executor, "__call__", _launch(executor.__call__, prepared)),
            (interpreter, "_patch_lang", _prepare_once(interpreter._patch_lang, prepared)),
            (interpreter, "_patch_lang_tensor", _index(interpreter._patch_lang_tensor)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield counted


def _dot(interpreter: Any, counted: Counted) -> Any:
    """Exact products of 16-bit operands, summed in the accumulator's precision, and by PyTorch as its peers are."""

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        x, y = _values(a), _values(b)
        rows, columns, length = x.shape[-2], y.shape[-1], x.shape[-1]
        counted.products.append((rows, columns, length))
        counted.flops += 2 * rows * columns * length
        assert a.dtype == b.dtype, f"a product of {a.dtype} and {b.dtype}"
        product = torch.matmul(_tensor(x, d.data.dtype), _tensor(y, d.data.dtype)).numpy()
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    return create_dot


def _tensor(values: np.ndarray, dtype: np.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype))


def _values(handle: Any) -> np.ndarray:
    return widened(handle.data) if handle.dtype.scalar.name == "bf16" else handle.data


def _cast(interpreter: Any, plain: Any) -> Any:
    def cast_impl(self: Any, source: Any, to_type: Any) -> Any:
        pair = source.dtype.scalar.name, to_type.scalar.name
        if pair == ("bf16", "fp32"):
            return interpreter.TensorHandle(widened(source.data), to_type.scalar)
        if pair == ("fp32", "bf16"):
            return interpreter.TensorHandle(rounded(source.data), to_type.scalar)
        assert "bf16" not in pair or pair[0] == pair[1], f"{pair[0]} to {pair[1]}: the interpreter would take the bits"
        return plain(self, source, to_type)

    return cast_impl


def _binary(plain: Any) -> Any:
    arithmetic = np.add, np.subtract, np.multiply

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        name = left.dtype.scalar.name
        assert name != "bf16", "the interpreter would compute with the bits: cast to float32 first"
        result = plain(self, left, right, op)
        if name == "int32" and op in arithmetic:
            exact = op(left.data.astype(np.int64), right.data.astype(np.int64))
            assert (exact == result.data).all(), f"int32 overflow: {op.__name__} gives {np.abs(exact).max()}"
        return result

    return binary_op


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32 values: to the nearest, to the even one of two."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.uint16).numpy()


def _launch(plain: Any, prepared: set[int]) -> Any:
    def launch(self: Any, *arguments: Any, **settings: Any) -> Any:
        prepared.clear()
        return plain(self, *arguments, **settings)

    return launch


def _prepare_once(plain: Any, prepared: set[int]) -> Any:
    """Once in a launch for the functions of a module: only the first caller, the launch, undoes it."""

    def prepare(function: Any) -> Any:
        if id(function.__globals__) in prepared:
            return None
        prepared.add(id(function.__globals__))
        return plain(function)

    return prepare


def mend_loops() -> None:
    """For the rest of a process that is interpreted throughout: mended in nothing else, it is Triton's own."""
    from triton.runtime import interpreter

    interpreter._patch_lang_tensor = _index(interpreter._patch_lang_tensor)


def _index(plain: Any) -> Any:
    def patch(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    return patch

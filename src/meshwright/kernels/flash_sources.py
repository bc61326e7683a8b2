"""Every launch of the flash kernels that may happen on a GPU, as sources that compile without one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from meshwright.config.attention import FLASH_HEAD_DIMS
from meshwright.kernels import flash_hopper, flash_triton
from meshwright.kernels.flash_launch import DELTA_ROWS
from meshwright.kernels.flash_tuning import KERNELS, Candidate, KernelName, Problem, candidates
from meshwright.schemes.flash import flash_tile

DTYPES = {"float32": ("fp32", 4, gl.float32), "float16": ("fp16", 2, gl.float16), "bfloat16": ("bf16", 2, gl.bfloat16)}
"""Name of a dtype in a signature, bytes of an element, and Triton's dtype."""

STATISTICS = ("lse", "delta")
MULTIPLES_OF_16 = (*(f"{x}{dim}" for x in "qkvdo" for dim in "bsh"), "S", "Z")
"""Strides and lengths, as they are where it matters."""
READ_BY_QUERIES, READ_BY_KEYS = ("q", "dout"), ("k", "v")
_BY_POINTERS = Candidate("triton", 4, 1)


def sources(capability: int) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Label, source and options for `triton.compile` of all that a device of a compute capability may run."""
    for dtype, head_dim in product(DTYPES, FLASH_HEAD_DIMS):
        yield f"delta {dtype} {head_dim}", *_delta(dtype, head_dim)
        for kernel in KERNELS:
            problems = (Problem(capability, DTYPES[dtype][1], head_dim, aligned) for aligned in (True, False))
            options = dict.fromkeys(option for p in problems for option in candidates(kernel, p))
            precisions = ("ieee", "tf32") if dtype == "float32" else ("ieee",)
            for option, causal, precision in product(options, (True, False), precisions):
                label = _label(kernel, dtype, head_dim, option, causal, precision)
                yield label, *_source(kernel, dtype, head_dim, option, causal, precision)


def _label(kernel: KernelName, dtype: str, head_dim: int, option: Candidate, causal: bool, precision: str) -> str:
    of = f"{dtype}{'' if precision == 'ieee' else f' {precision}'} {head_dim} {'causal' if causal else 'full'}"
    reads = "descriptors" if option.descriptors else "pointers"
    how = f"{option.implementation}{' late' if option.late else ''}, {reads}, {option.num_warps} × {option.num_stages}"
    return f"{kernel} {of} {how}"


def _delta(dtype: str, head_dim: int) -> tuple[Any, dict[str, Any]]:
    constants = {"D": head_dim, "ROWS": DELTA_ROWS}
    source = _of(ASTSource, flash_triton.delta, constants, dtype, (), head_dim, _BY_POINTERS)
    return source, {"num_warps": _BY_POINTERS.num_warps}


def _source(
    kernel: KernelName, dtype: str, head_dim: int, option: Candidate, causal: bool, precision: str
) -> tuple[Any, dict[str, Any]]:
    rows = flash_tile(head_dim, DTYPES[dtype][1]).of(kernel)
    constants: dict[str, Any] = {"D": head_dim, "BLOCK_Q": rows[0], "BLOCK_K": rows[1], "CAUSAL": causal}
    options: dict[str, Any] = {"num_warps": option.num_warps}
    if option.implementation == "hopper":
        element = DTYPES[dtype][2]
        q_shared, k_shared = (gl.NVMMASharedLayout.get_default_for([n, head_dim], element) for n in rows)
        constants |= {"STAGES": option.num_stages, "Q_SHARED": q_shared, "K_SHARED": k_shared}
        constants |= {"LATE": option.late} if kernel == "dkv" else {}
        function, of = getattr(flash_hopper, kernel), GluonASTSource
    else:
        constants |= {"DESCRIPTORS": option.descriptors, "PRECISION": precision}
        options |= {"num_stages": option.num_stages}
        function, of = getattr(flash_triton, kernel), ASTSource
    return _of(of, function, constants, dtype, rows, head_dim, option), options


def _of(
    kind: type, function: Any, constants: dict[str, Any], dtype: str, rows: tuple[int, ...], head_dim: int,
    option: Candidate,
) -> Any:  # fmt: skip
    """A kernel with the types of its arguments, pointers and strides aligned as tensors of a model are."""
    signature = {name: _type(name, constants, dtype, rows, head_dim, option) for name in function.arg_names}
    multiples = [i for i, (key, of) in enumerate(signature.items()) if of.startswith("*") or key in MULTIPLES_OF_16]
    return kind(function, signature, constants, {(i,): [["tt.divisibility", 16]] for i in multiples})


def _type(
    argument: str, constants: dict[str, Any], dtype: str, rows: tuple[int, ...], head_dim: int, option: Candidate
) -> str:
    """Triton's type of an argument of a kernel."""
    name, _, element = DTYPES[dtype]
    tensor = argument.removesuffix("_ptr").removesuffix("_desc")
    if argument in constants:
        return "constexpr"
    if argument in ("scale", "softmax_scale"):
        return "fp32"
    if tensor == argument:
        return "i32"
    if tensor in STATISTICS:
        return "*fp32"
    if not option.descriptors or tensor not in READ_BY_QUERIES + READ_BY_KEYS:
        return f"*{name}"
    block = [1, 1, rows[0 if tensor in READ_BY_QUERIES else 1], head_dim]
    shape = ",".join(map(str, block))
    if option.implementation == "triton":
        return f"tensordesc<{name}[{shape}]>"
    return f"tensordesc<{name}[{shape}],{gl.NVMMASharedLayout.get_default_for(block, element)!r}>"

"""How a call of flash attention becomes launches: arguments, and what Triton compiled for their like.

Triton looks at every argument of a launch to find the kernel that it compiled for such: 100 µs and more, while a GPU
computes a short sequence in less. Here what depends on shapes alone is worked out once for each (`_Plan`), and compiled
kernels are looked up by the little that they depend on.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple

import torch

from meshwright.kernels.flash_tuning import Candidate, KernelName, Problem, candidates, chosen
from meshwright.schemes.flash import FlashTile

LOG2_E = 1.4426950408889634
L2_BYTES = 32 << 20
"""Keys and values of the heads that are computed side by side should fit in this."""
FEWEST_AT_ONCE = 4
DELTA_ROWS = 64

_ROWS_OF_INPUTS = (0, 1, 1, 0)
"""q, k, v and dout: whether a tile has a block's queries or keys."""

_compiled: dict[tuple[object, ...], Any] = {}
_fitting: dict[tuple[KernelName, Problem], Candidate] = {}
"""What runs where the choice needs more shared memory than there is."""


class Call:
    """Inputs of one call, q, k, v and, for backward, dout; all [B, S or Z, H or K, D]."""

    def __init__(self, inputs: tuple[torch.Tensor, ...], causal: bool, offset: int, tile: FlashTile) -> None:
        self.inputs = tuple(readable(x) for x in inputs)
        q, k = self.inputs[:2]
        offset = max(-q.shape[1], min(offset, k.shape[1]))  # beyond, it hides or shows everything
        geometry = tuple((x.shape, x.stride()) for x in self.inputs)
        self._plan = _plan(geometry, q.dtype, q.device, causal, offset, tile, _precision(q.dtype))
        self.problem = self._plan.problem
        if self.problem.aligned and any(x.data_ptr() % 16 for x in self.inputs):
            self.problem = self.problem._replace(aligned=False)

    def run(self, kernel: KernelName, *outputs: torch.Tensor) -> None:
        """forward fills out and lse; dkv fills dk and dv, from lse and delta; dq likewise.

        Raises RuntimeError if this device has too little shared memory for every launch.
        """
        first = _fitting.get((kernel, self.problem)) or chosen(kernel, self.problem)
        others = (option for option in candidates(kernel, self.problem) if option != first)
        for option in chain((first,), others):  # others are looked up only if the first does not fit
            try:
                self.launch(kernel, option, *outputs)
            except Exception as error:
                if type(error).__name__ != "OutOfResources":  # Triton's, which is imported only where kernels run
                    raise
                short = error
            else:
                if option is not first:
                    _fitting[kernel, self.problem] = option
                return
        raise RuntimeError(
            f"flash attention with head_dim {self.problem.head_dim} needs more shared memory than this GPU gives a "
            f"block ({short}): use training.attention sdpa"
        ) from short

    def launch(self, kernel: KernelName, option: Candidate, *outputs: torch.Tensor) -> None:
        """Run a kernel in one way."""
        step = self._plan.step(kernel, option)
        tiles: list[Any] = list(self.inputs)
        if option.descriptors:
            tiles = [_Tiles(x, shape, strides) for x, (shape, strides) in zip(tiles, self._plan.tiles, strict=True)]
        key = *step.key, *(x.data_ptr() % 16 == 0 for x in (*self.inputs, *outputs))
        compiled = _compiled.get(key)
        with on_device_of(self.inputs[0]):
            if compiled is not None:
                compiled[step.grid](*tiles, *outputs, *step.numbers, *step.constants.values())
                return
            if option.descriptors:
                tiles = [_descriptor(x, rows, option) for x, rows in zip(tiles, step.rows, strict=False)]
            launch = getattr(kernels(option.implementation), kernel)[step.grid]
            compiled = launch(*tiles, *outputs, *step.numbers, **step.constants, **step.options)
            if compiled is not None:  # the interpreter compiles nothing
                _compiled[key] = compiled


def fill_delta(out: torch.Tensor, dout: torch.Tensor, delta: torch.Tensor) -> None:
    """delta [B, H, S] = rowsum(dout ∘ out) of two [B, S, H, D]."""
    _, S, H, D = out.shape
    out, dout = readable(out), readable(dout)
    numbers = H, S, delta.numel(), *out.stride()[:3], *dout.stride()[:3]
    grid = -(-delta.numel() // DELTA_ROWS), 1, 1
    alignment = out.data_ptr() % 16, dout.data_ptr() % 16
    key = "delta", D, out.dtype, out.device, numbers[3:], alignment, delta.numel() >= 2**31
    compiled = _compiled.get(key)
    with on_device_of(out):
        if compiled is not None:
            compiled[grid](out, dout, delta, *numbers, D, DELTA_ROWS)
            return
        compiled = kernels("triton").delta[grid](out, dout, delta, *numbers, D=D, ROWS=DELTA_ROWS, num_warps=4)
        if compiled is not None:
            _compiled[key] = compiled


def readable(x: torch.Tensor) -> torch.Tensor:
    """The same with a contiguous last dim."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device_of(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Launch where a tensor lies: Triton launches on the current device."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


@functools.cache
def kernels(implementation: str) -> ModuleType:
    """The module with the kernels; Triton is imported only where they run."""
    if implementation == "hopper":
        from meshwright.kernels import flash_hopper

        return flash_hopper
    from meshwright.kernels import flash_triton

    return flash_triton


# --- what depends on shapes alone -------------------------------------------------------------------------------------

Geometry = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
"""Shape and strides of each input."""


class _Step(NamedTuple):
    """A launch of a kernel, but for its tensors."""

    key: tuple[object, ...]
    """All that decides what is compiled."""
    grid: tuple[int, int, int]
    rows: tuple[int, ...]
    """Of the tiles of each input."""
    numbers: tuple[float, ...]
    constants: dict[str, Any]
    """In the order of the kernel's arguments."""
    options: dict[str, Any]


@dataclass(frozen=True)
class _Plan:
    """Shapes, strides, dtype, device and mask of a call."""

    geometry: Geometry
    dtype: torch.dtype
    device: torch.device
    causal: bool
    offset: int
    tile: FlashTile
    precision: str
    """Of products of float32."""

    @functools.cached_property
    def problem(self) -> Problem:
        """What decides how to launch, were all pointers aligned."""
        aligned = all(_is_aligned(shape, strides, self.dtype.itemsize) for shape, strides in self.geometry)
        return Problem(_capability(self.device), self.dtype.itemsize, self.geometry[0][0][3], aligned)

    @functools.cached_property
    def tiles(self) -> list[tuple[list[int], list[int]]]:
        """Shape and strides of each input as a descriptor sees it: [B, H, S, D]."""
        return [_heads_first(shape, strides) for shape, strides in self.geometry]

    def step(self, kernel: KernelName, option: Candidate) -> _Step:
        """How to launch a kernel."""
        return _step(self, kernel, option)

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.geometry, self.dtype, self.device, self.causal, self.offset, self.tile, self.precision))

    def __hash__(self) -> int:
        return self._hash


@functools.lru_cache(maxsize=4096)
def _plan(*what: Any) -> _Plan:
    return _Plan(*what)


@functools.lru_cache(maxsize=4096)
def _step(plan: _Plan, kernel: KernelName, option: Candidate) -> _Step:
    (B, S, H, D), (_, Z, K, _) = plan.geometry[0][0], plan.geometry[1][0]
    block = plan.tile.of(kernel)
    length, rows, heads = (Z, block[1], K) if kernel == "dkv" else (S, block[0], H)
    num_heads, hopper = B * heads, option.implementation == "hopper"
    strides = () if option.descriptors else tuple(step for _, strides in plan.geometry for step in strides[:3])
    numbers: tuple[float, ...] = (H, H // K, S, Z, plan.offset, num_heads, _at_once(num_heads, max(S, Z), plan))
    numbers += (LOG2_E * D**-0.5,) if kernel == "forward" else (LOG2_E * D**-0.5, D**-0.5)
    if not hopper:  # descriptors know their strides, but the kernel has arguments for them
        numbers = (*(strides or (0,) * 3 * len(plan.geometry)), *numbers)
    constants: dict[str, Any] = {"D": D, "BLOCK_Q": block[0], "BLOCK_K": block[1]}
    options: dict[str, Any] = {"num_warps": option.num_warps}
    if hopper:
        constants |= {"STAGES": option.num_stages, "CAUSAL": plan.causal}
        constants |= {"LATE": option.late} if kernel == "dkv" else {}
        constants |= {f"{x}_SHARED": _shared_layout(n, D, plan.dtype) for x, n in zip(("Q", "K"), block, strict=True)}
    else:
        constants |= {"CAUSAL": plan.causal, "DESCRIPTORS": option.descriptors, "PRECISION": plan.precision}
        options["num_stages"] = option.num_stages
    key = kernel, option, plan.dtype, plan.device, plan.causal, plan.precision, D, block, H // K, strides
    grid = -(-length // rows) * num_heads, 1, 1
    return _Step(key, grid, tuple(block[i] for i in _ROWS_OF_INPUTS), numbers, constants, options)


def _at_once(num_heads: int, length: int, plan: _Plan) -> int:
    """Heads side by side: a divisor of their number, so that no group is small."""
    bytes_of_head = 2 * length * plan.geometry[0][0][3] * plan.dtype.itemsize
    most = max(FEWEST_AT_ONCE, L2_BYTES // bytes_of_head)
    return max((n for n in range(1, min(most, num_heads) + 1) if num_heads % n == 0), default=1)


def _is_aligned(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether descriptors can step through it: by multiples of 16 bytes, in each dim that has more than one place."""
    steps = [step * itemsize for step, places in zip(strides[:3], shape[:3], strict=True) if places > 1]
    return all(step > 0 and step % 16 == 0 for step in steps)


def _heads_first(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[list[int], list[int]]:
    B, S, H, D = shape
    b, s, h = (step if places > 1 else 16 for step, places in zip(strides[:3], shape[:3], strict=True))
    return [B, H, S, D], [b, h, s, 1]


def _precision(dtype: torch.dtype) -> str:
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


@functools.cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.cuda is None:  # AMD's devices are of type cuda too
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# --- descriptors ------------------------------------------------------------------------------------------------------


class _Tiles:
    """What the launcher of a compiled kernel reads of a tensor descriptor."""

    __slots__ = ("base", "padding", "shape", "strides")

    def __init__(self, base: torch.Tensor, shape: list[int], strides: list[int]) -> None:
        self.base, self.shape, self.strides, self.padding = base, shape, strides, "zero"


def _descriptor(tiles: _Tiles, rows: int, option: Candidate) -> Any:
    """A descriptor of tiles [rows, D], as Triton wants it where it compiles."""
    D, dtype = tiles.shape[3], tiles.base.dtype
    block = [1, 1, rows, D]
    if option.implementation == "triton":
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(tiles.base, tiles.shape, tiles.strides, block)
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    layout = _shared_layout(rows, D, dtype, outer=(1, 1))
    return GluonDescriptor(tiles.base, tiles.shape, tiles.strides, block, layout)


@functools.cache
def _shared_layout(rows: int, head_dim: int, dtype: torch.dtype, outer: tuple[int, ...] = ()) -> Any:
    """How the copy engine lays a tile [rows, D] down in shared memory, as tensor cores read it."""
    from triton.experimental.gluon import language as gl

    element = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([*outer, rows, head_dim], element)

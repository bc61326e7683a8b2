"""Launching the flash kernels without a GPU: what is passed, and that a second launch passes the same."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from meshwright.kernels import flash_launch
from meshwright.kernels.flash_launch import Call
from meshwright.kernels.flash_tuning import KERNELS, Candidate, Problem, candidates
from meshwright.schemes.flash import HEAD_DIMS, flash_tile


class Recorded:
    """A kernel that only writes down how it is launched."""

    def __init__(self, arg_names):
        self.arg_names, self.launches, self.compilations = arg_names, [], 0

    def __getitem__(self, grid):
        def launch(*arguments, **settings):
            if settings:
                self.compilations += 1
                options = {name: settings.pop(name) for name in ("num_warps", "num_stages") if name in settings}
                assert options["num_warps"] in (4, 8)
                bound = dict(zip(self.arg_names, arguments, strict=False)) | settings
                assert list(bound) == self.arg_names, "each argument, in the order of the kernel"
                arguments = tuple(bound.values())
            self.launches.append((grid, [x if isinstance(x, int | float | str | bool) else None for x in arguments]))
            return self

        return launch


def argument_names(implementation, kernel):
    """Read off the source: Gluon cannot be imported where Triton interprets."""
    source = Path(flash_launch.__file__).with_name(f"flash_{implementation}.py").read_text()
    (found,) = (x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef) and x.name == kernel)
    return [argument.arg for argument in found.args.args]


@pytest.fixture
def recorded(monkeypatch):
    """Modules of recorded kernels in place of Triton's."""
    made = {
        name: SimpleNamespace(**{kernel: Recorded(argument_names(name, kernel)) for kernel in KERNELS})
        for name in ("triton", "hopper")
    }
    monkeypatch.setattr(flash_launch, "kernels", made.__getitem__)
    monkeypatch.setattr(flash_launch, "_descriptor", lambda tiles, rows, option: tiles)
    monkeypatch.setattr(flash_launch, "_shared_layout", lambda rows, head_dim, dtype: f"{rows} x {head_dim}")
    monkeypatch.setattr(flash_launch, "_compiled", {})
    return made


def every_launch():
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in HEAD_DIMS:
            for kernel in KERNELS:
                for capability, aligned in ((90, True), (90, False), (80, True)):
                    for option in candidates(kernel, Problem(capability, dtype.itemsize, head_dim, aligned)):
                        yield dtype, head_dim, kernel, option


def test_flash_every_launch_passes_what_its_kernel_takes(recorded):
    for dtype, head_dim, kernel, option in dict.fromkeys(every_launch()):
        q, dout = (torch.zeros(2, 300, 4, head_dim, dtype=dtype) for _ in range(2))
        k, v = (torch.zeros(2, 200, 2, head_dim, dtype=dtype) for _ in range(2))
        lse = torch.zeros(2, 4, 300)
        outputs = {"forward": (q, lse), "dkv": (k, v, lse, lse), "dq": (q, lse, lse)}[kernel]
        inputs = (q, k, v) if kernel == "forward" else (q, k, v, dout)
        call = Call(inputs, True, -3, flash_tile(head_dim, dtype.itemsize))
        for _ in range(2):
            call.launch(kernel, option, *outputs)
        told = getattr(recorded[option.implementation], kernel)
        (grid, arguments), (again, as_before) = told.launches[-2:]
        assert told.compilations <= len(told.launches) - 1
        assert (grid, arguments) == (again, as_before)
        named = dict(zip(told.arg_names, arguments, strict=True))
        tile = call.problem.head_dim, *flash_tile(head_dim, dtype.itemsize).of(kernel)
        assert (named["D"], named["BLOCK_Q"], named["BLOCK_K"]) == tile
        assert [named[name] for name in ("H", "G", "S", "Z", "offset")] == [4, 2, 300, 200, -3]
        blocks = -(-200 // tile[2]) * 2 if kernel == "dkv" else -(-300 // tile[1]) * 4
        assert grid == (2 * blocks, 1, 1)


def test_flash_other_strides_are_compiled_for_pointers_only(recorded):
    pointers, descriptors = Candidate("triton", 4, 2), Candidate("triton", 4, 2, descriptors=True)
    wide = torch.zeros(1, 64, 2, 128, dtype=torch.bfloat16)
    for option, compiled in ((pointers, 2), (descriptors, 1)):
        kernel = recorded["triton"].forward
        kernel.compilations = 0
        for x in (wide[..., :64], wide[..., :64].contiguous()):
            Call((x, x, x), True, 0, flash_tile(64, 2)).launch("forward", option, x, torch.zeros(1, 2, 64))
        assert kernel.compilations == compiled


@pytest.mark.parametrize(
    ("tensor", "aligned"),
    [
        (torch.zeros(2, 8, 2, 64, dtype=torch.bfloat16), True),
        (torch.zeros(2, 8, 2, 72, dtype=torch.bfloat16)[..., 8:], True),
        (torch.zeros(2, 8, 2, 72, dtype=torch.bfloat16)[..., 4:68], False),
        (torch.zeros(2, 8, 2, 65, dtype=torch.bfloat16)[..., :64], False),
        (torch.zeros(2, 8, 1, 64, dtype=torch.bfloat16).expand(2, 8, 2, 64), False),
        (torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16).as_strided((1, 8, 1, 64), (3, 64, 5, 1)), True),
    ],
    ids=["plain", "padded", "begins between", "odd rows", "one head for all", "odd steps that nobody takes"],
)
def test_flash_what_descriptors_can_read(tensor, aligned):
    assert Call((tensor,) * 3, True, 0, flash_tile(64, 2)).problem.aligned == aligned


def test_flash_heads_side_by_side_divide_all():
    for heads, seq in ((16, 8192), (12, 65536), (7, 2**20), (1, 128), (96, 4096)):
        x = torch.empty(1, seq, heads, 128, device="meta")
        step = flash_launch._step(
            Call((x, x, x), True, 0, flash_tile(128, 2))._plan, "forward", Candidate("triton", 4, 2)
        )
        at_once = step.numbers[-2]
        assert heads % at_once == 0
        assert at_once <= max(4, 2**25 // (seq * 128 * 8))

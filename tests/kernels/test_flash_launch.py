"""Launching the flash kernels without a GPU: what is passed, and that a second launch passes the same."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from meshwright.config.attention import FLASH_HEAD_DIMS
from meshwright.kernels import flash_launch
from meshwright.kernels.flash_launch import Call
from meshwright.kernels.flash_tuning import KERNELS, Candidate, Problem, candidates
from meshwright.schemes.flash import flash_tile


class Recorded:
    """A kernel that only writes down how it is launched, and raises if what was compiled for others is launched."""

    def __init__(self, arg_names, most_stages=9):
        self.arg_names, self.most_stages, self.launches, self.compilations = arg_names, most_stages, [], 0

    def __getitem__(self, grid):
        def launch(*arguments, **settings):
            options = {name: settings.pop(name) for name in ("num_warps", "num_stages") if name in settings}
            assert options["num_warps"] in (4, 8)
            named = dict(zip(self.arg_names, arguments, strict=False)) | settings
            assert list(named) == self.arg_names, "each argument, in the order of the kernel"
            if settings.get("STAGES", options.get("num_stages")) > self.most_stages:
                raise OutOfResources("300 KiB, there are 99")
            self.compilations += 1
            compiled = Compiled(self, baked(named), options)
            compiled[grid](*named.values())
            return compiled

        return launch


class OutOfResources(Exception):
    """Triton's, by name."""


class Compiled:
    """What was compiled holds for some constants, dtypes, alignments and strides."""

    def __init__(self, kernel, what, options):
        self.kernel, self.what, self.options = kernel, what, options

    def __getitem__(self, grid):
        def launch(*arguments):
            named = dict(zip(self.kernel.arg_names, arguments, strict=True))
            assert baked(named) == self.what, "a kernel that was compiled for something else"
            self.kernel.launches.append((grid, named))

        return launch


def baked(named):
    """All of a launch that Triton compiles into a kernel, but for what the kernels say it should not."""
    found = {}
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            found[name] = value.dtype, value.data_ptr() % 16 == 0
        elif hasattr(value, "base"):
            found[name] = value.base.dtype
        elif isinstance(value, int) and not isinstance(value, bool) and name not in SIZES and name.islower():
            found[name] = value == 1, value % 16 == 0
        elif name not in SIZES and not isinstance(value, float):
            found[name] = value
    return found


SIZES = ("H", "S", "Z", "offset", "num_heads", "at_once")


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
    monkeypatch.setattr(flash_launch, "_fitting", {})
    return made


def every_launch():
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in FLASH_HEAD_DIMS:
            for kernel in KERNELS:
                for capability, aligned in ((90, True), (90, False), (80, True)):
                    for option in candidates(kernel, Problem(capability, dtype.itemsize, head_dim, aligned)):
                        yield dtype, head_dim, kernel, option


def call_and_outputs(kernel, dtype=torch.bfloat16, D=64, H=4, K=2, causal=True, offset=-3, odd=False, short=False):
    """A call of 300 queries and 200 keys, and tensors for what it fills and reads."""

    def tensor(*shape, dtype=dtype):
        return torch.zeros(*shape[:-1], shape[-1] + 8, dtype=dtype)[..., 1 if odd else 8 :][..., : shape[-1]]

    S = 100 if short else 300
    q, dout, k, v = tensor(2, S, H, D), tensor(2, S, H, D), tensor(2, 200, K, D), tensor(2, 200, K, D)
    lse = torch.zeros(2, H, S)
    inputs = (q, k, v) if kernel == "forward" else (q, k, v, dout)
    outputs = {"forward": (q, lse), "dkv": (k, v, lse, lse), "dq": (q, lse, lse)}[kernel]
    return Call(inputs, causal, offset, flash_tile(D, dtype.itemsize)), outputs


def test_flash_every_launch_passes_what_its_kernel_takes(recorded):
    for dtype, head_dim, kernel, option in dict.fromkeys(every_launch()):
        told = getattr(recorded[option.implementation], kernel)
        compilations = told.compilations
        call, outputs = call_and_outputs(kernel, dtype, head_dim)
        for _ in range(2):
            call.launch(kernel, option, *outputs)
        assert told.compilations == compilations + 1
        (grid, named), (again, as_before) = told.launches[-2:]
        numbers = {name: value for name, value in named.items() if isinstance(value, int | float | str)}
        assert grid == again and numbers == {name: as_before[name] for name in numbers}
        tile = head_dim, *flash_tile(head_dim, dtype.itemsize).of(kernel)
        assert (named["D"], named["BLOCK_Q"], named["BLOCK_K"]) == tile
        assert [named[name] for name in ("H", "G", "S", "Z", "offset")] == [4, 2, 300, 200, -3]
        blocks = -(-200 // tile[2]) * 2 if kernel == "dkv" else -(-300 // tile[1]) * 4
        assert grid == (2 * blocks, 1, 1)


OTHERS = ({"D": 128}, {"dtype": torch.float16}, {"causal": False}, {"K": 4}, {"K": 1}, {"odd": True})
ALIKE = ({"offset": 7}, {"short": True}, {"H": 8, "K": 4})


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("option", [Candidate("triton", 4, 2), Candidate("hopper", 4, 2, descriptors=True)], ids=str)
def test_flash_is_compiled_anew_for_what_is_compiled_in_alone(recorded, kernel, option):
    told = getattr(recorded[option.implementation], kernel)
    for _ in range(2):
        for changes in ({}, *OTHERS):
            call, outputs = call_and_outputs(kernel, **changes)
            call.launch(kernel, option, *outputs)
    assert told.compilations <= 1 + len(OTHERS)
    before = told.compilations
    for changes in ALIKE if option.descriptors else ALIKE[:2]:
        call, outputs = call_and_outputs(kernel, **changes)
        call.launch(kernel, option, *outputs)
    if option.descriptors:  # strides of pointers are compiled in
        assert told.compilations == before


def test_flash_takes_another_launch_where_shared_memory_is_short(recorded):
    call, outputs = call_and_outputs("dkv", D=256)
    options = candidates("dkv", call.problem)
    assert options[0].num_stages > min(option.num_stages for option in options)
    recorded["triton"].dkv.most_stages = min(option.num_stages for option in options)
    for _ in range(2):
        call.run("dkv", *outputs)
    assert len(recorded["triton"].dkv.launches) == 2
    recorded["triton"].dkv.most_stages = 0
    flash_launch._compiled.clear()
    with pytest.raises(RuntimeError, match=r"head_dim 256 needs more shared memory .*: use training.attention sdpa"):
        call.run("dkv", *outputs)


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

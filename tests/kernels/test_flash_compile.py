"""Every shipped configuration of the flash kernels compiles for the GPUs that it is for; none is needed here."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from meshwright.bench import flash_compile, record
from meshwright.bench.flash_compile import SHARED_BYTES, Compiled, compile_all, resources

pytest.importorskip("triton", reason="compiles with Triton")

SOME = ("delta bfloat16 16", "dq bfloat16 16 causal triton, pointers, 4 × 3")


def assert_accepted(compiled):
    assert not [str(one) for one in compiled if one.refused]
    for one in compiled:
        kernel, dtype, *rest = one.label.split()
        assert 0 < one.registers <= 255
        assert (kernel != "delta") <= one.shared_bytes <= SHARED_BYTES[one.capability]
        assert one.halves == (kernel != "delta" and dtype != "float32")
        if one.halves:
            assert one.instruction == {80: "mma", 90: "wgmma"}[one.capability]
        else:
            assert (one.instruction != "none") == ("tf32" in rest), "of float32 the tensor cores keep 10 bits"


def test_flash_one_configuration_compiles():
    compiled = list(compile_all(SOME))
    assert [(one.capability, one.label.split()[0]) for one in compiled] == [*product(SHARED_BYTES, ("delta", "dq"))]
    assert_accepted(compiled)


@pytest.mark.slow
def test_flash_every_configuration_compiles():
    compiled = list(compile_all())
    assert len({(one.capability, one.label) for one in compiled}) == len(compiled)
    assert_accepted(compiled)


LABEL = "forward bfloat16 128 triton, pointers, 8 × 2"
GOOD = Compiled(LABEL, 90, 1.5, 8, 200, shared_bytes=100 * 1024, instruction="wgmma", halves=True)


def test_flash_compiled_that_cannot_be_shipped():
    assert GOOD.refused == ""
    assert replace(GOOD, spilled_bytes=16).refused == ""
    assert "shared memory of 233472 B > the 232448 B" in replace(GOOD, shared_bytes=228 * 1024).refused
    assert "shared memory of 167936 B > the 166912 B" in replace(GOOD, capability=80, shared_bytes=164 * 1024).refused
    assert "mma instead of wgmma" in replace(GOOD, instruction="mma").refused
    assert replace(GOOD, instruction="mma", capability=80).refused == ""
    assert replace(GOOD, instruction="none", halves=False).refused == "", "float32 has no tensor core"
    assert replace(GOOD, error="CompilationError: at 7:4").refused == "CompilationError: at 7:4"


def test_flash_compiled_in_a_record():
    rows = [GOOD.row(), replace(GOOD, instruction="mma").row()]
    assert [row.get("failed", "")[:9] for row in rows] == ["", "mma inste"]
    written = record.of("flash-compile", "python benchmarks/commands.py flash-compile", rows, device="any")
    path = Path(f"flash-compile/any-{written['date']}.json")
    assert list(record.problems(written, path)) == []


def test_flash_what_the_assembler_says():
    log = """\
ptxas info    : 11 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function 'forward' for 'sm_90a'
ptxas info    : Function properties for forward
    416 bytes stack frame, 720 bytes spill stores, 804 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 416 bytes cumulative stack size
"""
    assert resources(log) == (255, 720, 416)


def test_flash_compile_of_no_configuration(capsys):
    assert flash_compile.main(["forward of nothing"]) == 2
    assert "no configuration's label contains forward of nothing" in capsys.readouterr().err

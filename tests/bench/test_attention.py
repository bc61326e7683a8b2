"""`bench attention` on a CPU: its rows, what it says of what it cannot run, and a line for each mistake."""

from __future__ import annotations

import json
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from meshwright.bench import attention, attention_beside, attention_run, record
from meshwright.bench.attention_clock import CpuMeter, Kernel, Measured
from meshwright.bench.attention_cost import Cell
from meshwright.bench.attention_rows import cell_rows, matmul_row
from meshwright.bench.attention_run import Budget, CellResult, Found
from meshwright.bench.attention_subjects import not_available
from meshwright.cli import main
from meshwright.cli.show_attention import short_name, show_attention
from meshwright.config.hardware import load_device

Capture = pytest.CaptureFixture[str]
TINY = [
    *["--quick", "--device", "cpu", "--seqs", "32,64", "--head-dims", "16", "--dtypes", "float32"],
    *["--repeats", "6", "--seconds", "0.005"],
]


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    code = main(["bench", "attention", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def row_of(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (row,) = (row for row in rows if wanted.items() <= row.items())
    return row


def test_quick_on_a_cpu_is_one_sound_record(capsys: Capture, tmp_path: Path) -> None:
    code, out, err = run(capsys, *TINY, "--json", "--out", str(tmp_path))
    assert (code, err, out.count("\n")) == (0, "", 1)
    (found,) = json.loads(out)["records"]
    (path,) = tmp_path.glob("attention/*.json")
    assert record.check(tmp_path) == []
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert rows == found["rows"]
    forward = row_of(rows, kind="time", implementation="naive", measure="forward", seq=64)
    assert 5 <= len(forward["samples"]) <= 6
    assert forward["kernel"].startswith("aten::") and 0 < forward["kernel_share"] <= 1
    assert forward["percent_of_matmul"] > 0 and "limit" not in forward
    account = row_of(rows, kind="account", seq=64)
    assert account["equal"] and account["fused"] == "sdpa-cpu"
    assert account["measured_difference_bytes"] == 4 * 4 * 64 * 64 - 4 * 4 * 64
    assert account["naive_keeps"] == ["q", "k", "v", "mask", "probabilities"]
    assert row_of(rows, kind="memory", implementation="naive", seq=64)["peak_equal"] is True
    assert row_of(rows, kind="ratio", implementation="naive", measure="both", seq=32)["confidence"] > 0.9
    flash = row_of(rows, kind="time", implementation="flash", seq=32)
    assert flash["status"] == "not available" and flash["skipped"].startswith("needs a GPU")
    flex = [row for row in rows if row.get("implementation") == "flex" and row["seq"] == 32]
    assert [row["status"] for row in flex] == ["not compiled", "not available", "not available"]
    assert flex[1]["skipped"] == "backward is not supported by torch on a CPU"


def test_for_people(capsys: Capture) -> None:
    code, out, err = run(capsys, *TINY)
    assert (code, err) == (0, "")
    assert "Attention in float32: batch 1, 4 heads, causal" in out
    assert "flash: not available: needs a GPU" in out
    assert re.search(r"^kernels of sdpa-cpu: forward aten::_scaled_dot_product_flash_attention_for_cpu;", out, re.M)


def test_the_command_measures_the_same_again(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = []
    monkeypatch.setattr(attention, "measure", lambda setting, *_: settings.append(setting) or [])
    _, out, _ = run(capsys, *TINY, "--json", "--implementations", "flash")
    (found,) = json.loads(out)["records"]
    words = found["command"].removeprefix("meshwright bench attention ").split()
    _, again, _ = run(capsys, *words, "--json")
    assert json.loads(again)["records"][0]["command"] == found["command"]
    first, second = settings
    assert first == second


def test_presets() -> None:
    assert attention.NAIVE.batch == 8 and attention.NAIVE.heads == 1 and not attention.NAIVE.causal
    assert {cell.seq for cell in attention.NAIVE.cells} == {2**power for power in range(7, 17)}
    assert {cell.head_dim for cell in attention.NAIVE.cells} == {16, 32, 64, 128}
    assert attention.FLASH.batch == 1 and attention.FLASH.heads == 16 and attention.FLASH.causal
    for setting in attention.GRIDS.values():
        attention.check(setting)


def test_what_cannot_fit_is_not_tried(capsys: Capture) -> None:
    """A score matrix of 2⁴⁰ × 4 bytes; the fused one is not asked for."""
    options = [*TINY, "--seqs", str(2**20), "--heads", "1", "--implementations", "naive", "--json"]
    code, out, _ = run(capsys, *options)
    assert code == 0
    row = row_of(json.loads(out)["records"][0]["rows"], kind="time")
    assert row["status"] == "out of memory (predicted)"
    assert row["predicted_peak_bytes"] > 3 * 2**42 and row["free_bytes"] > 0
    assert re.search(r"^needs 13\.\d TiB \(\d+ bytes\), inputs included, and .* are free: not tried$", row["skipped"])


def test_a_product_that_does_not_fit_after_all_is_a_row(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any) -> list[float]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n")

    monkeypatch.setattr(attention_beside, "_matmul_seconds", no_memory)
    code, out, err = run(capsys, *TINY, "--implementations", "sdpa-cpu")
    assert (code, err) == (0, "")
    assert "matmul float32 512³: out of memory: OutOfMemoryError: CUDA out of memory. Tried to allocate" in out
    assert "sdpa-cpu" in out


def _without_triton(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def tune_flash(*_: Any, **__: Any) -> Any:
        raise error

    module: Any = ModuleType("flash_attention")
    module.tune_flash = tune_flash
    monkeypatch.setitem(sys.modules, "meshwright.kernels.flash_attention", module)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("no memory"), {"status": "out of memory", "skipped": "OutOfMemoryError: no memory"}),
        (RuntimeError("no launch runs"), {"status": "failed", "failed": "RuntimeError: no launch runs"}),
        (
            PermissionError(13, "Permission denied", "/cache"),
            {"status": "failed", "failed": "PermissionError: [Errno 13] Permission denied: '/cache'"},
        ),
    ],
    ids=str,
)
def test_launches_that_cannot_be_chosen_are_a_row_and_a_line(
    error: Exception, why: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_triton(error, monkeypatch)
    cells, told = [Cell(dtype="float32", head_dim=16, seq=32), Cell(dtype="float32", head_dim=32, seq=32)], []
    rows = list(attention_beside.launch_rows(cells, torch.device("cpu"), told.append))
    assert [row["head_dim"] for row in rows] == [16, 32]
    assert all(row["kind"] == "launch" and why.items() <= row.items() for row in rows)
    assert told[0].startswith(f"float32 d 16 seq 32: launches were not chosen: {why['status']}: ")


def test_widths_that_a_kernel_does_not_take_are_not_available() -> None:
    def reason(name: str, kind: str, head_dim: int) -> str:
        return not_available(name, kind, Cell(dtype="bf16", head_dim=head_dim, seq=64))

    assert reason("flash", "cuda", 96) == "takes head_dim 16, 32, 64, 128 or 256, not 96"
    assert reason("flash", "cpu", 96).startswith("needs a GPU")
    assert reason("flex", "cuda", 8) == "takes head_dim 16 or more, not 8"
    assert not reason("flash", "cuda", 128) and not reason("flex", "cuda", 16) and not reason("flex", "cpu", 8)
    setting = attention.Setting(head_dims=(64, 96), seqs=(1024, 16384))
    assert [(cell.head_dim, cell.seq) for cell in attention._tuned_cells(setting)] == [(64, 1024)]


def test_a_run_that_is_cut_off_leaves_a_sound_record(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Cells that it did not reach are rows that say so; another run has a record of its own."""
    measured_cell, cut = attention.run_cell, []

    def cut_off(cell: Cell, *rest: Any) -> CellResult:
        if cell.seq == 64 and cut:
            raise KeyboardInterrupt
        return measured_cell(cell, *rest)

    monkeypatch.setattr(attention, "run_cell", cut_off)
    options = [*TINY, "--implementations", "sdpa-cpu", "--json", "--out", str(tmp_path)]
    for cut[:] in ([], [True]):
        with suppress(KeyboardInterrupt):
            main(["bench", "attention", *options])
    capsys.readouterr()
    assert record.check(tmp_path) == []
    first, second = sorted(tmp_path.glob("attention/*"), key=lambda path: path.stat().st_mtime)
    rows = json.loads(second.read_text(encoding="utf-8"))["rows"]
    assert row_of(rows, kind="time", seq=32, measure="both")["status"] == "measured"
    assert row_of(rows, kind="time", seq=64)["failed"] == record.NOT_REACHED
    assert not any("failed" in row for row in json.loads(first.read_text(encoding="utf-8"))["rows"])


@pytest.mark.parametrize("folder", ["/proc", "/proc/nope", "nope/records", ""])
def test_a_folder_that_takes_no_record_is_refused_before_anything_is_measured(
    folder: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nope").write_text("a file", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attention, "measure", lambda *_: pytest.fail("measured"))
    code, out, err = run(capsys, *TINY, "--out", folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    refused = f"--out {folder} cannot be written (" if folder else '--out = "" names no folder: give it one'
    assert err.startswith(refused)


class _Broken(CpuMeter):
    """Where one implementation breaks, the others go on."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def memory(self, subject: Any) -> Any:
        if subject.name == "sdpa-cpu":
            raise self.error
        return super().memory(subject)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory", "OutOfMemoryError: CUDA out of memory"),
        (RuntimeError("No available kernel. Aborting"), "not available", "torch: No available kernel. Aborting"),
        (ValueError("\nodd\n\nshape\n"), "failed", "ValueError: odd; shape"),
    ],
)
def test_what_breaks_is_a_row(error: Exception, status: str, reason: str) -> None:
    cell = Cell(dtype="float32", head_dim=16, seq=32)
    budget = Budget(seconds=0.001, deadline=time.perf_counter() + 60, most=5)
    names = ("naive", "sdpa-cpu")
    result = attention_run.run_cell(cell, names, _Broken(error), torch.device("cpu"), budget, {})
    naive, broken = result.found
    assert naive.status == "measured" and len(naive.samples["backward"]) == 5
    assert broken.status == status and broken.reason.startswith(reason) and not broken.samples
    rows = cell_rows(result, None, {})
    assert ("failed" in row_of(rows, kind="time", implementation="sdpa-cpu")) == (status == "failed")


def test_a_refusal_of_torch_is_told_in_its_words() -> None:
    warned = [
        "Memory efficient kernel not used because: (Triggered internally at /pytorch/sdp_utils.cpp:1.)",
        "Memory Efficient attention has been runtime disabled. (Triggered internally at /pytorch/sdp_utils.h:2.)",
        "Flash attention kernel not used because: (Triggered internally at /pytorch/sdp_utils.cpp:3.)",
        "Expected query, key and value to be of dtype: {Half, BFloat16}. (Triggered internally at /pytorch/x.h:4.)",
    ]
    told = attention_run._why(RuntimeError("No available kernel. Aborting execution."), warned)
    assert told == ("not available", "torch: Expected query, key and value to be of dtype: {Half, BFloat16}.")


def test_cells_after_the_deadline_say_so() -> None:
    setting = attention.Setting(
        implementations=("naive",), dtypes=("float32",), seqs=(16,), device="cpu", matmul_size=16, max_seconds=1e-9
    )
    rows = attention.measure(setting, lambda line: None)
    assert {row["status"] for row in rows if row["kind"] == "time"} == {"no time"}


def test_rows_of_a_gpu_fit_a_terminal(capsys: Capture) -> None:
    """As a GPU would give them: limits, kernels with templates, allocator's bytes; at most 120 columns."""
    cell = Cell(dtype="bf16", head_dim=128, seq=65536, heads=16, kv_heads=16)
    h100 = load_device("h100")
    names = ("flash", "sdpa-cudnn")
    result = CellResult(cell, [Found(name) for name in names], 2**36, 1.0)
    for found in result.found:
        found.samples = {"forward": [0.0266, 0.0264], "backward": [0.071, 0.07], "both": [0.098, 0.097]}
        found.measured = Measured(4194304, 2**30, "allocator, before rounding")
        found.kernels = {"forward": Kernel("void pytorch_flash::flash_fwd_kernel<Traits<128, 64>, false>(Params)", 1.0)}
        found.first_seconds = 12.3
    rows = [matmul_row("bf16", 8192, [0.0016, 0.0017], h100), *cell_rows(result, h100, {"bf16": 700e12})]
    assert row_of(rows, kind="time", implementation="sdpa-cudnn", measure="both")["limit_by"] == "compute"
    show_attention(rows)
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.strip().startswith("128  65536  flash"))
    assert line.split()[3:14] == ["26.5", "70.5", "664", "624", "67", "(95)", "63", "(89)", "0.00391", "1", "12.2"]
    assert line.rstrip().endswith("flash_fwd_kernel")
    assert max(map(len, lines)) <= 120


def test_short_names() -> None:
    assert short_name("void at::native::softmax<float, 4>(float*)") == "softmax"
    assert short_name("aten::bmm") == "aten::bmm"
    assert short_name("_flash_forward_kernel") == "_flash_forward_kernel"


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            "--implementations flahs",
            ["--implementations has flahs, which is not an implementation: did you mean flash?"],
        ),
        (
            "--head-dims 0 --seqs 64,0",
            [
                "--head-dims has 0, which is not a whole number above 0: use such as 64,128",
                "--seqs has 0, which is not a whole number above 0: use such as 1024,4096",
            ],
        ),
        ("--seqs 64,many", ['--seqs = "64,many" is not whole numbers between commas: use 64,128']),
        ("--seqs 64,64", ["--seqs has 64 more than once: give it once"]),
        ("--dtypes fp8", ["--dtypes has fp8, which is not a dtype of this benchmark: use float32 or bf16"]),
        ("--causal=maybe", ['--causal = "maybe" is not true or false']),
        ("--grid huge", ['--grid = "huge" is not one of naive, flash']),
        ("--batch 0 --repeats 0", [f"--{name} = 0 is not a whole number above 0" for name in ("batch", "repeats")]),
        ("--seconds 0", ["--seconds = 0 is not a number above 0"]),
        (
            "--kv-heads -1 --matmul-size -1",
            [f"--{name} = -1 is not a whole number above 0" for name in ("kv-heads", "matmul-size")],
        ),
        (
            "--dtypes float32 --matmul-size 200000",
            ["--matmul-size = 200000 needs 480000000000 bytes for 3 matrices, and 12 MiB are free: use at most 1024"],
        ),
        (
            "--dtypes bf16 --matmul-size 99999999999999999999",
            [
                "--matmul-size = 99999999999999999999 needs 59999999999999999998800000000000000000006 bytes for "
                "3 matrices, and 12 MiB are free: use at most 1448"
            ],
        ),
        (
            "--heads 6 --kv-heads 4",
            ["--kv-heads = 4 does not divide --heads = 6 (each KV head serves as many query heads): use 1, 2, 3 or 6"],
        ),
    ],
    ids=str,
)
def test_mistakes_are_lines(options: str, lines: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "free_bytes", lambda kind: 3 * 4 * 1024**2)
    code, out, err = run(capsys, "--device", "cpu", *options.split())
    assert (code, out, err.splitlines()) == (2, "", lines)

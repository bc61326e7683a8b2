"""`meshwright bench` on the command line: records as JSON, tables, and a line for each mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytest

from meshwright.bench import record, ring
from meshwright.bench.context import Account, Setting, formula
from meshwright.cli import main
from meshwright.cli.benches import BENCHES

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    code = main(["bench", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def measured(setting: Setting) -> list[dict[str, Any]]:
    """As `ring.measure`, by formula."""
    rows = []
    for name, layout in ring.CASES.items():
        accounts = formula(setting, layout)
        columns = {field: [getattr(account, field) for account in accounts] for field in Account._fields}
        settings = {**vars(setting), "samples": [1.0, 2.0], "formula_peak_bytes": columns["peak_bytes"]}
        rows.append(record.row(layout=name, note=ring.NOTE, unit="s", **settings, **columns))
    return [*rows, *ring.comparisons({name: [1.0, 2.0] for name in ring.CASES}, {}, cores=2)]


def test_json_is_one_sound_record(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "measure", measured)
    code, out, err = run(capsys, "ring", "--quick", "--samples", "1", "--precision", "bf16", "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    (found,) = json.loads(out)["records"]
    slug = re.sub(r"[^a-z0-9.]+", "-", found["environment"]["device"].lower()).strip("-.")
    assert list(record.problems(found, Path(f"ring/{slug}-{found['date']}.json"))) == []
    assert {row["layout"] for row in found["rows"] if "layout" in row} == set(ring.CASES)
    assert found["rows"][0]["precision"] == "bf16"
    assert found["command"] == (
        "meshwright bench ring --seq 512 --heads 4 --kv-heads 2 --head-dim 32 --batch 1 --precision bf16 --samples 1"
    )


def test_for_people(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "measure", measured)
    code, out, err = run(capsys, "ring", "--seq", "4096")
    assert (code, err) == (0, "")
    assert "seq 4096, heads 8, kv heads 4, head dim 64, batch 1, precision float32" in out
    (contiguous,) = (line for line in out.splitlines() if line.strip().startswith("ring 4 contiguous  "))
    assert "2.15 GFLOP to 8.59 GFLOP" in contiguous
    (balance,) = (line for line in out.splitlines() if "ring 2 contiguous / ring 2 zigzag" in line)
    assert balance.split()[-7:] == ["1.00", "to", "1.00", "50%", "1.33", "75", "%"]
    assert ring.NOTE in out
    assert "\x1b[" not in out


def test_a_failure_is_shown_and_exits_1(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(setting: Setting) -> list[dict[str, Any]]:
        _, *rest = measured(setting)
        settings = {**vars(setting), "samples": [], "formula_peak_bytes": [1]}
        empty: dict[str, Any] = {field: [] for field in Account._fields}
        return [record.row(layout="ring 1", note=ring.NOTE, failed="rank 0: out of luck", **settings, **empty), *rest]

    monkeypatch.setattr(ring, "measure", failing)
    code, out, _ = run(capsys, "ring", "--quick")
    assert code == 1
    assert "rank 0: out of luck" in out


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            "--seq 4097",
            [
                "--seq = 4097 is not divisible by 8 (2 chunks for each of 4 ring ranks, 2 × 2 for ring × ulysses): "
                "use 4096 or 4104"
            ],
        ),
        (
            "--heads 6 --kv-heads 2",
            [
                "--heads = 6 is not divisible by 4 (each of 4 Ulysses ranks attends with as many query heads): "
                "use 4 or 8"
            ],
        ),
        (
            "--kv-heads 3",
            ["--kv-heads = 3 does not divide --heads = 8 (each KV head serves as many query heads): use 1, 2, 4 or 8"],
        ),
        (
            "--heads 12 --kv-heads 6",
            [
                "--kv-heads = 6 neither divides 4 nor is a multiple of it (each of 4 Ulysses ranks gets as many KV "
                "heads, or a copy of one): use 1, 2, 4 or 12"
            ],
        ),
        (
            "--seq 0 --batch -1 --samples 0",
            [
                "--seq = 0 is not a whole number above 0",
                "--batch = -1 is not a whole number above 0",
                "--samples = 0 is not a whole number above 0",
            ],
        ),
        ("--precision fp8", ['--precision = "fp8" is not one of float32, bf16']),
        ("--seq many", ['--seq = "many" is not a whole number']),
        ("--sek 8", ["--sek is not an option of bench ring: did you mean --seq?"]),
    ],
    ids=str,
)
def test_mistakes_are_lines(options: str, lines: list[str], capsys: Capture) -> None:
    code, out, err = run(capsys, "ring", *options.split())
    assert (code, out, err.splitlines()) == (2, "", lines)


def test_what_memory_cannot_hold_is_refused(capsys: Capture) -> None:
    code, out, err = run(capsys, "ring", "--seq", str(2**40))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("bench ring needs about ")
    assert err.endswith(f"use a smaller --seq {2**40} or --batch 1\n")


def test_names(capsys: Capture) -> None:
    names = "attention, ring, collectives, gradients, matmul, calibrate"
    assert run(capsys) == (2, "", f"bench needs a NAME: give one of {names}\n")
    assert run(capsys, "rnig") == (2, "", "rnig is not a bench: did you mean ring?\n")


@pytest.mark.parametrize("name", BENCHES)
def test_help(name: str, capsys: Capture) -> None:
    _, listed, _ = run(capsys, "--help")
    assert f"  {name} " in listed
    code, out, err = run(capsys, name, "--help")
    assert (code, err) == (0, "")
    assert f"meshwright bench {name}" in out
    own = {f"--{field.name.replace('_', '-')}" for field in fields(cast(Any, BENCHES[name]))}
    assert set(re.findall(r"--[a-z][a-z-]*", out)) - {"--help"} == own


def test_help_needs_no_torch() -> None:
    code = "import sys; from meshwright.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "bench", "ring", "--help"]
    assert subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0

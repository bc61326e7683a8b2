"""What `benchmarks/gpu.py` makes of what a GPU says, as far as no GPU is needed."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from meshwright.bench import footprint, record
from meshwright.comm import ranks as comm_ranks
from meshwright.verify import agreement

FOLDER = Path(__file__).parents[2] / "benchmarks"
PAGES = ("gpu", "gpu_stages", *(f"gpu_stages.{page}" for page in ("kernels", "memory", "programs", "training")))


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    """As it is run: from its folder."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("gpu")
    finally:
        sys.path.remove(str(FOLDER))
        for page in PAGES:
            del sys.modules[page]


def event(action: str, addr: int, size: int, line: int = 0) -> dict[str, Any]:
    own = [{"filename": "/x/torch/a.py", "line": 1, "name": "mm"}, {"filename": "/x/meshwright/b.py", "line": line}]
    return {
        "action": action,
        "addr": addr,
        "size": size,
        "frames": [{"name": "f", **frame} for frame in own[: 1 + line]],
    }


def test_the_highest_level_of_a_history_is_found(gpu: ModuleType) -> None:
    """A block that was there before lowers the level when it goes, and an address is used again."""
    history = [
        event("alloc", 1, 100, line=7),
        event("alloc", 2, 50, line=7),
        event("free_requested", 1, 100),
        event("free_completed", 1, 100),
        event("free_completed", 9, 80),
        event("alloc", 1, 200, line=8),
        event("alloc", 3, 5),
        event("free_completed", 2, 50),
    ]
    assert gpu.memory.alive_at_peak(history) == [(200, 1, "b.py:8 f"), (50, 1, "b.py:7 f"), (5, 1, "a.py:1 mm")]


def test_the_higher_of_two_peaks_counts(gpu: ModuleType) -> None:
    history = [event("alloc", 1, 300), event("free_completed", 1, 300), event("alloc", 2, 200)]
    assert gpu.memory.alive_at_peak(history) == [(300, 1, "a.py:1 mm")]


@pytest.mark.parametrize(
    ("factor", "passes"), [(1.0, True), (1 + 1e-6, True), (1 + 1e-5, False), (float("nan"), False)]
)
def test_losses_must_be_those_of_the_first_run(gpu: ModuleType, factor: float, passes: bool) -> None:
    first = [{"loss": 5.0}, {"loss": 4.0}]
    found = gpu.training._curve_problem("float32", [{"loss": 5.0}, {"loss": 4.0 * factor}], first)
    assert (not found) == passes
    assert gpu.training._curve_problem("float32", "exit code 1", first) == "exit code 1"
    assert gpu.training._curve_problem("float32", [{"loss": 5.0}, {"loss": None}], first)


def test_every_stage_has_a_line_and_a_limit(gpu: ModuleType) -> None:
    described = re.findall(r"^    (\w+)  ", gpu.__doc__ or "", re.MULTILINE)
    assert sorted(described) == sorted(gpu.STAGES)
    assert all(seconds > 0 for _, seconds in gpu.STAGES.values())


class _CutOffError(BaseException):
    """As a kill, of which nobody hears."""


def test_a_footprint_that_is_cut_off_leaves_a_true_record(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Jobs before the cut are measured or failed by themselves, those after it were not reached."""
    jobs = list(gpu.memory.FOOTPRINTS)

    def compare(name: str, job: Any) -> list[dict[str, Any]]:
        if name == jobs[1]:
            raise RuntimeError("out of luck")
        if name == jobs[3]:
            raise _CutOffError
        return [{"job": name, "category": "parameters", **dict.fromkeys(COLUMNS, 4)}]

    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr(footprint, "compare", compare)
    monkeypatch.setattr(gpu.memory, "_explain", lambda *_: None)
    with pytest.raises(_CutOffError):
        gpu.memory.footprint(tmp_path)
    assert record.check(tmp_path) == []
    (path,) = tmp_path.glob("footprint/nvidia-x-*")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["command"] == (
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python benchmarks/gpu.py --only footprint"
    )
    assert [row["job"] for row in found["rows"]] == jobs
    failed = [row.get("failed", "") for row in found["rows"]]
    assert failed == ["", "RuntimeError: out of luck", "", *[record.NOT_REACHED] * (len(jobs) - 3)]


COLUMNS = ("rehearsed_bytes", "run_bytes", "requested_bytes", "storages", "rounding_bytes", "unsplit_bytes")


def test_agreement_that_is_cut_off_leaves_a_true_record(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checked: list[Any] = []

    def check(case: Any, ranks: Any) -> Any:
        checked.append(case)
        if len(checked) == 3:
            raise _CutOffError
        return agreement.Agreement(case, 0, 0, (), (), ())

    ranks: Any = SimpleNamespace(alive=True, close=lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr(comm_ranks, "Ranks", lambda *_, **__: ranks)
    monkeypatch.setattr(agreement, "check", check)
    with pytest.raises(_CutOffError):
        gpu.memory.agreement(tmp_path)
    assert record.check(tmp_path) == []
    (path,) = tmp_path.glob("agreement/nvidia-x-*")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert len(rows) > 3 and {row.get("failed") for row in rows[2:]} == {record.NOT_REACHED}
    assert [row["layout"] for row in rows[:3]] == [case.layout for case in checked]


def test_a_script_that_is_cut_off_says_which_stages_it_reached(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run_stage(name: str, *_: Any) -> Any:
        if name == "agreement":
            raise _CutOffError
        return gpu.Ended(name, "ok", 1.0, "well")

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    with pytest.raises(_CutOffError):
        gpu.main(["--out", str(tmp_path), "--only", "footprint", "agreement", "numerics"])
    ended = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert [(one["stage"], one["status"]) for one in ended] == [
        ("footprint", "ok"),
        ("agreement", "skipped"),
        ("numerics", "skipped"),
    ]
    assert {one["last_line"] for one in ended[1:]} == {gpu.NOT_REACHED}

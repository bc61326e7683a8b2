"""Chrome traces: lanes are threads, events on one thread do not overlap, and the command writes them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from meshwright.account import Span, Timeline
from meshwright.cli.entry import main
from meshwright.planner.chrome import chrome_trace

TIMELINE = Timeline(
    3.0,
    spans=(
        Span("tensor:intra", "all_reduce", "forward", "x", 1.0, 2.5),
        Span("compute", "matmul", "forward", "layers.0.mlp", 0.0, 1.0),
        Span("compute", "matmul", "forward", "", 2.5, 3.0),
    ),
)


def test_spans_are_complete_events_in_microseconds() -> None:
    events = chrome_trace({"formula": TIMELINE})["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [(e["name"], e["pid"], e["tid"], e["ts"], e["dur"]) for e in spans] == [
        ("all_reduce x", 0, 1, 1e6, 1.5e6),
        ("matmul layers.0.mlp", 0, 0, 0, 1e6),
        ("matmul", 0, 0, 2.5e6, 0.5e6),
    ]


def test_processes_and_threads_have_names() -> None:
    events = chrome_trace({"formula": TIMELINE, "run": TIMELINE})["traceEvents"]
    names = [(e["name"], e["pid"], e["tid"], e["args"]["name"]) for e in events if e["name"].endswith("_name")]
    assert names == [
        ("process_name", 0, 0, "formula"),
        ("thread_name", 0, 0, "compute"),
        ("thread_name", 0, 1, "tensor:intra"),
        ("process_name", 1, 0, "run"),
        ("thread_name", 1, 0, "compute"),
        ("thread_name", 1, 1, "tensor:intra"),
    ]


def test_plan_writes_the_trace_of_the_best_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.json"
    assert main(["plan", "llama3-8b", "--devices", "64", "--top", "1", "--json", "--trace", str(file)]) == 0
    planned = json.loads(capsys.readouterr().out)["layouts"][0]["step_seconds"]
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == "X"]
    by_thread: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        by_thread.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert len(by_thread) > 1
    for spans in by_thread.values():
        assert all(end <= start + 1e-3 for (_, end), (start, _) in pairwise(sorted(spans)))
    assert max(end for spans in by_thread.values() for _, end in spans) == pytest.approx(planned * 1e6)


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "missing" / "trace.json"
    assert main(["plan", "quickstart", "--trace", str(file)]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.strip() == f"--trace {file} cannot be written (No such file or directory): name a file of yours"


def test_a_step_without_a_time_has_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.json"
    assert main(["plan", "quickstart", "--training.precision", "bf16", "--trace", str(file)]) == 2
    assert capsys.readouterr().err.strip() == (
        "--trace has nothing to show (no time, as the bf16 peak of cpu is not known): give a --cluster whose figures "
        "are known, such as one of meshwright bench calibrate"
    )
    assert not file.exists()

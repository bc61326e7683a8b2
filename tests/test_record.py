"""Benchmark records: what is written is sound, and unsound ones are found."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.bench import record

ROWS = [
    record.row(layout="tensor 2", num_bytes=1024, samples=[3.0, 1.0, 2.0], unit="s", limit=1.0, limit_kind="least"),
    record.row(layout="tensor 4", agree=True),
    record.row(layout="tensor 8", failed="out of memory"),
]


@pytest.fixture
def written(tmp_path):
    return record.write("example", "meshwright bench example", ROWS, device="NVIDIA H200", folder=tmp_path)


def test_a_row_derives_its_figures():
    assert ROWS[0] == {
        "layout": "tensor 2",
        "num_bytes": 1024,
        "samples": [3.0, 1.0, 2.0],
        "unit": "s",
        "median": 2.0,
        "spread": 1.0,
        "limit": 1.0,
        "limit_kind": "least",
        "percent_of_limit": 50.0,
    }
    assert record.row(samples=[80.0], unit="GB/s", limit=100.0)["percent_of_limit"] == 80.0
    assert ROWS[2] == {"layout": "tensor 8", "failed": "out of memory"}


def test_write_and_check(written, tmp_path):
    content = json.loads(written.read_text())
    assert written.relative_to(tmp_path).as_posix() == f"example/nvidia-h200-{content['date']}.json"
    assert content["rows"] == ROWS
    assert set(content["environment"]) == {"python", "torch", "platform", "cpu", "cores", "device"}
    assert record.check(tmp_path) == []


def test_a_record_is_never_overwritten(written, tmp_path):
    again = record.write("example", "meshwright bench example", ROWS, device="NVIDIA H200", folder=tmp_path)
    assert again.stem == f"{written.stem}-2"
    assert record.check(tmp_path) == []


def test_nothing_unsound_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"rows\[0\]: value is not a plain, finite value"):
        record.write("example", "command", [{"value": math.nan}], folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content.pop("command"), "record has no command"),
        (lambda content: content.update(command=""), "record.command is not a str with content"),
        (lambda content: content.update(note="x"), "unknown keys note"),
        (lambda content: content.update(rows=[]), "no rows"),
        (lambda content: content.update(rows=[3]), "rows[0]: not a table"),
        (lambda content: content["environment"].pop("torch"), "environment has no torch"),
        (lambda content: content["environment"].update(cores=True), "environment.cores is not a int with content"),
        (lambda content: content["rows"][0].update(samples=[]), "rows[0]: samples is not a list of numbers"),
        (
            lambda content: content["rows"][0].update(median=9.0),
            "rows[0]: median = 9.0 is not that of its samples, 2.0",
        ),
        (lambda content: content["rows"][0].pop("unit"), "rows[0]: has samples, median, spread without unit"),
        (
            lambda content: content["rows"][0].update(limit=0),
            "rows[0]: limit is not a number above 0 with limit_kind most or least",
        ),
        (
            lambda content: content["rows"][0].update(percent_of_limit=99),
            "rows[0]: percent_of_limit = 99 is not that of its samples, 50.0",
        ),
        (lambda content: content["rows"][2].update(failed=""), "rows[2]: failed does not say why"),
        (
            lambda content: content["rows"][1].update(layout={"tensor": 4}),
            "rows[1]: layout is not a plain, finite value or a list of such",
        ),
    ],
)
def test_problems_are_named(written, tmp_path, change, problem):
    content = json.loads(written.read_text())
    change(content)
    written.write_text(json.dumps(content))
    assert record.check(tmp_path) == [f"{written}: {problem}"]


def test_a_file_in_the_wrong_place(written, tmp_path):
    moved = written.rename(written.with_name("elsewhere.json"))
    assert record.check(tmp_path)[0].startswith(f"{moved}: the path is not example/nvidia-h200-")


def test_command_line(written, tmp_path, capsys):
    assert record.main(["check", str(tmp_path)]) == 0
    assert record.main(["check", str(tmp_path / "absent")]) == 0
    written.write_text("{")
    assert record.main(["check", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"{written}: not JSON: ")
    assert record.main([]) == 2


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=20))
def test_spread_is_within_the_samples(samples):
    assert 0 <= record.spread(samples) <= max(samples) - min(samples) + 1e-6


def test_a_growing_record_is_one_file_that_says_what_was_not_reached(tmp_path: Path) -> None:
    other = record.write("grown", "x", [record.row(job="old")], "GPU", tmp_path)
    grown = record.Growing("grown", "x", "GPU", tmp_path)
    for done in range(3):
        jobs = [record.row(job=str(job), bytes=job) for job in range(done)]
        grown.write([*jobs, *(record.not_reached(job=str(job)) for job in range(done, 2))])
        assert record.check(tmp_path) == []
        rows = json.loads(grown.path.read_text(encoding="utf-8"))["rows"] if grown.path else []
        assert [row.get("failed", "") for row in rows] == [*[""] * done, *[record.NOT_REACHED] * (2 - done)]
    assert grown.path is not None and grown.path != other
    assert sorted(tmp_path.rglob("*.*")) == sorted([grown.path, other])

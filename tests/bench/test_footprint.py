"""What is compared with CUDA's allocator, as far as no GPU is needed."""

from __future__ import annotations

import pytest
from jobs import tiny_job

from meshwright.account import Footprint, Memory, Repeat, StepAccount, Trace
from meshwright.bench.footprint import Block, Level, Measured, rounded, rounded_footprint, rows
from meshwright.config.tree import Layout
from meshwright.planner.step import formula
from meshwright.rehearsal.rehearse import rehearse_job
from meshwright.verify.matrix import MODELS


@pytest.mark.parametrize(("nbytes", "expected"), [(0, 0), (1, 512), (512, 512), (513, 1024)])
def test_sizes_are_rounded_up_to_blocks(nbytes: int, expected: int) -> None:
    assert rounded(nbytes) == expected


def test_each_storage_of_a_trace_is_rounded() -> None:
    def made(nbytes: int, category: str = "temporaries") -> Memory:
        return Memory(category, nbytes, "forward", "a")

    body = (made(700), made(-700), made(3, "saved_activations"))
    trace = Trace((made(1, "parameters"), Repeat(4, body)))
    found = rounded_footprint(trace)
    assert Footprint.of(trace).peak == 1 + 3 * 3 + 700
    assert found.peak == 512 + 3 * 512 + 1024
    assert found.bytes["saved_activations"] == 3 * 512


def accounts() -> tuple[StepAccount, StepAccount]:
    job = tiny_job(MODELS["grouped_query"], Layout(), "float32")
    return formula(job), rehearse_job(job)


def measured(rehearsed: StepAccount, *, extra: int = 0, peak: int = 0, left: int = 0) -> Measured:
    """An allocator that holds what was rehearsed, `extra` parameter bytes, and workspaces of a MiB, some of which were
    `left` by another job."""
    sizes = {name: rehearsed.footprint.bytes[name] for name in ("parameters", "gradients", "optimiser_states")}
    sizes["parameters"] += extra
    blocks = {name: (Block(size, size, rounded(size)),) for name, size in sizes.items()} | {"batch": ()}
    requested, allocated = sum(sizes.values()), sum(rounded(size) for size in sizes.values())
    before = Level(requested + 2**20, allocated + 2**20)
    top = rehearsed.footprint.peak + peak
    once = Level(2**20 - left, 2**20 - left)
    return Measured(blocks, before, Level(top + 2**20, top + 2**20), 2**29, once)


def test_what_was_there_before_is_taken_off_the_peak() -> None:
    planned, rehearsed = accounts()
    found = rows({"job": "tiny"}, planned, rehearsed, rehearsed, measured(rehearsed))
    assert [row["category"] for row in found] == ["parameters", "gradients", "optimiser_states", "peak"]
    assert not any("failed" in row for row in found)
    assert found[-1]["workspaces_bytes"] == 2**20
    assert found[-1]["relative_error"] == found[-1]["unseen_bytes"] == 0
    assert found[0]["unsplit_bytes"] == 0 and 0 <= found[0]["rounding_bytes"] < 512


def test_other_bytes_fail() -> None:
    planned, rehearsed = accounts()
    found = rows({}, planned, rehearsed, rehearsed, measured(rehearsed, extra=4))
    assert ["failed" in row for row in found] == [True, False, False, False]


def test_what_a_dropped_job_leaves_behind_is_no_workspace() -> None:
    planned, rehearsed = accounts()
    found = rows({}, planned, rehearsed, rehearsed, measured(rehearsed, left=512))[-1]
    assert found["failed"] == "512 bytes of a job that was dropped are still alive"
    assert found["left_bytes"] == 512


@pytest.mark.parametrize(("percent", "fails"), [(1, False), (-1, False), (4, True), (-4, True)])
def test_a_peak_more_than_two_percent_off_fails(percent: int, fails: bool) -> None:
    planned, rehearsed = accounts()
    off = measured(rehearsed, peak=rehearsed.footprint.peak * percent // 100)
    assert ("failed" in rows({}, planned, rehearsed, rehearsed, off)[-1]) == fails

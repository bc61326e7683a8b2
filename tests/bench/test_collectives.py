"""`bench collectives`: what is timed is what its rows say, and their figures are those that one counts by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranked_collectives

from meshwright.account import wire_bytes
from meshwright.bench import collectives, record
from meshwright.bench import collectives_rank as on_rank
from meshwright.bench.collectives import Place, Setting, rows_of
from meshwright.bench.collectives_rank import OPERATIONS, Case, Grid, measure_pool, plan
from meshwright.cli import main
from meshwright.comm.ranks import RankError, Ranks
from meshwright.config.backends import BACKEND_FACTORS, backend_factor
from meshwright.errors import UserError

Pool = Callable[[int], Ranks]
Capture = pytest.CaptureFixture[str]

KIB, MIB = 2**10, 2**20
LAB = Place(backend="gloo", hosts=2, ranks_per_host=2, where="lab", rates={"inter": 25e6})
"""400 Mbit/s, which two ranks share."""


def case(operation: str, payload: int, seconds: float, tier: str = "inter") -> Case:
    return Case(tier=tier, operation=operation, group_size=2, payload_bytes=payload, samples=(seconds,) * 3, calls=2)


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_tiers_are_measured_and_all_ranks_report_the_same(ranks: Pool) -> None:
    grid = Grid(hosts=2, ranks_per_host=2, sizes=(KIB, 4 * KIB), samples=1, seconds=60.0)
    first, *others = ranks(4).run(measure_pool, grid)
    assert [(c.tier, c.payload_bytes, c.operation) for c in first] == [
        (tier, size, operation) for tier in ("intra", "inter") for size in grid.sizes for operation in OPERATIONS
    ]
    assert all(c.group_size == 2 and len(c.samples) == 1 and min(c.samples) > 0 and not c.skipped for c in first)
    assert others == [first] * 3  # of the slowest rank


def test_groups_of_a_tier_are_the_ranks_of_a_host_or_one_of_each(ranks: Pool) -> None:
    grid = Grid(hosts=2, ranks_per_host=2)
    found = ranks(4).run(ranked_collectives.members, grid)
    assert [one["intra"] for one in found] == [
        [0, 1],
        [0, 1],
        [2, 3],
        [2, 3],
    ]
    assert [one["inter"] for one in found] == [
        [0, 2],
        [1, 3],
        [0, 2],
        [1, 3],
    ]


@pytest.mark.parametrize("world", [2, 3])
def test_a_call_sends_what_its_row_says(world: int, ranks: Pool) -> None:
    expected = [(operation, world, payload_of(KIB, world)) for operation in OPERATIONS]
    assert ranks(world).run(ranked_collectives.issued, KIB) == [expected] * world


def payload_of(size: int, world: int) -> int:
    return {(KIB, 2): 1024, (KIB, 3): 1032}[size, world]


def test_what_does_not_fit_into_the_time_is_skipped_by_all_ranks(ranks: Pool) -> None:
    grid = Grid(ranks_per_host=2, sizes=(KIB, 4 * KIB, 16 * KIB), samples=5, seconds=1e-9)
    first, second = ranks(2).run(measure_pool, grid)
    assert first == second
    assert [len(c.samples) for c in first] == [on_rank.LEAST_SAMPLES] * 5 + [0] * 10
    assert [bool(c.skipped) for c in first] == [False] * 5 + [True] * 10
    assert first[-1].skipped.endswith("s for 4 calls of each operation, 0.0 s left")


def test_calls_of_a_case() -> None:
    """(samples, calls of each): the fastest try fills a sample, the usual one says how many are affordable."""
    assert plan([2**-10], 8.0, 15) == (15, 102)
    assert plan([2**-10, 2**-9, 2**-9], 1.0, 15) == (5, 102)
    assert plan([2**-10], 0.06, 15) == (3, 20)
    assert plan([2**-20], 8.0, 15) == (15, 128)
    assert plan([2**-3], 1.25, 15) == (10, 1)
    assert plan([2**3], 1.0, 15) == (3, 1)
    assert plan([2**3], 1.0, 2) == (2, 1)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_bandwidths_of_a_row() -> None:
    """1 MiB in groups of 4: an all-reduce sends 2 · 3/4 of it, a reduce-scatter 3/4, and gloo's twice that."""
    place = Place(backend="gloo", ranks_per_host=4)
    cases = [
        Case(tier="intra", operation=operation, group_size=4, payload_bytes=MIB, samples=(0.25, 0.5, 1.0))
        for operation in OPERATIONS
    ]
    rows = {row["operation"]: row for row in rows_of(place, cases) if row["kind"] == "case"}
    passes = {
        name: (row["algorithm_bandwidth"], row["bus_bandwidth"], row["link_bandwidth"]) for name, row in rows.items()
    }
    assert passes == {
        "all_reduce": (2 * MIB, 3 * MIB, 3 * MIB),
        "all_gather": (2 * MIB, 1.5 * MIB, 1.5 * MIB),
        "reduce_scatter": (2 * MIB, 1.5 * MIB, 3 * MIB),
        "all_to_all": (2 * MIB, 1.5 * MIB, 1.5 * MIB),
        "shift": (2 * MIB, 2 * MIB, 2 * MIB),
    }
    assert not any("limit" in row for row in rows.values())


def test_the_rate_of_a_link_limits_the_seconds() -> None:
    """1 MB in groups of 2 sends half of it; at 25 MB/s that lasts 20 ms, twice as long where gloo sends it twice."""
    rows = rows_of(LAB, [case("all_gather", 10**6, 0.025), case("reduce_scatter", 10**6, 0.05)])
    gather, scatter, *_ = rows
    assert (gather["limit"], gather["limit_kind"], gather["percent_of_limit"]) == (0.02, "least", pytest.approx(80))
    assert (scatter["limit"], scatter["percent_of_limit"]) == (0.04, pytest.approx(80))
    assert gather["link_bandwidth"] == scatter["link_bandwidth"] == pytest.approx(0.8 * 25e6)
    inside, *_ = rows_of(LAB, [case("all_gather", 10**6, 0.025, tier="intra")])
    assert "limit" not in inside


def test_fits_have_the_constants_of_their_cases_and_no_others() -> None:
    """By operation and tier; the factor is taken out of the bandwidth."""
    alpha = {"intra": 1e-4, "inter": 5e-4}
    beta = {"intra": 1e9, "inter": 24e6}
    cases = [
        case(operation, size, seconds, tier)
        for tier in alpha
        for operation in OPERATIONS
        for size in on_rank.SIZES
        for seconds in [alpha[tier] + wire_bytes(operation, 2, size) * backend_factor("gloo", operation) / beta[tier]]
    ]
    fits = [row for row in rows_of(LAB, cases) if row["kind"] == "fit"]
    assert [(row["tier"], row["operation"]) for row in fits] == [(t, o) for t in alpha for o in OPERATIONS]
    for row in fits:
        assert row["latency_seconds"] == pytest.approx(alpha[row["tier"]], rel=1e-6)
        assert row["bandwidth"] == pytest.approx(beta[row["tier"]], rel=1e-6)
        assert row["sizes"] == list(on_rank.SIZES) and len(row["residuals"]) == len(on_rank.SIZES)
        assert row["worst_residual"] < 1e-6
        assert row["link_rate"] == {"intra": None, "inter": 25e6}[row["tier"]]


def test_rows_make_a_sound_record_also_where_some_are_missing(tmp_path: Path) -> None:
    skipped = replace(case("shift", 4 * MIB, 1.0), samples=(), skipped="no time")
    rows = rows_of(LAB, [case("all_reduce", KIB, 1e-3), case("all_reduce", MIB, 1e-1), skipped])
    record.write("collectives", Setting().command(), rows, folder=tmp_path)
    assert record.check(tmp_path) == []
    assert [row["skipped"] for row in rows if row["kind"] == "case" and "skipped" in row] == ["no time"]
    assert not any("failed" in row for row in rows)
    unfit = {row["operation"]: row["skipped"] for row in rows if row["kind"] == "fit" and "skipped" in row}
    assert unfit["shift"] == "fewer than two sizes were measured, and one tells no bandwidth"
    (fitted,) = (
        row for row in rows if row["kind"] == "fit" and row["operation"] == "all_reduce" and "residuals" in row
    )
    assert fitted["tier"] == "inter"


def test_backends_send_what_the_convention_says_but_for_one() -> None:
    assert BACKEND_FACTORS == {"gloo": {"reduce_scatter": 2.0}, "nccl": {}}
    assert [backend_factor("gloo", operation) for operation in OPERATIONS] == [1, 1, 2, 1, 1]


def test_the_whole_grid_is_there_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 2 ranks with room for 4 copies of 4 KiB each."""
    monkeypatch.setattr(collectives, "available_memory", lambda: 2 * (collectives.BYTES_OF_A_RANK + 4 * 4 * KIB))
    rows = collectives.measure(Setting(worlds=(2,), backend="gloo", max_bytes=16 * KIB, samples=3, max_seconds=5.0))
    cases = [row for row in rows if row["kind"] == "case"]
    assert [row["payload_bytes"] for row in cases if "median" in row] == [KIB] * 5 + [4 * KIB] * 5
    assert [row["payload_bytes"] for row in cases if "skipped" in row] == [16 * KIB] * 5
    assert {row["skipped"] for row in cases if "skipped" in row} == {
        "4 buffers of 16 KiB on each of 2 ranks do not fit into free memory"
    }


def test_a_place_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> list[Case]:
        raise RankError(1, "Traceback\n  ...\nRuntimeError: out of luck\n")

    monkeypatch.setattr(collectives, "_run", fail)
    rows = collectives.measure(replace(collectives.QUICK, worlds=(2, 4)))
    assert [(row["ranks"], row["failed"]) for row in rows] == [
        (2, "rank 1: RuntimeError: out of luck"),
        (4, "rank 1: RuntimeError: out of luck"),
    ]


# --- other ways to start ranks ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_rank_program_under_torchs_launcher() -> None:
    grid = Grid(ranks_per_host=2, sizes=(KIB, 4 * KIB), samples=1, seconds=20.0)
    cases = collectives._by_torchrun(grid, "cpu")
    assert [(c.tier, c.operation, c.group_size, c.payload_bytes, len(c.samples)) for c in cases] == [
        ("intra", operation, 2, size, 1) for size in grid.sizes for operation in OPERATIONS
    ]


@pytest.mark.slow
def test_nothing_passes_a_link_of_the_lab_faster_than_its_rate() -> None:
    """In no sample, and in no fit: two ranks a host share a link of 400 Mbit/s."""
    lab = pytest.importorskip("meshwright.lab")
    if obstacle := lab.obstacle():
        pytest.skip(obstacle)
    rows = collectives.measure(Setting(lab_hosts=2, lab_ranks=2, max_bytes=MIB, samples=3, max_seconds=16.0))
    limited = [row for row in rows if "limit" in row]
    assert {(row["tier"], row["operation"]) for row in limited} == {("inter", operation) for operation in OPERATIONS}
    assert all(seconds >= row["limit"] for row in limited for seconds in row["samples"])
    fits = [row for row in rows if row["kind"] == "fit" and row["tier"] == "inter"]
    assert len(fits) == len(OPERATIONS)
    assert all(0 < row["bandwidth"] <= 25e6 * (1 + 1e-9) for row in fits)


# --- command line -----------------------------------------------------------------------------------------------------


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    code = main(["bench", "collectives", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def planted(setting: Setting) -> list[dict[str, Any]]:
    """As `collectives.measure`: 2 ms and 20 MB/s, the last size skipped."""
    cases = [
        case(operation, size, 2e-3 + wire_bytes(operation, 2, size) * backend_factor("gloo", operation) / 20e6)
        for size in setting.sizes[:-1]
        for operation in OPERATIONS
    ]
    last = [replace(case(operation, setting.max_bytes, 1.0), samples=(), skipped="no time") for operation in OPERATIONS]
    return rows_of(replace(LAB, ranks_per_host=1), [*cases, *last])


def test_json_is_one_sound_record(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "measure", planted)
    code, out, err = run(capsys, "--lab-hosts", "2", "--max-bytes", "65536", "--samples", "7", "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    (found,) = json.loads(out)["records"]
    assert found["name"] == "collectives"
    assert found["command"] == (
        "meshwright bench collectives --lab-hosts 2 --lab-ranks 1 --lab-rate 400mbit --max-bytes 65536 --samples 7 "
        "--max-seconds 60"
    )
    assert len(found["rows"]) == 4 * 5 + 5


def test_for_people(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "measure", planted)
    code, out, err = run(capsys, "--lab-hosts", "2", "--max-bytes", "65536")
    assert (code, err) == (0, "")
    assert "Collectives of 2 gloo ranks, 2 hosts × 1, lab" in out
    (line,) = (line for line in out.splitlines() if "all_reduce" in line and "16 KiB" in line)
    assert " ".join(line.split()[2:]) == "16 KiB 2.82 ms 0 s 5.81 MB/s 5.81 MB/s 5.81 MB/s 23 %"
    (line,) = (line for line in out.splitlines() if line.split()[:2] == ["reduce_scatter", "inter"])
    assert " ".join(line.split()) == "reduce_scatter inter 2.00 ms 20.0 MB/s 25 MB/s 0%"
    assert "skipped: inter 64 KiB (all_reduce, all_gather, reduce_scatter, all_to_all, shift): no time" in out
    assert collectives.NOTE in out


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            "--worlds 1,100",
            [
                "--worlds has 1 (a collective needs 2 ranks, this machine runs at most 64): use 2,4",
                "--worlds has 100 (a collective needs 2 ranks, this machine runs at most 64): use 2,4",
            ],
        ),
        ("--worlds two", ['--worlds = "two" is not whole numbers between commas: use 2,4']),
        (
            "--max-bytes 10 --samples 0 --max-seconds 0",
            [
                "--max-bytes = 10 is below the smallest payload, 1024 bytes: use 268435456",
                "--samples = 0 is not a whole number above 0",
                "--max-seconds = 0 is not a number above 0",
            ],
        ),
        (
            "--lab-rate 1gbit",
            ["--lab-rate without --lab-hosts: give the number of emulated hosts, such as --lab-hosts 2"],
        ),
        (
            "--lab-hosts 1",
            [
                "--lab-hosts 1 × --lab-ranks 1 is not a cluster of at least 2 hosts with at least 1 rank each, and at "
                "most 64 ranks in all: use --lab-hosts 2"
            ],
        ),
        (
            "--lab-hosts 2 --worlds 2",
            ["--worlds cannot be given with --lab-hosts (its ranks are --lab-hosts × --lab-ranks): leave it"],
        ),
        (
            "--lab-hosts 2 --backend nccl",
            ["--backend = nccl does not run in the lab (its hosts have CPU ranks): use gloo"],
        ),
        ("--backend mpi", ['--backend = "mpi" is not one of auto, gloo, nccl']),
    ],
    ids=str,
)
def test_mistakes_are_lines(options: str, lines: list[str], capsys: Capture) -> None:
    assert run(capsys, *options.split()) == (2, "", "".join(f"{line}\n" for line in lines))


def test_quick_takes_every_second_size_and_its_command_says_so() -> None:
    assert collectives.QUICK.sizes == (KIB, 16 * KIB, 256 * KIB, 4 * MIB)
    assert collectives.QUICK.command() == (
        "meshwright bench collectives --worlds 2 --backend gloo --quick --max-bytes 4194304 --samples 5 --max-seconds 6"
    )


def test_ranks_without_gpus_have_no_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "_num_gpus", lambda: 2)
    places = collectives._places(Setting())
    assert [(place.backend, place.ranks) for place in places] == [("gloo", 2), ("gloo", 4), ("nccl", 2)]
    with pytest.raises(UserError, match="has 2 GPUs for 4 ranks"):
        collectives.check(Setting(backend="nccl"))

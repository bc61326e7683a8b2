"""`bench calibrate`: the file holds what the rows say, and `--cluster` takes it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshwright.bench import calibrate, collectives
from meshwright.bench.calibrate import Rate, Setting, cluster_of, text_of, write
from meshwright.bench.collectives import Place, rows_of
from meshwright.bench.collectives_rank import OPERATIONS, SIZES, Case
from meshwright.cli import main
from meshwright.comm.ranks import Ranks
from meshwright.config.hardware import load_cluster
from meshwright.config.tree import Link
from meshwright.errors import UserError

Capture = pytest.CaptureFixture[str]
Rows = list[dict[str, Any]]

SETTING = Setting(ranks=4, collectives=collectives.Setting(worlds=(4,), backend="gloo"))
LAB = replace(SETTING, collectives=collectives.Setting(lab_hosts=2, lab_ranks=2))


def rates() -> Rows:
    """Two ranks; the slower one of each sample counts. 2·1000³ FLOPs in 0.1 s, 2·2000³ in 0.5 s."""
    found = [
        Rate(name="float32", size=1000, amount=2 * 10**9, seconds=(0.1, 0.1, 0.05)),
        Rate(name="float32", size=2000, amount=16 * 10**9, seconds=(0.5, 0.5, 0.5)),
        Rate(name="bf16", size=1000, amount=2 * 10**9, seconds=(0.2, 0.2, 0.2)),
        Rate(name="copy", size=10**6, amount=2 * 10**6, seconds=(1e-3, 1e-3, 1e-3)),
    ]
    faster = [replace(rate, seconds=(rate.seconds[0] / 2, *rate.seconds[1:])) for rate in found]
    return calibrate._rate_rows(4, [found, faster])


def links(hosts: int = 1, tiers: tuple[str, ...] = ("intra",)) -> Rows:
    """100 µs and 1 GB/s, ten times as slow between hosts; other operations than the all-reduce are slower still."""
    place = Place(backend="gloo", hosts=hosts, ranks_per_host=4 // hosts)
    cases = [
        Case(tier=tier, operation=operation, group_size=2, payload_bytes=size, samples=(slow * (1e-4 + size / 1e9),))
        for tier in tiers
        for operation in OPERATIONS
        for slow in [(10 if tier == "inter" else 1) * (1 if operation == "all_reduce" else 3)]
        for size in SIZES
    ]
    return rows_of(place, cases)


def test_the_cluster_of_rows() -> None:
    cluster = cluster_of(SETTING, [*rates(), *links()], "measured today")
    assert (cluster.hosts, cluster.devices_per_host) == (1, 4)
    assert cluster.intra == Link(latency_seconds=1e-4, bandwidth=1e9)
    assert cluster.inter == load_cluster("laptop").inter
    assert cluster.source == (
        "measured today; links: constants of all-reduce; inter assumed, as in the catalog's laptop"
    )
    device = cluster.device
    assert device.kind == "cpu"
    assert device.peak_flops == {"float32": 32e9, "bf16": 10e9}  # the better of 20 and 32 GFLOP/s
    assert device.memory_bandwidth == 2e9
    assert device.memory_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def test_the_cluster_of_a_lab_has_both_tiers() -> None:
    cluster = cluster_of(LAB, [*rates(), *links(2, ("intra", "inter"))], "measured today")
    assert (cluster.hosts, cluster.devices_per_host) == (2, 2)
    assert cluster.intra == Link(latency_seconds=1e-4, bandwidth=1e9)
    assert cluster.inter == Link(latency_seconds=1e-3, bandwidth=1e8)
    assert cluster.source == "measured today; links: constants of all-reduce"


def test_the_file_is_that_cluster(tmp_path: Path) -> None:
    rows = [*rates(), *links()]
    cluster = cluster_of(SETTING, rows, 'a "quoted" source')
    out = tmp_path / "here.toml"
    write(out, text_of(cluster, rows))
    assert load_cluster(out) == replace(cluster, name="here")
    comments = [line for line in out.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert [line.split()[2] for line in comments[1:]] == list(OPERATIONS)
    assert comments[1] == "#   intra all_reduce      100 µs, 1.00 GB/s, 0%"


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "here.toml"
    out.write_text("mine", encoding="utf-8")
    text = text_of(cluster_of(SETTING, [*rates(), *links()], ""), links())
    with pytest.raises(UserError, match="is there already"):
        write(out, text)
    assert out.read_text(encoding="utf-8") == "mine"


def test_a_cluster_that_no_command_would_take_is_not_written(tmp_path: Path) -> None:
    cluster = cluster_of(SETTING, [*rates(), *links()], "")
    out = tmp_path / "here.toml"
    with pytest.raises(UserError, match=r"intra\.bandwidth"):
        write(out, text_of(replace(cluster, intra=Link()), []))
    assert not out.exists()


def test_what_failed_makes_no_cluster() -> None:
    only = [
        Case(tier="intra", operation=operation, group_size=4, payload_bytes=1024, samples=(1.0,))
        for operation in OPERATIONS
    ]
    rows = [*rates(), *rows_of(Place(backend="gloo", ranks_per_host=4), only)]
    with pytest.raises(UserError) as raised:
        cluster_of(SETTING, rows, "")
    assert str(raised.value) == (
        "calibrate cannot write a cluster: intra all_reduce: fewer than two sizes were measured, and one tells no "
        "bandwidth"
    )
    with pytest.raises(UserError, match=r"^calibrate cannot write a cluster: rank 1: out of luck$"):
        cluster_of(SETTING, [{"kind": "rate", "ranks": 4, "failed": "rank 1: out of luck"}], "")


def test_rates_of_ranks(ranks: Callable[[int], Ranks]) -> None:
    first, second = ranks(2).run(calibrate.rates_rank, (8, 16), 4096, 3, "cpu")
    assert [(rate.name, rate.size, rate.amount) for rate in first] == [
        ("float32", 8, 1024),
        ("float32", 16, 8192),
        ("bf16", 8, 1024),
        ("bf16", 16, 8192),
        ("copy", 4096, 8192),
    ]
    assert all(len(rate.seconds) == 3 and min(rate.seconds) > 0 for rate in [*first, *second])


# --- command line -----------------------------------------------------------------------------------------------------


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    code = main(["bench", "calibrate", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_plan_takes_what_was_written(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[collectives.Setting] = []
    monkeypatch.setattr(collectives, "measure", lambda setting: asked.append(setting) or links())
    quick = Setting(matmul_sizes=(64,), copy_bytes=4096, samples=2, quick=True)
    monkeypatch.setattr(calibrate, "QUICK", quick)
    out = tmp_path / "here.toml"
    code, text, err = run(capsys, "--quick", "--ranks", "2", "--max-seconds", "2", "--out", str(out))
    assert (code, err) == (0, "")
    assert f"written: {out}" in text
    cluster = load_cluster(out)
    command = f"meshwright bench calibrate --out {out} --ranks 2 --max-seconds 2 --quick"
    assert cluster.source.startswith("measured on ") and command in cluster.source
    assert (cluster.hosts, cluster.devices_per_host) == (1, 2)
    assert cluster.intra == Link(latency_seconds=1e-4, bandwidth=1e9)
    assert asked == [replace(collectives.QUICK, worlds=(2,), backend="gloo", max_seconds=2.0)]
    assert main(["plan", "quickstart", "--cluster", str(out), "--json"]) == 0


def test_mistakes_are_lines(tmp_path: Path, capsys: Capture) -> None:
    there = tmp_path / "there.toml"
    there.touch()
    assert run(capsys) == (2, "", "bench calibrate needs --out: give it the file to write, such as --out here.toml\n")
    assert run(capsys, "--out", str(there)) == (
        2,
        "",
        f"--out {there} is there already (calibrate never overwrites a file): name another, or remove it\n",
    )
    nowhere = tmp_path / "no" / "here.toml"
    assert run(capsys, "--out", str(nowhere)) == (
        2,
        "",
        f"--out {nowhere}: the folder {nowhere.parent} is not there: make it, or name another\n",
    )
    free = str(tmp_path / "here.toml")
    assert run(capsys, "--out", free, "--ranks", "0") == (2, "", "--ranks = 0 is not a whole number above 0\n")
    assert run(capsys, "--out", free, "--ranks", "4", "--lab-hosts", "2") == (
        2,
        "",
        "--ranks = 4 cannot be given with --lab-hosts: use --lab-ranks\n",
    )
    code, text, err = run(capsys, "--out", free, "--ranks", "1000")
    assert (code, text, err.count("\n")) == (2, "", 1)
    assert err.startswith("--ranks = 1000 is not between 1 and 64 (all ranks live on this machine): use ")

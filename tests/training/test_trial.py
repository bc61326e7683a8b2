"""The trial of an overlap: its verdict, that all ranks act on it, and that it leaves no other trace in a run."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ranked_trial
from training.test_launch import PATIENCE_SECONDS, commands
from training.tiny import job, write_text

from meshwright import launch
from meshwright.account import Ledger
from meshwright.comm.ranks import Ranks
from meshwright.config.files import dump_job, load_job
from meshwright.config.tree import Cluster, Device, Job, Layout, Link, Training
from meshwright.planner.overlap import LEAST_GAIN, Decision, Option, decide, priced, resolve
from meshwright.planner.step import formula
from meshwright.rehearsal.rehearse import rehearse_job
from meshwright.schemes.partition import RULES, unsplit
from meshwright.training.run_folder import RunFolder
from meshwright.training.trial import (
    LEAST_FASTER_SHARE,
    SPARE_MEMORY,
    WARM_UP_STEPS,
    Trial,
    bytes_of_both,
    cost_in_steps,
    reason_against,
)

# --- the verdict ------------------------------------------------------------------------------------------------------

VERDICTS = {
    "faster in all pairs": ([0.8, 0.9, 0.8, 0.9], True),
    "slower": ([1.1, 1.2, 1.1, 1.05], False),
    "equal": ([1.0, 1.0, 1.0, 1.0], False),
    "faster by less than the timeline tells apart": ([0.996, 0.996, 0.997, 0.996], False),
    "faster by a little more": ([0.994, 0.994, 0.993, 0.994], True),
    "faster but for one disturbed pair": ([0.9, 9.0, 0.9, 0.9], True),
    "faster in half of the pairs, by more than it is slower in the others": ([0.5, 1.05, 0.6, 1.05], False),
    "slower but for one disturbed pair": ([1.05, 0.1, 1.05, 1.05], False),
    "one pair": ([0.9], True),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(name: str) -> None:
    ratios, pays = VERDICTS[name]
    assert Trial(tuple(2 * ratio for ratio in ratios), (2.0,) * len(ratios)).pays is pays


def test_pairs_are_compared_not_sums() -> None:
    """The machine is ten times slower in the second half: in each pair the chosen layout is the faster one."""
    trial = Trial((0.9, 0.9, 9.0, 9.0), (1.0, 1.0, 10.0, 10.0))
    assert (trial.ratio, trial.pays) == (0.9, True)


def test_the_slowest_rank_counts() -> None:
    ranks = [((1.0, 4.0), (3.0, 3.0)), ((2.0, 1.0), (1.0, 5.0))]
    assert Trial.of_ranks(ranks) == Trial((2.0, 4.0), (3.0, 5.0))


def test_lines_have_both_figures() -> None:
    layout = Layout(tensor=2, overlap="pipelined", overlap_chunks=4)
    assert Trial((0.712,) * 4, (0.698,) * 4).line(layout) == (
        "overlap: products in 4 chunks measured 712 ms a step against 698 ms with nothing cut: falls back "
        "(median ratio 1.020 of 4 pairs)"
    )
    assert Trial((0.5,), (1.0,)).line(replace(layout, hierarchical=True)) == (
        "overlap: products in 4 chunks + hierarchical sums measured 500 ms a step against 1 s with nothing cut: "
        "stays (median ratio 0.500 of 1 pair)"
    )


def test_figures() -> None:
    assert Trial((1.0, 3.0, 2.0), (2.0, 2.0, 2.0)).to_json() == {
        "chosen_seconds": [1.0, 3.0, 2.0],
        "unsplit_seconds": [2.0, 2.0, 2.0],
        "ratio": 1.0,
        "interval": [0.5, 1.5],
        "confidence": 0.75,
        "pays": False,
    }


def test_who_has_none() -> None:
    cost = cost_in_steps(job(trial_steps=3).training)
    assert reason_against(job(trial_steps=3, steps=cost).training) == ""
    assert reason_against(job(trial_steps=3, steps=cost - 1).training) == (
        f"it would take {cost} steps, more than the run's {cost - 1}"
    )
    assert reason_against(job(trial_steps=0, steps=cost).training) == "training.trial_steps = 0"


def test_memory_of_both() -> None:
    """One steps, with all that it holds at its peak, while the other one keeps what lasts."""
    first = {"parameters": 10, "gradients": 20, "optimiser_states": 40, "temporaries": 1000, "peak": 500}
    second = {"parameters": 1, "gradients": 2, "optimiser_states": 4, "temporaries": 2000, "peak": 600}
    assert bytes_of_both(first, second) == bytes_of_both(second, first) == 670


# --- real ranks, planted clocks ---------------------------------------------------------------------------------------

LINK = Link(1e-6, 1e7)
SLOW_LINKS = Cluster(device=Device(peak_flops={"float32": 1e9}), hosts=2, devices_per_host=1, intra=LINK, inter=LINK)
AUTO = Layout(tensor=2, sequence_parallel=True)
FASTER, SLOWER = (1.0, 2.0), (2.0, 1.0)
"""Seconds of what is cut, and of what is not."""


def auto_job(folder: Path, **training: Any) -> Job:
    """Its timeline says that cutting products pays."""
    made = job(AUTO, data=write_text(folder / "text"), trial_steps=2, **{"steps": 8, **training})
    made = replace(made, cluster=SLOW_LINKS)
    assert decide(made).chosen.job.layout.overlap == "pipelined"
    return made


def decided(chosen: Job, fallback: Layout) -> Decision:
    options = [Option(one, (), priced(one)) for one in (replace(chosen, layout=fallback), chosen)]
    return Decision(options[1], tuple(options))


def check_folder(folder: RunFolder, kept: Layout, *, pays: bool) -> dict[str, Any]:
    """Job, plan and rehearsal are those of what was kept; returns the trial's figures."""
    replayed = load_job(folder.job_file)
    assert replayed.layout == kept
    plan = folder.read_account("plan")
    assert plan["ledger"] == formula(replayed).ledger.to_json()
    assert folder.read_account("rehearsal")["ledger"] == rehearse_job(replayed).ledger.to_json()
    assert plan["overlap"]["chosen"]["overlap"] == kept.overlap
    assert plan["overlap"]["trial"]["pays"] is pays
    assert not folder.fallback.exists()
    return plan["overlap"]["trial"]


TWO = {
    "products": (replace(AUTO, overlap="pipelined", overlap_chunks=2), replace(AUTO, overlap="none")),
    "zero 3, two units ahead": (Layout(shard=2, overlap="none", prefetch=2), Layout(shard=2, overlap="none")),
    "zero 1, small buckets": (
        Layout(shard=2, zero=1, overlap="none", bucket_mib=0.004),
        Layout(shard=2, zero=1, overlap="none"),
    ),
}


@pytest.mark.parametrize(
    ("name", "seconds"), [("products", FASTER), *((name, SLOWER) for name in TWO)], ids=lambda one: str(one)
)
def test_the_run_is_the_one_without_a_trial(
    ranks: Callable[[int], Ranks],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    seconds: tuple[float, float],
) -> None:
    """To the bit, whichever layout is kept; and formula, rehearsal and run are of that one."""
    chosen, fallback = TWO[name]
    tried = replace(auto_job(tmp_path), layout=chosen)
    monkeypatch.setattr(launch, "decide", lambda _: decided(tried, fallback))
    folder = launch.prepare(tried, tmp_path / "runs")
    assert folder.layout() == chosen
    ran = ranks(2).run(ranked_trial.tried, tried, fallback, folder, {0: seconds, 1: seconds})
    kept = chosen if seconds == FASTER else fallback
    assert [one.layout for one in ran] == [kept, kept]
    assert ran == ranks(2).run(ranked_trial.untried, replace(tried, layout=kept))
    assert len(set(ran[0].losses)) == tried.training.steps
    assert ran[0].ledger == folder.read_account("plan")["ledger"] == folder.read_account("rehearsal")["ledger"]
    figures = check_folder(folder, kept, pays=kept == chosen)
    assert (figures["chosen_seconds"], figures["unsplit_seconds"]) == ([seconds[0]] * 2, [seconds[1]] * 2)


def test_all_ranks_agree_whatever_their_own_clocks_say(ranks: Callable[[int], Ranks]) -> None:
    """Alone, rank 0 would keep it and rank 1 fall back."""
    own = {0: ((1.0, 1.0), (2.0, 2.0)), 1: ((3.0, 3.0), (1.0, 1.0))}
    assert [Trial(*own[rank]).pays for rank in (0, 1)] == [True, False]
    assert ranks(2).run(ranked_trial.agreed, own) == [Trial((3.0, 3.0), (2.0, 2.0))] * 2


# --- whole runs -------------------------------------------------------------------------------------------------------


def finished(how: str, made: Job, folder: Path, seconds: tuple[float, float]) -> str:
    """What a run prints whose ranks hold their trial by a planted clock."""
    file = folder / "job.toml"
    file.write_text(dump_job(made))
    environment = os.environ | {"PYTHONPATH": ranked_trial.planted_site(folder / "site", *seconds)}
    ended = subprocess.run(
        commands(file, folder / "runs")[how],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=environment,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    ("how", "seconds"), [("train", SLOWER), pytest.param("torchrun", FASTER, marks=pytest.mark.slow)]
)
def test_launched(ranks: Callable[[int], Ranks], tmp_path: Path, how: str, seconds: tuple[float, float]) -> None:
    made = auto_job(tmp_path)
    printed = finished(how, made, tmp_path, seconds)
    pays = seconds == FASTER
    kept = resolve(made).layout if pays else unsplit(made.layout)
    figures = "1 s a step against 2 s" if pays else "2 s a step against 1 s"
    verdict = "stays (median ratio 0.500" if pays else "falls back (median ratio 2.000"
    said = [line for line in printed.splitlines() if line.startswith("overlap: ") and " measured " in line]
    assert len(said) == 1
    assert re.fullmatch(
        rf"overlap: products in \d chunks? measured {figures} with nothing cut: {re.escape(verdict)} of 2 pairs\)",
        said[0],
    )
    folder = RunFolder(tmp_path / "runs" / "tiny")
    trial = check_folder(folder, kept, pays=pays)
    run = folder.read_account("run")
    assert run["overlap"]["trial"] == trial
    assert Ledger.from_json(run["ledger"]) == Ledger.from_json(folder.read_account("plan")["ledger"])
    assert printed.splitlines()[-1].endswith("rows agree among formula, rehearsal and run")
    losses = [json.loads(line)["loss"] for line in folder.metrics_file.read_text().splitlines()]
    assert losses == ranks(2).run(ranked_trial.untried, replace(made, layout=kept))[0].losses


@pytest.mark.slow
def test_short_runs_resolve_and_say_that_nothing_was_tried(tmp_path: Path) -> None:
    """Started by torchrun, where rank 0 alone prepares: all run what it chose."""
    made = auto_job(tmp_path, steps=2)
    printed = finished("torchrun", made, tmp_path, SLOWER)
    assert "overlap: not tried before the run, as it would take 8 steps, more than the run's 2" in printed.splitlines()
    folder = RunFolder(tmp_path / "runs" / "tiny")
    assert folder.layout() == resolve(made).layout
    for name in ("plan", "run"):
        assert folder.read_account(name)["overlap"]["trial"] == {
            "skipped": "it would take 8 steps, more than the run's 2"
        }
    assert printed.splitlines()[-1].endswith("rows agree among formula, rehearsal and run")


@pytest.mark.parametrize("overlap", ["none", "pipelined"])
def test_what_is_typed_is_not_tried(tmp_path: Path, overlap: Any) -> None:
    made = auto_job(tmp_path)
    folder = launch.prepare(replace(made, layout=replace(made.layout, overlap=overlap)), tmp_path / "runs")
    assert not folder.fallback.exists()
    assert "trial" not in folder.read_account("plan")["overlap"]


# --- the page ---------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "overlap.md"


def test_the_page_has_the_constants_and_every_rule() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for rule in RULES:
        assert f"\n| {rule.name} |" in text
    assert f"below {1 - LEAST_GAIN:g}, and at least {LEAST_FASTER_SHARE:.0%} of".replace("%", " %") in text
    assert f"| warm-up | {WARM_UP_STEPS} steps" in text
    assert f"| `training.trial_steps` ({Training().trial_steps}) steps" in text
    assert f"2 · ({WARM_UP_STEPS} + `training.trial_steps`)" in text
    assert f"into {1 - SPARE_MEMORY:.0%} of".replace("%", " %") in text


def test_the_page_prints_what_a_trial_prints() -> None:
    """Its verdict, from the figures that stand in it."""
    pattern = r"^(overlap: .* measured ([\d.]+) (m?s) a step against ([\d.]+) (m?s) with nothing cut: falls back) \("
    ((line, *figures),) = re.findall(pattern, PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    units = {"s": 1.0, "ms": 1e-3}
    chosen, whole = (float(figures[i]) * units[figures[i + 1]] for i in (0, 2))
    made = Trial((chosen,) * 4, (whole,) * 4)
    assert line == made.line(Layout(tensor=2, overlap="pipelined")).partition(" (")[0]

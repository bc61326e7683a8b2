"""`bench gradients`: what it refuses, what it sets links to, and that its subjects compute the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import ranked_subjects

from meshwright.bench import gradients, record
from meshwright.bench.gradients_rank import MODEL, Problem, Subject, Times
from meshwright.cli.show_gradients import show_gradients
from meshwright.comm.ranks import Ranks
from meshwright.errors import UserError

TINY = Problem(replace(MODEL, layers=1, d_model=32, d_ff=48, heads=2, kv_heads=2, head_dim=16, vocab_size=64), 16)


def test_mistakes_are_said_at_once() -> None:
    with pytest.raises(UserError) as error:
        gradients.check(replace(gradients.QUICK, rates=("1", "fast", "1000"), samples=0))
    lines = str(error.value).splitlines()
    assert lines[0] == "--samples = 0 is not a whole number above 0"
    assert lines[1].startswith("--rates = ") and "fast" in lines[1]
    assert lines[2] == "--rates = 1000 is not a ratio of communication to backward between 0.01 and 100: use one"


def test_a_ratio_sets_the_link() -> None:
    """66 MiB, all of which each of two ranks sends, in twice the 0.2 s of backward."""
    alone = [Times(forward=0.1, backward=0.3, first_ready=0.12, end=0.3)]
    nbytes = 4 * sum(bucket.numel for bucket in Problem().buckets(25.0))
    assert gradients._rate_of("2", alone, Problem()) == f"{round(8 * nbytes / 0.4 / 1e6)}mbit"
    assert gradients._rate_of("400mbit", alone, Problem()) == "400mbit"


def test_the_command_measures_the_same_again() -> None:
    assert gradients.Setting().command().endswith("gradients --rates 0.5,1,2,400mbit --samples 30 --sweep 4")
    assert gradients.QUICK.command() == "meshwright bench gradients --quick --rates 1 --samples 6 --sweep 2"


def test_subjects_compute_the_same_gradients(ranks: Callable[[int], Ranks]) -> None:
    """Ours are sums over ranks, DDP's are means; of two ranks, the one is twice the other."""
    kinds = ("naive", "flat", "per_parameter", "bucketed", "ddp")
    found = ranks(2).run(ranked_subjects.norms, TINY, [Subject(kind, 0.01) for kind in kinds])
    for norms in found:
        *ours, ddp = norms
        assert ours == pytest.approx([ours[0]] * 4, rel=1e-6)
        assert 2 * ddp == pytest.approx(ours[0], rel=1e-6)


def test_times_of_a_sample(ranks: Callable[[int], Ranks]) -> None:
    for times in ranks(2).run(ranked_subjects.alone, TINY):
        assert 0 < times.forward < times.first_ready <= times.backward <= times.end


def test_rows_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    about = {"rate": "1", "link": "900mbit", "note": gradients.NOTE}
    rows = [
        record.row(part="alone: forward", samples=[0.1, 0.2], unit="s", **about),
        record.row(part="sweep", subject="naive", samples=[0.5], unit="s", **about),
        record.row(part="lost", failed="rank 1: the process ended", **about),
    ]
    show_gradients(rows)
    out = capsys.readouterr().out
    assert "communication / backward = 1, 900mbit" in out and "naive" in out
    assert "failed: rank 1: the process ended" in out

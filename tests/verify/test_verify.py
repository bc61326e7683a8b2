"""`verify` passes for right layouts and names the module of every planted bug."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from jobs import sampled, tiny_job
from planted import BareAllReduce, DoubledGather, Fault, doubled_maximum, every_axis_right, not_a_number, wrong_divisor

from meshwright.comm.ranks import Ranks
from meshwright.config.attention import chosen_attention
from meshwright.config.files import load_job
from meshwright.config.tree import Job, Layout
from meshwright.errors import UserError
from meshwright.planner.overlap import resolve
from meshwright.training.device import resolve_device
from meshwright.verify import verify as verify_module
from meshwright.verify.matrix import LAYOUTS, MODELS
from meshwright.verify.report import GradientReport, VerifyReport
from meshwright.verify.shrink import shrink_job
from meshwright.verify.verify import check_memory, needed_memory, verify, verify_on

Pool = Callable[[int], Ranks]
SEED = 20260

FORWARD = ["embedding", "layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp"]
BACKWARD = ["layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp", "head"]


PLACES = (
    ("grouped_query", "replicate 2 × tensor 2"),
    ("kv_heads_below_tensor", "tensor 4"),
    ("tied", "tensor 2"),
    ("layernorm_bias_learned", "replicate 2 × tensor 2"),
    ("odd_vocabulary", "tensor 4"),
    ("grouped_query", "replicate 4"),
)


@pytest.mark.parametrize(
    ("model", "layout", "precision"), sampled(((*p, precision) for precision in ("float32", "bf16") for p in PLACES), 4)
)
def test_right_layouts_agree(ranks: Pool, model: str, layout: str, precision: str) -> None:
    job = tiny_job(MODELS[model], LAYOUTS[layout], precision, accumulation=2)
    report = verify_on(job, ranks(job.layout.world), every_axis_right)
    assert report.agree, report.text()
    assert report.gradients.checked > 10 and report.rows["formula"] == report.rows["run"] > 0


def test_what_is_verified_is_the_overlap_of_the_whole_job(monkeypatch: pytest.MonkeyPatch, ranks: Pool) -> None:
    """Not that of the smaller model, nor that of the machine it is verified on."""
    verified: list[Job] = []
    monkeypatch.setattr(verify_module, "verify_on", lambda job, ranks: verified.append(job))
    overrides = [("layout.tensor", "8"), ("layout.sequence_parallel", "true"), ("training.batch", "8")]
    whole = load_job("llama3-8b", overrides)
    verify(whole, shrink=True, ranks=ranks(1))
    (job,) = verified
    assert job.layout == resolve(resolve_device(whole, planning=True)).layout
    assert job.layout.overlap == "pipelined"
    assert job.model.layers < whole.model.layers and job.training.device == "cpu"


def test_one_device_agrees_with_itself() -> None:
    with Ranks(1) as single:
        report = verify(tiny_job(), ranks=single)
    assert report.agree and report.rows == {"formula": 0, "rehearsal": 0, "run": 0}


def test_a_report_says_what_attention_ran() -> None:
    asked = replace(tiny_job().training, attention="auto")
    choice, gradients = chosen_attention(tiny_job().model, asked), GradientReport(1, (), ("a", 0.5))
    rows = dict.fromkeys(("formula", "rehearsal", "run"), 0)
    report = VerifyReport(1, choice, rows, (), (), 0.0, True, gradients, None)
    assert report.agree
    assert report.to_json()["attention"] == choice.to_json()
    line = "attention  auto takes sdpa_cpu: torch's kernel is the only fused one on a CPU"
    assert report.text().splitlines()[0] == line
    assert line not in replace(report, attention=replace(choice, asked="sdpa")).text()


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("fault", ["missing", "doubled", "wrong axis", "wrong tensor"])
def test_a_planted_fault_is_named(ranks: Pool, fault: str, in_backward: bool) -> None:
    module = random.Random(f"{SEED}/{fault}/{in_backward}").choice(BACKWARD if in_backward else FORWARD)
    job = tiny_job("grouped_query", "replicate 2 × tensor 2")
    report = verify_on(job, ranks(4), Fault(module, fault, in_backward))
    assert not report.agree
    assert report.first_difference is not None
    assert report.first_difference.kind == ("gradient" if in_backward else "activation")
    assert report.first_difference.module == module
    if fault != "wrong tensor":
        assert module in {d.site for d in report.formula_vs_rehearsal}
    assert not report.rehearsal_vs_run, "the rehearsal does what the run does, right or wrong"


def test_a_fault_in_the_loss_is_named(ranks: Pool) -> None:
    report = verify_on(tiny_job("grouped_query", "tensor 2"), ranks(2), Fault("loss", "missing", in_backward=False))
    assert not report.agree and report.first_difference is not None
    assert (report.first_difference.kind, report.first_difference.module) == ("loss", "loss")


def test_a_wrong_loss_divisor_is_named(ranks: Pool) -> None:
    report = verify_on(tiny_job("grouped_query", "replicate 2"), ranks(2), wrong_divisor)
    assert not report.agree and report.first_difference is not None
    assert (report.first_difference.kind, report.first_difference.module) == ("loss", "loss")
    assert not report.formula_vs_rehearsal and not report.rehearsal_vs_run, "the bytes are right, the number is not"


@pytest.mark.parametrize("instrument", [doubled_maximum, DoubledGather("layers.1.mlp")], ids=["maximum", "gather"])
def test_a_doubled_idempotent_collective_is_caught_by_the_ledger_alone(ranks: Pool, instrument: object) -> None:
    report = verify_on(tiny_job("grouped_query", "tensor 2"), ranks(2), instrument)  # type: ignore[arg-type]
    assert not report.agree and report.loss_passes and not report.gradients.failed
    assert report.first_difference is not None and report.first_difference.kind == "ledger"
    assert report.first_difference.module == getattr(instrument, "module", "loss")


def test_a_bare_all_reduce_appears_in_rehearsal_and_run(ranks: Pool) -> None:
    report = verify_on(tiny_job("grouped_query", "tensor 2"), ranks(2), BareAllReduce("layers.1.mlp"))
    assert not report.agree and not report.rehearsal_vs_run
    assert {(d.site, d.row["operation"], d.second - d.first) for d in report.formula_vs_rehearsal} == {
        ("layers.1.mlp", "all_reduce", 1)
    }


def test_shrinking_keeps_what_divides() -> None:
    from meshwright.config.files import load_job

    for name, tensor in (("llama3-405b", 8), ("gpt3-175b", 8), ("llama3-8b", 16), ("smollm-1.7b", 4)):
        job = load_job(name)
        job = replace(job, layout=Layout(tensor=tensor, replicate=2))
        small = shrink_job(job)
        assert not small.layout.violations(small.model, small.cluster, small.training)
        assert small.model.vocab_size % tensor == job.model.vocab_size % tensor
        assert (small.model.kv_heads < tensor) == (job.model.kv_heads < tensor)
        assert (small.model.kv_heads < small.model.heads) == (job.model.kv_heads < job.model.heads)
        assert needed_memory(small) < 8e9 < needed_memory(job)


def test_a_large_model_is_verified_shrunk(ranks: Pool) -> None:
    from meshwright.config.files import load_job

    job = replace(load_job("llama3-8b"), layout=Layout(replicate=2, tensor=2))
    report = verify(job, processes=4, shrink=True, ranks=ranks(4))
    assert report.agree, report.text()
    with pytest.raises(UserError, match="--processes 3 is not the product of the degrees"):
        verify(job, processes=3, shrink=True)


def test_a_model_too_large_is_refused_with_the_bytes() -> None:
    job = tiny_job()
    needed = needed_memory(job)
    check_memory(job, needed)
    with pytest.raises(UserError, match=rf"needs about .* \({needed} bytes\)") as error:
        check_memory(job, needed - 1)
    assert "--shrink" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2)], ids=["one device", "tensor 2"])
def test_a_batch_of_one_sequence_agrees(ranks: Pool, layout: Layout) -> None:
    """Slices of a single sequence are views of one storage: labels must not write into tokens."""
    report = verify(tiny_job(layout=layout, batch=1), ranks=ranks(layout.world))
    assert report.agree, report.text()


def test_what_is_not_a_number_is_reported_as_json(ranks: Pool) -> None:
    report = verify_on(tiny_job(layout="tensor 2"), ranks(2), not_a_number)
    assert not report.agree
    assert report.first_difference is not None
    assert (report.first_difference.module, report.first_difference.error) == ("layers.0.mlp", math.inf)
    json.dumps(report.to_json(), allow_nan=False)


def test_an_interrupt_ends_all_ranks_quietly(tmp_path: Path) -> None:
    job = [
        "quickstart",
        "--layout.tensor",
        "2",
        "--training.batch",
        "64",
        "--training.accumulation",
        "16",
    ]  # half a minute of work in little memory, if nobody interrupts
    command = [sys.executable, "-m", "meshwright", "verify", *job]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True, cwd=tmp_path
    )
    ranks_and_their_servers = 5
    for _ in range(600):
        if len(_members(process.pid)) >= ranks_and_their_servers:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert any(_is_gone(process.pid) for _ in range(100)), "somebody of the group is left"


def _members(group: int) -> list[int]:
    """The processes of a group."""
    members = []
    for entry in Path("/proc").iterdir():
        with suppress(ProcessLookupError, ValueError):
            if os.getpgid(int(entry.name)) == group:
                members.append(int(entry.name))
    return members


def _is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    time.sleep(0.1)
    return False

"""Which attention kernel a job gets, and what is said where it cannot have the one it asks for."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import get_args

import pytest

from meshwright.config.attention import FLASH_HEAD_DIMS, Attention, AttentionCall, chosen_attention
from meshwright.config.files import load_job
from meshwright.config.legality import require_legal
from meshwright.config.tree import Cluster, Layout, Model, Training
from meshwright.errors import UserError

CPU = AttentionCall("cpu", half=False, head_dim=64)
CUDA = AttentionCall("cuda", half=True, head_dim=64)
FLOAT32 = replace(CUDA, half=False)


@pytest.mark.parametrize(
    ("call", "kernels"),
    [
        (CPU, ["naive", "sdpa_cpu", "flash", "flex", "sdpa_cpu"]),
        (replace(CPU, half=True), ["naive", "sdpa_cpu", "flash", "flex", "sdpa_cpu"]),
        (CUDA, ["naive", "sdpa_flash", "flash", "flex", "flash"]),
        (FLOAT32, ["naive", "sdpa_efficient", "flash", "flex", "sdpa_efficient"]),
        (replace(CUDA, head_dim=80), ["naive", "sdpa_flash", "flash", "flex", "sdpa_flash"]),
    ],
    ids=str,
)
def test_the_kernel(call: AttentionCall, kernels: list[str]) -> None:
    assert [call.choose(asked).kernel for asked in get_args(Attention)] == kernels


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (CPU, "sdpa_cpu: torch's kernel is the only fused one on a CPU"),
        (CUDA, "flash: 16 bits and head_dim 64 on CUDA"),
        (FLOAT32, "sdpa_efficient: flash is tuned for 16 bits, and this is float32"),
        (replace(CUDA, head_dim=80), "sdpa_flash: flash takes head_dim 16, 32, 64, 128 or 256, not 80"),
    ],
    ids=str,
)
def test_auto_says_why(call: AttentionCall, line: str) -> None:
    assert str(call.choose("auto")) == line
    assert not call.refusals("auto")


REFUSALS: dict[str, tuple[AttentionCall, Attention, list[str]]] = {
    "flash, head_dim": (
        replace(CUDA, head_dim=80),
        "flash",
        [
            "model.head_dim = 80 with training.attention = flash is not 16, 32, 64, 128 or 256 (no other is taken by "
            "our kernel): use training.attention naive, sdpa, flex or auto"
        ],
    ),
    "flex, cpu": (
        CPU,
        "flex",
        [
            "training.attention = flex has no backward on a CPU (torch compiles it for GPUs only): use "
            "training.attention naive, sdpa or auto"
        ],
    ),
    "flex, cpu, head_dim": (
        replace(CPU, head_dim=8),
        "flex",
        [
            "training.attention = flex has no backward on a CPU (torch compiles it for GPUs only): use "
            "training.attention naive, sdpa or auto",
            "model.head_dim = 8 with training.attention = flex is not 16 or more (no other is taken by torch's "
            "FlexAttention): use training.attention naive, sdpa or auto",
        ],
    ),
    "sdpa, bf16, head_dim": (
        replace(CUDA, head_dim=100),
        "sdpa",
        [
            "model.head_dim = 100 with training.attention = sdpa is not a multiple of 8 up to 256 (no other is taken "
            "by torch's kernel for 16 bits on CUDA): use training.attention naive or flex"
        ],
    ),
    "sdpa, float32, head_dim": (
        replace(FLOAT32, head_dim=18),
        "sdpa",
        [
            "model.head_dim = 18 with training.attention = sdpa is not a multiple of 4 (no other is taken by torch's "
            "kernel for float32 on CUDA): use training.attention naive or flex"
        ],
    ),
    "auto, head_dim": (
        replace(CUDA, head_dim=12),
        "auto",
        [
            "model.head_dim = 12 with training.attention = auto is not a multiple of 8 up to 256 (no other is taken "
            "by torch's kernel for 16 bits on CUDA): use training.attention naive"
        ],
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    call, asked, lines = REFUSALS[case]
    assert [message for _, message in call.refusals(asked)] == lines


def test_what_is_advised_is_legal_and_runs_and_what_is_not_advised_is_not() -> None:
    heads = (4, 6, 8, 16, 20, 64, 96, 128, 256, 320)
    for call in itertools.starmap(
        AttentionCall, itertools.product(("cpu", "cuda"), (False, True), heads, (False, True))
    ):
        at = replace(call, device_kind="cpu") if call.separate else call
        legal = [asked for asked in get_args(Attention) if not at.refusals(asked)]
        runs = [asked for asked in legal if at.device_kind != "cpu" or asked != "flash"]
        assert runs == ["sdpa", "auto"] if call.separate else "naive" in runs
        elsewhere = " with training.device cpu" if at != call else ""
        for asked in get_args(Attention):
            for rule, message in call.refusals(asked):
                advice = message.rpartition(": use ")[2]
                if rule == "documents_device":
                    assert advice == "training.documents joined, or training.device cpu"
                    continue
                words, _, instead = advice.removeprefix("training.attention ").partition(", or ")
                assert instead == ("training.documents joined" if rule == "attention_documents" else "")
                assert words.endswith(elsewhere)
                assert words.removesuffix(elsewhere).replace(" or ", ", ").split(", ") == runs


def rules(training: Training, head_dim: int = 64) -> list[str]:
    model = Model(head_dim=head_dim)
    return [violation.rule for violation in Layout().violations(model, Cluster(), training)]


def test_violations_of_a_device_that_is_open_are_those_of_every_device() -> None:
    assert rules(Training(attention="flash"), 80) == ["attention_head_dim"]
    assert rules(Training(attention="sdpa", precision="bf16"), 100) == []
    assert rules(Training(attention="sdpa", precision="bf16", device="cuda"), 100) == ["attention_head_dim"]
    assert rules(Training(attention="flex")) == []
    assert rules(Training(attention="flex", device="cpu")) == ["attention_device"]
    assert rules(Training(documents="separate")) == []
    assert rules(Training(documents="separate", attention="naive")) == ["attention_documents"]


def test_only_one_kernel_has_the_mask_of_documents() -> None:
    job = load_job("quickstart")
    for asked in get_args(Attention):
        separate = replace(job.training, documents="separate", attention=asked, device="cpu")
        found = job.layout.violations(job.model, job.cluster, separate)
        assert ("attention_documents" in [v.rule for v in found]) == (asked not in ("sdpa", "auto"))
        on_gpu = replace(separate, device="cuda")
        assert "documents_device" in [v.rule for v in job.layout.violations(job.model, job.cluster, on_gpu)]
    separate = replace(job.training, documents="separate", attention="naive", device="cpu")
    with pytest.raises(UserError) as refused:
        require_legal(replace(job, training=separate))
    assert str(refused.value) == (
        "training.documents = separate with training.attention = naive has no mask (only sdpa's kernel takes that of "
        "documents): use training.attention sdpa or auto, or training.documents joined"
    )


def test_catalog_models_have_a_fused_kernel_everywhere() -> None:
    for head_dim in {64, 80, 96, 128, *FLASH_HEAD_DIMS}:
        for device, precision in itertools.product(("cpu", "cuda"), ("float32", "bf16")):
            training = Training(attention="auto", device=device, precision=precision)  # type: ignore[arg-type]
            assert chosen_attention(Model(head_dim=head_dim), training).kernel != "naive"
            assert not AttentionCall.of(Model(head_dim=head_dim), training).refusals("auto")

"""Plans of known models against figures worked out by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from meshwright.config.files import load_job
from meshwright.config.legality import divisors
from meshwright.config.tree import Job, Layout
from meshwright.errors import UserError
from meshwright.planner.search import Candidate, candidates, plan, price
from meshwright.planner.step import formula
from meshwright.training.device import resolve_device
from meshwright.units import format_bytes

E, LAYERS = 4096, 32  # llama3-8b


def job(name: str, **fields: object) -> Job:
    return resolve_device(load_job(name, [(k.replace("__", "."), str(v)) for k, v in fields.items()]), planning=True)


def test_tensor_parallel_traffic_of_llama3_8b() -> None:
    """One micro-batch of a replica: 1024 / (8 · 16) = 8 sequences of 8192: N = 65,536 tokens.

    A block sends N·E in bf16 twice forward (attention, mlp) and twice backward: 2·65,536·4,096 = 536,870,912 B a call.
    """
    layout = job("llama3-8b", layout__replicate=8, layout__tensor=8, layout__overlap="none", training__accumulation=16)
    rows = price(layout).account.ledger.rows
    payload = 2 * 65_536 * E
    assert payload == 536_870_912
    calls: Counter[str] = Counter()
    for key, count in rows.items():
        if key.axis == "tensor" and key.site.startswith("layers."):
            assert (key.operation, key.group_size, key.dtype, key.payload_bytes) == (
                "all_reduce",
                8,
                "bfloat16",
                payload,
            )
            assert count == 16  # micro-batches
            assert key.wire_bytes == 2 * 7 * payload // 8
            calls[key.phase] += 1
    assert calls == {"forward": 2 * LAYERS, "backward": 2 * LAYERS}


def test_replicated_gradients_of_llama3_8b() -> None:
    """8,030,261,248 parameters; on a tensor rank of 8 an eighth of them, but norms (65 of 4,096) whole.

    Summed once a step in float32: 4 · ((8,030,261,248 - 266,240) / 8 + 266,240) B.
    """
    rows = price(job("llama3-8b", layout__replicate=8, layout__tensor=8)).account.ledger.rows
    sent = sum(n * key.payload_bytes for key, n in rows.items() if key.axis == "replicate" and key.phase == "backward")
    norms = 65 * E
    assert sent == 4 * ((8_030_261_248 - norms) // 8 + norms)


def test_ffn_blocks() -> None:
    """xxl-ffn: two weights of 16,384 × 53,248 a block, 126 blocks; tensor 8: one all-reduce each way a block."""
    found = price(job("xxl-ffn", layout__tensor=8, layout__overlap="none", training__batch=8)).account
    parameters = 126 * 2 * 16_384 * 53_248
    assert parameters == 219_848_638_464
    assert found.status == "formula"
    assert found.footprint.bytes["parameters"] == 4 * parameters // 8
    tokens = 8 * 8192
    assert {(k.phase, k.payload_bytes): n for k, n in found.ledger.rows.items() if k.site == "layers.7.mlp"} == {
        ("forward", 2 * tokens * 16_384): 1,
        ("backward", 2 * tokens * 16_384): 1,
    }
    # Two products a block forward, and twice that backward.
    assert found.work.flops(phase="forward") == 2 * tokens * parameters // 8
    assert found.work.flops(phase="backward") == 2 * found.work.flops(phase="forward")


def test_ffn_blocks_free_what_they_allocate() -> None:
    """At the end of a step only parameters, gradients and optimiser states live."""
    account = price(job("xxl-ffn", layout__tensor=8, training__accumulation=2)).account
    left: Counter[str] = Counter()
    for event in account.trace.expanded():
        if hasattr(event, "delta_bytes"):
            left[event.category] += event.delta_bytes
    assert {category for category, nbytes in left.items() if nbytes} == {"parameters", "gradients", "optimiser_states"}


def test_own_layout_without_devices() -> None:
    found = plan(job("quickstart", layout__replicate=2, layout__tensor=2, layout__overlap="none"))
    assert [c.job.layout for c in found.layouts] == [Layout(replicate=2, tensor=2, overlap="none")]
    assert not found.rejected


def test_all_layouts_of_the_devices() -> None:
    found = plan(job("llama3-8b"), 64)
    degrees = {(c.job.layout.replicate, c.job.layout.tensor) for c in found.layouts}
    assert degrees == {(64, 1), (32, 2), (16, 4), (8, 8), (4, 16), (2, 32)}
    assert [(r.rule, r.count) for r in found.rejected] == [("heads", 1)]
    assert found.rejected[0].example.startswith("layout.tensor = 64 does not divide model.heads = 32")
    assert found.rejected[0].fix == "use 4, 8, 16 or 32"
    assert found.notes == ("64 devices need 8 hosts and cluster h100x8 has 1: hosts are added",)


def test_typed_degrees_stay() -> None:
    assert {c.job.layout.tensor for c in plan(job("llama3-8b", layout__tensor=4), 64, {"tensor"}).layouts} == {4}


def test_a_stage_of_zero_lets_ranks_of_the_batch_shard() -> None:
    found = plan(job("llama3-8b", layout__zero=3), 64)
    degrees = {(c.job.layout.shard, c.job.layout.tensor, c.job.layout.replicate) for c in found.layouts}
    assert degrees == {(64, 1, 1), (32, 2, 1), (16, 4, 1), (8, 8, 1), (4, 16, 1), (2, 32, 1)}
    assert all(c.to_json()["zero"] == 3 for c in found.layouts)
    replicated = plan(job("llama3-8b"), 64)
    assert max(c.account.footprint.bytes["optimiser_states"] for c in found.layouts) < min(
        c.account.footprint.bytes["optimiser_states"] for c in replicated.layouts if c.job.layout.tensor < 32
    )


def test_top_keeps_the_best() -> None:
    every = plan(job("llama3-8b"), 64).layouts
    assert plan(job("llama3-8b"), 64, top=2).layouts == every[:2]


def test_those_that_fit_come_first_by_time_then_the_others_by_missing_bytes() -> None:
    small = {"training__batch": 64, "training__accumulation": 2, "training__seq_len": 2048}
    layouts = plan(job("llama3-8b", **small), 16).layouts
    fitting = [c for c in layouts if c.fits]
    others = layouts[len(fitting) :]
    assert fitting
    assert others
    assert not any(c.fits for c in others)
    assert [c.step_seconds for c in fitting] == sorted(_seconds(c) for c in fitting)
    assert [c.missing_bytes for c in others] == sorted(c.missing_bytes or 0 for c in others)


def _seconds(candidate: Candidate) -> float:
    assert candidate.step_seconds is not None
    return candidate.step_seconds


def test_missing_bytes_are_the_peak_above_the_memory() -> None:
    candidate = price(job("gpt3-175b"))
    assert candidate.missing_bytes == candidate.account.footprint.peak - 80_000_000_000 > 0
    assert candidate.fits is False
    assert "74.5 GiB of h100" in candidate.why


def test_unknown_memory_neither_fits_nor_does_not() -> None:
    candidate = price(job("quickstart", cluster__device__memory_bytes=0))
    assert (candidate.fits, candidate.missing_bytes) == (None, None)


def test_unknown_peak_gives_no_time_and_no_mfu() -> None:
    candidate = price(job("quickstart", training__precision="bf16"))
    assert (candidate.step_seconds, candidate.mfu) == (None, None)
    assert candidate.why == "no time, as the bf16 peak of cpu is not known"


def test_why_names_what_the_step_waits_for() -> None:
    assert "tensor traffic between hosts" in price(job("llama3-8b", layout__tensor=16)).why
    assert "compute" in price(job("quickstart")).why


def test_json_of_a_layout() -> None:
    row = plan(job("quickstart", layout__tensor=2)).to_json()["layouts"][0]
    assert row["layout"] == {"pipeline": 1, "replicate": 1, "shard": 1, "ring": 1, "ulysses": 1, "tensor": 2}
    assert row["memory_bytes"] == row["footprint"]["peak"]
    assert row["zero"] == 0
    assert set(row["exposed_seconds"]) == {"tensor"}
    assert {"fits", "step_seconds", "mfu", "ledger", "why", "time_model", "status"} <= row.keys()


def test_no_legal_layout_is_bad_input() -> None:
    with pytest.raises(UserError) as error:
        plan(job("quickstart"), 7)
    assert all(line.startswith("no legal layout of 7 devices: ") for line in str(error.value).splitlines())
    assert "training.batch = 16 is not divisible by layout.replicate = 7" in str(error.value)


def test_given_degrees_must_divide_the_devices() -> None:
    with pytest.raises(
        UserError, match=r"--devices 64 is not divisible by the given degrees, tensor 3 = 3: use --devices 63 or 66"
    ):
        list(candidates(Layout(tensor=3), 64, {"tensor"}))
    with pytest.raises(
        UserError, match=r"--devices 64 is not the product of the given degrees, replicate 2 × tensor 2 = 4"
    ):
        list(candidates(Layout(tensor=2, replicate=2), 64, {"tensor", "replicate"}))


def test_divisors() -> None:
    assert divisors(1) == [1]
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]


def test_selective_recomputation_says_that_it_saves_little() -> None:
    job = load_job("llama3-8b", [("layout.tensor", "8"), ("layout.recompute", "selective"), ("training.batch", "1")])
    (note,) = plan(resolve_device(job, planning=True)).notes
    kept = 32 * (8192 * 4 * 4 + 24)  # layers · (tokens · heads of a rank · float32 + random state)
    assert f"saves {format_bytes(kept)}" in note
    assert "keeps no scores" in note


def test_a_plan_prices_the_rank_of_a_ring_that_no_other_exceeds() -> None:
    for order in ("contiguous", "zigzag"):
        for ring in (2, 3, 4):
            overrides = [("layout.ring", str(ring)), ("layout.ring_order", order), ("training.seq_len", "192")]
            overrides += [("model.vocab_size", "64"), ("training.batch", "1"), ("training.device", "cpu")]
            job = load_job("quickstart", overrides)
            (priced,) = plan(job).layouts
            every = [formula(job, rank) for rank in range(ring)]
            assert priced.account.footprint.peak == max(account.footprint.peak for account in every)
            assert priced.account.work.flops() == max(account.work.flops() for account in every)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("ring", [2, 3, 7])
def test_a_plan_prices_what_no_rank_exceeds_where_states_are_sharded(ring: int, zero: int, order: str) -> None:
    """The last rank of a contiguous ring works most and holds the shortest part of the states.

    With zero 1, ranks differ besides by a step counter or two: how a rank's parts of buckets are cut into parameters.
    """
    overrides = {"layout.ring": ring, "layout.zero": zero, "layout.ring_order": order, "training.seq_len": 28 * ring}
    overrides |= {"model.vocab_size": 257, "model.layers": 2, "training.batch": 1, "training.device": "cpu"}
    job = load_job("quickstart", [(path, str(value)) for path, value in overrides.items()])
    (priced,) = plan(job).layouts
    every = [formula(job, rank) for rank in range(ring)]
    fullest, counters = max(account.footprint.peak for account in every), 8 if zero == 1 else 0
    assert fullest - counters <= priced.account.footprint.peak <= fullest
    assert priced.account.work.flops() == max(account.work.flops() for account in every)

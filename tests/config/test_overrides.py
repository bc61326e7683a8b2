"""Fields set from the command line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.config.files import load_cluster, load_job
from meshwright.config.overrides import apply_overrides, fields
from meshwright.config.tree import Job
from meshwright.errors import UserError


def refusal(*overrides):
    with pytest.raises(UserError) as caught:
        load_job("quickstart", overrides)
    return str(caught.value)


@given(st.integers(1, 10**6), st.booleans(), st.floats(1e-9, 1e3), st.text())
def test_typed_values(degree, flag, rate, text):
    job = apply_overrides(
        Job(),
        [
            ("layout.tensor", str(degree)),
            ("training.compile", str(flag).lower()),
            ("training.learning_rate", repr(rate)),
            ("training.data", text),
        ],
    )
    assert job.layout.tensor == degree
    assert job.training.compile is flag
    assert job.training.learning_rate == rate
    assert job.training.data == text


def test_dashes_underscores_and_the_last_one_wins():
    job = apply_overrides(
        Job(), [("--training.seq-len", "64"), ("training.seq_len", "32"), ("model.mlp", "gated-silu")]
    )
    assert job.training.seq_len == 32
    assert job.model.mlp == "gated_silu"


def test_whole_numbers_in_exponent_form():
    assert apply_overrides(Job(), [("cluster.device.memory_bytes", "80e9")]).cluster.device.memory_bytes == 80 * 10**9


def test_a_cluster_by_name_goes_before_its_fields():
    job = load_job("quickstart", [("cluster.hosts", "8"), ("cluster", "h100x8"), ("cluster.device", "a100-80gb")])
    assert (job.cluster.hosts, job.cluster.device.name) == (8, "a100-80gb")
    assert job.cluster.intra == load_cluster("h100x8").intra


def test_peaks_by_precision():
    job = load_job("quickstart", [("cluster.device.peak_flops.bf16", "1e12")])
    assert job.cluster.device.peak_flops == {"float32": 50e9, "bf16": 1e12}


def test_all_mistakes_at_once():
    assert refusal(
        ("tensor", "2"),
        ("layout", "2"),
        ("colour", "blue"),
        ("layout.tp", "2"),
        ("layout.tensr", "2"),
        ("layout.tensor", "2.5"),
        ("layout.shard", ""),
        ("training.compile", "yes"),
        ("training.learning_rate", "inf"),
        ("training.precision", "fp16"),
        ("cluster", "h100"),
        ("cluster.device.peak_flops", "3"),
    ).splitlines() == [
        "tensor is not a field: did you mean layout.tensor?",
        "layout is a section, not a field: set layout.replicate, layout.shard, layout.ring, layout.ulysses, "
        "layout.tensor, layout.pipeline, layout.gradients, layout.bucket_mib, layout.zero, "
        "layout.prefetch, layout.sequence_parallel, layout.recompute, layout.ring_order, "
        "layout.overlap, layout.overlap_chunks, layout.overlap_ring, layout.hierarchical, layout.half_batches",
        "colour is not a field: use one of name, model, layout, cluster, training",
        "h100 is neither a file nor in the catalog's clusters: did you mean h100x8?",
        "layout.tp is not a field: use one of layout.replicate, layout.shard, layout.ring, layout.ulysses, "
        "layout.tensor, layout.pipeline, layout.gradients, layout.bucket_mib, layout.zero, "
        "layout.prefetch, layout.sequence_parallel, layout.recompute, layout.ring_order, "
        "layout.overlap, layout.overlap_chunks, layout.overlap_ring, layout.hierarchical, layout.half_batches",
        "layout.tensr is not a field: did you mean layout.tensor?",
        'layout.tensor = "2.5" is not a whole number',
        'layout.shard = "" is not a whole number',
        'training.compile = "yes" is not true or false',
        'training.learning_rate = "inf" is not a number',
        'training.precision = "fp16" is not one of float32, bf16',
        "cluster.device.peak_flops is a table: set one of its entries, such as cluster.device.peak_flops.bf16",
    ]


def test_ranges_hold_for_overrides():
    assert refusal(("layout.tensor", "0")) == "layout.tensor = 0 must be between 1 and 2**31 - 1"


def test_every_field_can_be_set_and_has_help():
    settings = {setting.path: setting for setting in fields()}
    assert settings["layout.tensor"].help == "Ranks that split each weight (Megatron tensor parallelism)."
    assert (settings["training.batch"].kind, settings["training.batch"].default) == (int, 16)
    assert {"name", "cluster", "cluster.device", "cluster.intra.bandwidth", "model.norm_eps"} <= set(settings)
    assert all(setting.help for setting in settings.values())

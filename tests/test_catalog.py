"""The catalog: every entry loads, is legal, and holds the published figures."""

import subprocess
import sys
from dataclasses import replace

import pytest

from meshwright import catalog
from meshwright.config.files import load_cluster, load_device, load_job
from meshwright.config.legality import require_legal
from meshwright.config.tree import Layout, RopeScaling

LADDER = {  # d_model, d_ff, layers, heads
    "small": (768, 3072, 12, 12),
    "medium": (1024, 4096, 24, 16),
    "large": (1280, 5120, 36, 20),
    "xl": (1600, 6400, 48, 25),
    "2.7b": (2560, 10240, 32, 32),
}

PUBLISHED_PARAMETERS = {  # as their papers or model cards count them
    "gpt3-175b": 174.6e9,
    "llama2-7b": 6.738e9,
    "llama3-8b": 8.030e9,
    "llama3.1-8b": 8.030e9,
    "llama3-70b": 70.55e9,
    "llama3-405b": 405.85e9,
    "smollm-1.7b": 1.711e9,
}


def parameters(model, seq_len):
    """Parameters of a decoder, without biases and norms (less than 0.1 % of these models)."""
    attention = model.d_model * model.head_dim * 2 * (model.heads + model.kv_heads)
    mlp = model.d_model * model.d_ff * (3 if model.mlp == "gated_silu" else 2)
    tables = model.vocab_size * (1 if model.tied else 2) + (seq_len if model.positions == "learned" else 0)
    return model.layers * (attention + mlp) + tables * model.d_model


def test_contents():
    assert set(catalog.names("models")) == {*LADDER, *PUBLISHED_PARAMETERS, "quickstart", "xxl-ffn"}
    assert {"a100x64", "a100x8", "b200x8", "h100x64", "h100x8", "h200x8", "laptop", "v5p-64"} == set(
        catalog.names("clusters")
    )


@pytest.mark.parametrize("name", catalog.names("models"))
def test_models_are_legal_on_one_device(name):
    job = load_job(name)
    require_legal(job)
    assert (job.name, job.model.name, job.layout) == (name, name, Layout())


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_published_sizes(name):
    job = load_job(name)
    assert parameters(job.model, job.training.seq_len) == pytest.approx(PUBLISHED_PARAMETERS[name], rel=2e-3)
    batch = 32 if name == "llama3.1-8b" else 1024
    assert (job.training.batch, job.training.precision, job.cluster.name) == (batch, "bf16", "h100x8")


def test_llama_3_1_is_llama_3_with_scaled_frequencies():
    older, newer = load_job("llama3-8b"), load_job("llama3.1-8b")
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192)
    assert newer.model == replace(older.model, name="llama3.1-8b", rope_scaling=scaling)
    assert (newer.training.seq_len, newer.training.batch) == (128 * 1024, 32)
    scaled = [name for name in catalog.names("models") if load_job(name).model.rope_scaling != RopeScaling()]
    assert scaled == ["llama3.1-8b"]


@pytest.mark.parametrize("name", LADDER)
def test_ladder(name):
    job = load_job(name)
    model = job.model
    assert (model.d_model, model.d_ff, model.layers, model.heads) == LADDER[name]
    assert model.heads * model.head_dim == model.d_model
    assert (model.kv_heads, model.vocab_size) == (model.heads, 10_000)
    assert (job.training.batch, job.training.seq_len, job.cluster.name) == (4, 512, "laptop")


def test_every_figure_has_a_source():
    for name in catalog.names("devices"):
        device = load_device(name)
        assert device.name == name
        assert device.source
        assert device.memory_bytes > 0
        assert device.memory_bandwidth > 0
        assert device.peak_flops
    for name in catalog.names("clusters"):
        assert load_cluster(name).source


def test_bandwidth_is_one_way():
    h100 = load_cluster("h100x64")
    assert (h100.devices, h100.intra.bandwidth, h100.inter.bandwidth) == (64, 450e9, 50e9)
    v5p = load_cluster("v5p-64")
    assert (v5p.devices, v5p.intra.links, v5p.intra.bandwidth, v5p.intra) == (64, 6, 90e9, v5p.inter)


def test_config_imports_no_torch():
    code = "import sys, meshwright.config.files, meshwright.bench.record; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

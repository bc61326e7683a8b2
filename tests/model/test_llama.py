"""The same weights in transformers' Llama give the same logits."""

from dataclasses import replace

import pytest
import torch
from jobs import tiny_job
from reference import plain_decoder

from meshwright.comm.mesh import World
from meshwright.config.tree import Layout, Model, RopeScaling
from meshwright.model.build import build

transformers = pytest.importorskip("transformers")

TINY = Model(layers=3, d_model=32, d_ff=56, heads=4, kv_heads=2, head_dim=8, vocab_size=53, rope_theta=1000.0)

OURS_TO_THEIRS = {
    "embedding": "model.embed_tokens",
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}


def their_name(name):
    module = name.removesuffix(".weight")
    if module.startswith("layers."):
        _, index, inner = module.split(".", 2)
        return f"model.layers.{index}.{OURS_TO_THEIRS[inner]}.weight"
    return f"{OURS_TO_THEIRS[module]}.weight"


def rope_parameters(model):
    """Their names for the kinds of rotary embedding."""
    scaling = model.rope_scaling
    if scaling.factor == 1:
        return {"rope_type": "default", "rope_theta": model.rope_theta}
    return {
        "rope_type": "llama3",
        "rope_theta": model.rope_theta,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_positions,
    }


def llama(model, seq_len):
    """transformers' Llama of the same dimensions, in float64."""
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.d_ff,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        rms_norm_eps=model.norm_eps,
        rope_theta=model.rope_theta,
        rope_parameters=rope_parameters(model),
        max_position_embeddings=seq_len,
        tie_word_embeddings=model.tied,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config).double().eval()


def twins(job):
    """Our decoder and their Llama with the same random weights, and tokens for both."""
    model = job.model
    decoder = build(job, World.create(Layout(), torch.device("cpu")), float64=True)
    theirs = llama(model, job.training.seq_len)
    generator = torch.Generator().manual_seed(0)
    weights = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * values if "norm" in name else 0.2 * values)
            weights.pop(their_name(name)).copy_(parameter)
    assert not weights, f"not set: {list(weights)}"
    return decoder, theirs, torch.randint(model.vocab_size, (2, job.training.seq_len), generator=generator)


def error(found, expected):
    """Relative to the largest logit, in roundings of float32, in which Llama computes angles and norms in any dtype."""
    return ((found - expected).abs().max() / expected.abs().max() / torch.finfo(torch.float32).eps).item()


@pytest.mark.parametrize("tied", [False, True])
def test_same_logits(tied):
    job = tiny_job(replace(TINY, tied=tied))
    decoder, theirs, tokens = twins(job)
    with torch.no_grad():
        logits, expected = decoder.logits(tokens, torch.arange(job.training.seq_len)), theirs(tokens).logits
    assert error(logits, expected) <= 16


def test_same_logits_with_scaled_frequencies_far_beyond_the_original_positions():
    """64 positions, originally 16; of a head's four pairs one keeps its frequency, one is between, two are divided."""
    model = replace(
        TINY, rope_scaling=RopeScaling(4.0, low_freq_factor=0.25, high_freq_factor=2.0, original_positions=16)
    )
    job = tiny_job(model, seq_len=64)
    decoder, theirs, tokens = twins(job)
    weights = dict(decoder.named_parameters())
    kinds = plain_decoder.Kinds(*(getattr(model, name) for name in plain_decoder.Kinds._fields))
    with torch.no_grad():
        logits, expected = decoder.logits(tokens, torch.arange(64)), theirs(tokens).logits
        exact = plain_decoder.logits(weights, kinds, tokens)
        unscaled = plain_decoder.logits(weights, kinds._replace(rope_scaling=RopeScaling()), tokens)
    assert error(logits, expected) <= 16
    assert (logits - exact).abs().max() <= 1e-10 * exact.abs().max()
    assert error(unscaled, exact) > 1e5

"""The same weights in transformers' Llama give the same logits."""

import pytest
import torch
from jobs import tiny_job

from meshwright.comm.mesh import World
from meshwright.config.tree import Layout, Model
from meshwright.model.build import build

transformers = pytest.importorskip("transformers")

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
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        max_position_embeddings=seq_len,
        tie_word_embeddings=model.tied,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("tied", [False, True])
def test_same_logits(tied):
    model = Model(
        layers=3, d_model=32, d_ff=56, heads=4, kv_heads=2, head_dim=8, vocab_size=53, rope_theta=1000.0, tied=tied
    )
    job = tiny_job(model)
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

    tokens = torch.randint(model.vocab_size, (2, job.training.seq_len), generator=generator)
    positions = torch.arange(job.training.seq_len)
    with torch.no_grad():
        logits, expected = decoder.logits(tokens, positions), theirs(tokens).logits
    # Llama computes angles and norms in float32, whatever the dtype of the model: its logits have float32's precision.
    assert (logits - expected).abs().max() <= 16 * torch.finfo(torch.float32).eps * expected.abs().max()

"""Our decoder at degree 1 against the plain one: logits, loss and every gradient, in float64, for every kind."""

import itertools
from dataclasses import replace

import pytest
import torch
from jobs import MODELS, tiny_job
from reference import plain_decoder

from meshwright.comm.mesh import World
from meshwright.config.tree import Layout, Model
from meshwright.model.build import build, specs_of
from meshwright.parallel.loss import IGNORE

TOLERANCE = 1e-10
"""Relative to the largest element: a few hundred float64 roundings through the layers, with room."""

BASE = Model(layers=2, d_model=24, d_ff=40, heads=4, kv_heads=2, head_dim=8, vocab_size=37)

KINDS = {
    "norm": ("rmsnorm", "layernorm"),
    "positions": ("rope", "learned"),
    "mlp": ("gated_silu", "gelu"),
    "bias": (False, True),
    "tied": (False, True),
}

MATRIX = [
    *(replace(BASE, **dict(zip(KINDS, kinds, strict=True))) for kinds in itertools.product(*KINDS.values())),
    replace(BASE, kv_heads=4, rope_theta=500.0),
    replace(BASE, kv_heads=1, norm_eps=0.1),
    *MODELS.values(),
]


def randomised(job):
    """The decoder in float64 with every value random: initial norm weights and biases would hide mistakes."""
    model = build(job, World.create(Layout(), torch.device("cpu")), float64=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    return model


def batch(job):
    """Tokens and labels [B, S]; every fifth position is not trained on."""
    generator = torch.Generator().manual_seed(2)
    shape = (2, job.training.seq_len)
    tokens, labels = (torch.randint(job.model.vocab_size, shape, generator=generator) for _ in range(2))
    labels.view(-1)[::5] = IGNORE
    return tokens, labels


def kinds_of(model):
    return plain_decoder.Kinds(*(getattr(model, name) for name in plain_decoder.Kinds._fields))


def assert_close(ours, plain, what):
    error = (ours - plain).abs().max() / plain.abs().max().clamp_min(1e-3)
    assert error <= TOLERANCE, f"{what}: {error:.1e}"


def name_of(model):
    kinds = (model.norm, model.positions, model.mlp, "bias" * model.bias, "tied" * model.tied)
    return f"{'-'.join(filter(None, kinds))}-{model.heads}.{model.kv_heads}"


@pytest.mark.parametrize("model", MATRIX, ids=name_of)
def test_equals_the_plain_decoder(model):
    job = tiny_job(model, seq_len=12)
    decoder = randomised(job)
    tokens, labels = batch(job)
    weights = {name: p.detach().clone().requires_grad_() for name, p in decoder.named_parameters()}
    assert weights.keys() == {spec.name for spec in specs_of(job)}

    expected = plain_decoder.logits(weights, kinds_of(model), tokens)
    plain_decoder.loss(expected, labels).backward()
    logits = decoder.logits(tokens, torch.arange(tokens.shape[1]))
    loss = decoder(tokens, labels, torch.arange(tokens.shape[1]))
    loss.backward()

    assert_close(logits, expected, "logits")
    assert_close(loss, plain_decoder.loss(expected, labels), "loss")
    for name, parameter in decoder.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        assert_close(parameter.grad, weights[name].grad, name)


def test_the_oracle_can_fail():
    """The same comparison sees a norm weight that is off by 1e-8."""
    job = tiny_job(BASE)
    decoder = randomised(job)
    tokens, _ = batch(job)
    weights = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    weights["layers.1.mlp_norm.weight"][3] += 1e-8
    with pytest.raises(AssertionError, match="logits"):
        assert_close(
            decoder.logits(tokens, torch.arange(tokens.shape[1])),
            plain_decoder.logits(weights, kinds_of(BASE), tokens),
            "logits",
        )


def test_positions_are_the_ones_given():
    """Rotary embedding sees only distances; a learned table sees the positions themselves."""
    tokens = torch.arange(6)[None]
    near, far = torch.arange(6), torch.arange(6) + 4
    for positions, same in (("rope", True), ("learned", False)):
        decoder = randomised(tiny_job(replace(BASE, positions=positions), seq_len=12))
        equal = torch.allclose(decoder.logits(tokens, near), decoder.logits(tokens, far), rtol=0, atol=1e-11)
        assert equal == same

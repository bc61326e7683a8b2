"""A decoder with separate documents: each is computed as if it stood alone, wherever it stands.

RoPE is relative, so a document that begins later has the same logits; learned positions go on counting.
"""

from dataclasses import replace

import pytest
import torch
from jobs import tiny_job

from meshwright.comm.mesh import World
from meshwright.config.tree import Layout, Model
from meshwright.model.build import build
from meshwright.parallel.loss import IGNORE

ROPE = Model(layers=2, d_model=24, d_ff=40, heads=4, kv_heads=2, head_dim=8, vocab_size=37)
LEARNED = replace(ROPE, positions="learned", norm="layernorm", mlp="gelu", bias=True)

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}
"""Relative to the largest element: a few hundred roundings, with room."""

A, B, C = 5, 7, 1
ORDERS = [(A, B), (B, A), (A, B, C), (C, B, A), (C, A, B)]


def decoder_of(model, dtype=torch.float64, recompute="none", loss_chunk=0):
    """Of random values."""
    job = tiny_job(model, Layout(recompute=recompute), seq_len=A + B + C, documents="separate", loss_chunk=loss_chunk)
    decoder = build(job, World.single(torch.device("cpu")), float64=dtype == torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise + float("norm" in name and name.endswith("weight")))
    return decoder


def tokens_of(length):
    """[2, length]: a document is known by its length."""
    return torch.randint(ROPE.vocab_size, (2, length), generator=torch.Generator().manual_seed(length))


def packed(lengths):
    """Tokens and the beginnings of documents, [2, S]; and where each document lies."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    first = torch.cat([torch.full((2, n), start) for n, start in zip(lengths, starts, strict=True)], 1)
    spans = {n: slice(start, start + n) for n, start in zip(lengths, starts, strict=True)}
    return torch.cat([tokens_of(n) for n in lengths], 1), first, spans


def logits_alone(decoder, length, positions=None):
    positions = torch.arange(length) if positions is None else positions
    return decoder.logits(tokens_of(length), positions, torch.zeros(2, length, dtype=torch.int64))


def distance(found, expected):
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("lengths", ORDERS, ids=str)
def test_logits_of_a_document_wherever_it_stands(lengths, dtype):
    decoder = decoder_of(ROPE, dtype)
    tokens, first, spans = packed(lengths)
    together = decoder.logits(tokens, torch.arange(sum(lengths)), first)
    assert together.dtype == dtype
    for length, span in spans.items():
        assert distance(together[:, span], logits_alone(decoder, length)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("lengths", ORDERS, ids=str)
def test_joined_documents_differ(lengths):
    """What the mask does: without it, all but the first document depend on what is before them."""
    decoder = decoder_of(ROPE)
    tokens, _, spans = packed(lengths)
    joined = decoder.logits(tokens, torch.arange(sum(lengths)))
    differs = [distance(joined[:, span], logits_alone(decoder, length)) > 1e-3 for length, span in spans.items()]
    assert differs == [False] + [True] * (len(lengths) - 1)


def test_learned_positions_go_on():
    decoder = decoder_of(LEARNED)
    tokens, first, spans = packed((A, B))
    second = decoder.logits(tokens, torch.arange(A + B), first)[:, spans[B]]
    assert distance(second, logits_alone(decoder, B, torch.arange(A, A + B))) <= TOLERANCES[torch.float64]
    assert distance(second, logits_alone(decoder, B)) > 1e-3


def test_rows_have_documents_of_their_own():
    decoder = decoder_of(ROPE)
    one, other = packed((A, B)), packed((B, A))
    tokens, first = (torch.stack([x[0], y[1]]) for x, y in zip(one[:2], other[:2], strict=True))
    found = decoder.logits(tokens, torch.arange(A + B), first)
    for row, spans in enumerate((one[2], other[2])):
        for length, span in spans.items():
            assert distance(found[row, span], logits_alone(decoder, length)[row]) <= TOLERANCES[torch.float64]


@pytest.mark.parametrize("loss_chunk", [0, 4])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_loss_and_gradients_are_sums_over_documents(recompute, loss_chunk):
    decoder = decoder_of(ROPE, recompute=recompute, loss_chunk=loss_chunk)
    tokens, first, spans = packed((A, B, C))
    labels = tokens.roll(-1, 1)
    for span in spans.values():
        labels[:, span.stop - 1] = IGNORE  # nothing of a document is learned from the one before
    together = decoder(tokens, labels, torch.arange(A + B + C), first)
    together.backward()
    found = {name: p.grad.clone() for name, p in decoder.named_parameters()}
    decoder.zero_grad()
    alone = torch.zeros((), dtype=torch.float64)
    for length, span in spans.items():
        loss = decoder(tokens[:, span], labels[:, span], torch.arange(length), first[:, span] * 0)
        loss.backward()
        alone += loss.detach()
    assert abs(together.item() - alone.item()) <= 1e-12 * alone.item()
    for name, parameter in decoder.named_parameters():
        assert distance(found[name], parameter.grad) <= 1e-11, name

"""The decoder again, in ordinary PyTorch and float64, from the papers: an oracle that shares no code with the project.

    B batch   S sequence   E d_model   H heads   K kv heads   D head_dim   V vocabulary

Everything is spelled out (the score matrix, the softmax, each norm), gradients are autograd's, and nothing is split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

Weights = Mapping[str, torch.Tensor]


class Scaling(NamedTuple):
    """Rotary frequencies for sequences longer than the original ones (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


class Kinds(NamedTuple):
    """What a decoder is made of."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm: str
    norm_eps: float
    positions: str
    rope_theta: float
    rope_scaling: Scaling
    mlp: str


def logits(weights: Weights, kinds: Kinds, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V] of full weights; a missing bias is none, a missing `head.weight` is the embedding's."""
    S = tokens_BS.shape[1]
    x = weights["embedding.weight"][tokens_BS]
    if kinds.positions == "learned":
        x = x + weights["positions.weight"][:S]
    for i in range(kinds.layers):
        block = f"layers.{i}"
        x = x + attention(weights, f"{block}.attention", kinds, norm(weights, f"{block}.attention_norm", kinds, x))
        x = x + mlp(weights, f"{block}.mlp", kinds, norm(weights, f"{block}.mlp_norm", kinds, x))
    h = norm(weights, "norm", kinds, x)
    return h @ weights.get("head.weight", weights["embedding.weight"]).T


def loss(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(label) over the positions whose label is not -100."""
    log_p = logits_BSV - torch.logsumexp(logits_BSV, dim=-1, keepdim=True)
    total = logits_BSV.new_zeros(())
    for b, s in (labels_BS != -100).nonzero().tolist():
        total = total - log_p[b, s, labels_BS[b, s]]
    return total


def linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def norm(weights: Weights, name: str, kinds: Kinds, x: torch.Tensor) -> torch.Tensor:
    if kinds.norm == "layernorm":
        x = x - x.mean(dim=-1, keepdim=True)
    h = x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + kinds.norm_eps) * weights[f"{name}.weight"]
    return h + weights[f"{name}.bias"] if f"{name}.bias" in weights else h


def scaled(frequency: float, scaling: Scaling) -> float:
    """Divided by the factor for long wavelengths, untouched for short ones, and between a mixture of both."""
    wavelength = 2 * math.pi / frequency
    long = scaling.original_positions / scaling.low_freq_factor
    short = scaling.original_positions / scaling.high_freq_factor
    if wavelength > long:
        return frequency / scaling.factor
    if wavelength < short:
        return frequency
    share = (1 / wavelength - 1 / long) / (1 / short - 1 / long)
    return share * frequency + (1 - share) * frequency / scaling.factor


def rotate(x_BSND: torch.Tensor, theta: float, scaling: Scaling) -> torch.Tensor:
    """Feature j and feature j + D/2 of a head are a complex number, turned by position · theta^(-2j/D), scaled."""
    _, S, _, D = x_BSND.shape
    frequencies = torch.tensor([scaled(theta ** (-2 * j / D), scaling) for j in range(D // 2)], dtype=torch.float64)
    angles = torch.arange(S, dtype=torch.float64)[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)[:, None, :]
    z = torch.complex(x_BSND[..., : D // 2], x_BSND[..., D // 2 :]) * turn
    return torch.cat((z.real, z.imag), dim=-1)


def attention(weights: Weights, name: str, kinds: Kinds, h: torch.Tensor) -> torch.Tensor:
    B, S, _ = h.shape
    q = linear(weights, f"{name}.query", h).view(B, S, kinds.heads, kinds.head_dim)
    k = linear(weights, f"{name}.key", h).view(B, S, kinds.kv_heads, kinds.head_dim)
    v = linear(weights, f"{name}.value", h).view(B, S, kinds.kv_heads, kinds.head_dim)
    if kinds.positions == "rope":
        q, k = (rotate(x, kinds.rope_theta, kinds.rope_scaling) for x in (q, k))
    future = torch.arange(S)[None, :] > torch.arange(S)[:, None]
    heads = []
    for head in range(kinds.heads):
        shared = head * kinds.kv_heads // kinds.heads
        scores = q[:, :, head] @ k[:, :, shared].transpose(1, 2) / math.sqrt(kinds.head_dim)
        heads.append(torch.softmax(scores.masked_fill(future, -math.inf), dim=-1) @ v[:, :, shared])
    return linear(weights, f"{name}.output", torch.cat(heads, dim=-1))


def mlp(weights: Weights, name: str, kinds: Kinds, h: torch.Tensor) -> torch.Tensor:
    up = linear(weights, f"{name}.up", h)
    if kinds.mlp == "gated_silu":
        gate = linear(weights, f"{name}.gate", h)
        a = gate / (1 + torch.exp(-gate)) * up
    else:
        a = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    return linear(weights, f"{name}.down", a)

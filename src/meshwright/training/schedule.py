"""The learning rate of each step: linear warm-up, then half a cosine (Loshchilov and Hutter 2017)."""

from __future__ import annotations

import math

import torch

from meshwright.config.tree import Training


def learning_rate(training: Training, step: int) -> float:
    """Learning rate of `step`, counted from 0.

        step < W     peak · (step + 1) / W                                    so the first step already learns
        else         peak · (f + (1 - f) · (1 + cos(π·t)) / 2),  t = (step + 1 - W) / (steps - W)

    W is `warmup_steps`, f is `final_learning_rate`: the warm-up ends with the peak, the run with f · peak.
    """
    warmup, peak, final = training.warmup_steps, training.learning_rate, training.final_learning_rate
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step + 1 - warmup) / max(training.steps - warmup, 1), 1.0)
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)


def set_learning_rate(optimiser: torch.optim.Optimizer, training: Training, step: int) -> float:
    """Give an optimiser the learning rate of `step`; returns it."""
    rate = learning_rate(training, step)
    for group in optimiser.param_groups:
        group["lr"] = rate
    return rate

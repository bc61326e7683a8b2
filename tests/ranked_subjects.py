"""Run on ranks: the subjects of `bench gradients`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from meshwright.bench import gradients_rank
from meshwright.bench.gradients_rank import Problem, Subject, Times, forget, sample


def norms(problem: Problem, subjects: Sequence[Subject]) -> list[float]:
    """The norm of all gradients after a second sample, for each subject."""
    found = []
    for subject in subjects:
        sample(problem, subject)
        sample(problem, subject)
        made = gradients_rank._made[problem, subject]
        model = made._model if subject.kind == "ddp" else made._state.model
        gradients = [parameter.grad.flatten() for parameter in model.parameters()]
        found.append(float(torch.linalg.vector_norm(torch.cat(gradients))))
    forget()
    return found


def alone(problem: Problem) -> Times:
    """One sample without communication."""
    times = sample(problem, Subject("alone", 0.01))
    forget()
    return times

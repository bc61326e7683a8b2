"""Probes: what flows between modules, forward and backward, kept for comparison.

A module's forward probe is its output, its backward probe the gradient of its input (what its own backward computed and
summed). Comparing probes in program order names the first module that differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from meshwright.comm.scope import current
from meshwright.model.decoder import Decoder

Direction = Literal["activation", "gradient"]


@dataclass
class Probes:
    """Tensors by (direction, module), one for each micro-batch, in the order in which they came to be."""

    values: dict[tuple[Direction, str], list[torch.Tensor]] = field(default_factory=dict)

    def add(self, direction: Direction, module: str, value: torch.Tensor) -> None:
        """Keep one."""
        self.values.setdefault((direction, module), []).append(value.detach().clone())


@contextmanager
def probing(model: Decoder) -> Iterator[Probes]:
    """Collect the probes of every module that computes, while the block runs."""
    probes = Probes()
    handles = []
    for name, module in model.named_modules():
        direct = not name.startswith("layers.") or name.count(".") == 2
        if name and direct and not isinstance(module, nn.ModuleList) and _owns_a_forward(module):
            handles.append(module.register_forward_pre_hook(_watch_input(probes, name)))
            handles.append(module.register_forward_hook(_keep_output(probes, name)))
    try:
        yield probes
    finally:
        for handle in handles:
            handle.remove()


def _owns_a_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _watch_input(probes: Probes, name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        # Not where nothing is kept: what is computed again in backward is watched then.
        if torch.is_grad_enabled() and isinstance(args[0], torch.Tensor) and args[0].requires_grad:
            args[0].register_hook(lambda gradient: probes.add("gradient", name, gradient))

    return hook


def _keep_output(probes: Probes, name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if current().phase != "recompute":  # there is one probe a micro-batch: the first pass's
            probes.add("activation", name, output[0] if isinstance(output, tuple) else output)

    return hook

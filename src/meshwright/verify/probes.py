"""Probes: what flows between modules, forward and backward, kept for comparison.

A module's forward probe is its output, its backward probe the gradient of its input (what its own backward computed and
summed). Comparing probes in program order names the first module that differs.
"""

from __future__ import annotations

from bisect import bisect
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
    """Tensors by (direction, module), one for each micro-batch, in the order of the module's calls; on the host."""

    values: dict[tuple[Direction, str], list[torch.Tensor]] = field(default_factory=dict)
    _numbers: dict[tuple[Direction, str], list[int]] = field(default_factory=dict)
    _calls: int = 0

    def call(self) -> int:
        """The number of a call of a module, by which its probes are ordered: in backward they come in any order."""
        self._calls += 1
        return self._calls

    def add(self, direction: Direction, module: str, value: torch.Tensor, number: int) -> None:
        """Keep one, of the module's call of this number."""
        numbers = self._numbers.setdefault((direction, module), [])
        place = bisect(numbers, number)
        numbers.insert(place, number)
        self.values.setdefault((direction, module), []).insert(place, value.detach().to("cpu", copy=True))

    def joined(self) -> Probes:
        """Those of half-batches, by which layers are called one after the other, as one."""
        whole = {}
        for key, values in self.values.items():
            pairs = list(zip(values[::2], values[1::2], strict=True)) if key[1].startswith("layers.") else []
            whole[key] = [torch.cat(pair) for pair in pairs] or values
        return Probes(whole)


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
            number = probes.call()
            args[0].register_hook(lambda gradient: probes.add("gradient", name, gradient, number))

    return hook


def _keep_output(probes: Probes, name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        # There is one probe a micro-batch: the first pass's. A half-batch that has only entered has no output yet.
        if current().phase != "recompute" and isinstance(value, torch.Tensor):
            probes.add("activation", name, value, probes.call())

    return hook

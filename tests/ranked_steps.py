"""Training steps of plain PyTorch that ranks run under `meshwright.audit` (importable by name)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import meshwright

WIDTH, HIDDEN, BATCH = 16, 32, 4


def mlp() -> nn.Sequential:
    """Two linear layers without biases: 2 · 16 · 32 parameters."""
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias=False), nn.ReLU(), nn.Linear(HIDDEN, WIDTH, bias=False))


def train(model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """One step on constant input."""
    model(torch.ones(BATCH, WIDTH)).sum().backward()
    optimiser.step()
    optimiser.zero_grad()


def sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    """fully_shard on both layers and the root."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    model = mlp()
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def tensor_parallel() -> tuple[nn.Module, torch.optim.Optimizer]:
    """DTensor column and row parallel."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "tensor"))
    model = parallelize_module(mlp(), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return model, torch.optim.AdamW(model.parameters(), foreach=False)


def data_parallel() -> tuple[nn.Module, torch.optim.Optimizer]:
    """torch's own DDP."""
    model = DistributedDataParallel(mlp())
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def audited(kind: str) -> Any:
    """The account of the second step of a kind of model."""
    model, optimiser = {"sharded": sharded, "tensor_parallel": tensor_parallel, "data_parallel": data_parallel}[kind]()
    train(model, optimiser)
    with meshwright.audit() as a:  # type: ignore[operator]
        train(model, optimiser)
    return a.account

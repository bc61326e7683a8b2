"""One rank of a world that does not exist: a fake process group, and fake tensors that have shapes but no values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from meshwright.comm import torch_private
from meshwright.errors import UserError

_MESH_METHODS = ("__init__", "__getitem__", "_flatten", "_unflatten", "_concatenate", "get_group")


@contextmanager
def fake_group(world: int, rank: int) -> Iterator[None]:
    """A default process group of `world` ranks whose collectives move nothing, seen by `rank`.

    Raises UserError if the rank is not in the world, or if a process group exists already.
    """
    if not (isinstance(world, int) and world >= 1):
        raise UserError(f"world = {world!r} is not a number of ranks: use 1 or more")
    if not 0 <= rank < world:
        raise UserError(f"rank {rank} is not in a world of {world}: use 0 to {world - 1}")
    if dist.is_initialized():
        raise UserError("a rehearsal needs a process of its own: torch.distributed is already initialised in this one")
    dist.init_process_group("fake", store=torch_private.FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors made inside have no values. DeviceMeshes are made and sliced for real; torch's DDP is refused."""
    methods: dict[str, Any] = {
        name: _unfaked(getattr(DeviceMesh, name)) for name in _MESH_METHODS if hasattr(DeviceMesh, name)
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(DeviceMesh, **methods))
        stack.enter_context(mock.patch.object(DeviceMesh, "mesh", property(_unfaked(vars(DeviceMesh)["mesh"].fget))))
        stack.enter_context(mock.patch.object(device_mesh, "torch", _TorchOfMeshes()))
        stack.enter_context(mock.patch.object(DistributedDataParallel, "__init__", _refuse_ddp))
        stack.enter_context(torch_private.FakeTensorMode(allow_non_fake_inputs=True))
        yield


class _TorchOfMeshes:
    """torch as DeviceMesh's module sees it: `init_device_mesh`, however imported, numbers ranks with real tensors."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        return _unfaked(value) if name in ("arange", "tensor") else value


def _unfaked(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, torch_private.FakeTensor) for value in (*args, *kwargs.values())):
            raise UserError(
                "a DeviceMesh of a tensor that was made inside a rehearsal has no ranks, because fake tensors have no "
                "values: give it a nested list, or use init_device_mesh"
            )
        with torch_private.unset_fake_temporarily():
            return method(*args, **kwargs)

    return call


def _refuse_ddp(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    raise UserError(
        "DistributedDataParallel cannot be rehearsed: its C++ reducer does not run on fake tensors; "
        "audit a real run of it, or rehearse with fully_shard"
    )

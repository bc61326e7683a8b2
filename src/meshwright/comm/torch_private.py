"""Every private API of torch that the project uses, in one place; tests/comm/test_torch_private.py probes each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_collectives as fsdp_collectives
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.flop_counter import flop_registry

__all__ = [
    "FakeStore",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "all_gather_into",
    "flop_registry",
    "fsdp_collectives",
    "group_named",
    "group_of",
    "in_backward",
    "is_traceable_wrapper_subclass",
    "num_references",
    "reduce_scatter_into",
    "settle_fully_sharded",
    "storage_key",
    "unset_fake_temporarily",
]


def in_backward() -> bool:
    """Whether the autograd engine is executing a graph on this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def group_of(argument: Any) -> dist.ProcessGroup | None:
    """The process group inside a `c10d` operator's argument; None if the argument is something else."""
    if not isinstance(argument, torch.ScriptObject) or "ProcessGroup" not in str(argument._type()):
        return None
    return dist.ProcessGroup.unbox(argument)


def group_named(name: str) -> dist.ProcessGroup:
    """The process group that a functional collective names."""
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def settle_fully_sharded(root: torch.nn.Module) -> None:
    """Do now what `fully_shard` leaves to the first forward: under fake tensors it makes new sharded parameters."""
    root._get_fsdp_state()._lazy_init()  # type: ignore[operator]


def storage_key(storage: torch.UntypedStorage) -> int:
    """Identity of a storage while it lives."""
    return storage._cdata


def num_references(tensor: torch.Tensor) -> int:
    """How many hold this tensor, in Python and in C++."""
    return int(tensor._use_count())  # type: ignore[attr-defined]


# torch 2.13 renamed the two tensor collectives and warns about the old names.
all_gather_into: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

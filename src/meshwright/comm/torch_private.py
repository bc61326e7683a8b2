"""Every private API of torch that the project uses, in one place; tests/comm/test_torch_private.py probes each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_collectives as fsdp_collectives
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.flop_counter import flop_registry

__all__ = [
    "FakeStore",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "all_gather_into",
    "ending_ranks_within",
    "flop_registry",
    "fsdp_collectives",
    "group_named",
    "group_of",
    "group_timeout",
    "in_backward",
    "inherited_timeout",
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


def group_timeout(group: dist.ProcessGroup) -> timedelta | None:
    """What a collective of a group may take; None where its backend has no limit, as the fake one."""
    backend = group._get_backend(group._device_types[0])
    return getattr(backend.options, "_timeout", None)


@contextmanager
def inherited_timeout() -> Iterator[None]:
    """Groups that are made inside have the default group's timeout: torch would give them half an hour.

    It holds from the first connection on; `DeviceMesh` has no argument for it.
    """
    timeout = group_timeout(dist.group.WORLD) if dist.group.WORLD is not None else None
    if timeout is None:
        yield
        return
    with mock.patch.object(dist.distributed_c10d, "_get_default_timeout", return_value=timeout):
        yield


@contextmanager
def ending_ranks_within(seconds: int) -> Iterator[None]:
    """Inside, torch's launcher gives ranks so long to leave when one has failed; then it kills them.

    It would be half a minute: its `shutdown_timeout` is heeded only where the launcher itself is asked to end.
    """
    with mock.patch.object(PContext.close, "__defaults__", (None, seconds)):
        yield


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

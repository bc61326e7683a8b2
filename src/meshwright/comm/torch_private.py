"""Every private API of torch that the project uses, in one place; tests/comm/test_torch_private.py probes each."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_collectives as fsdp_collectives
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.flop_counter import flop_registry

__all__ = [
    "FakeStore",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "all_gather_into",
    "allocations",
    "ending_ranks_within",
    "flex_backward",
    "flex_forward",
    "flop_registry",
    "fsdp_collectives",
    "group_named",
    "group_of",
    "group_timeout",
    "in_backward",
    "inductor_compiled",
    "inherited_timeout",
    "is_traceable_wrapper_subclass",
    "num_holders",
    "num_references",
    "reduce_scatter_into",
    "settle_fully_sharded",
    "sharding_propagated_within",
    "shutdown_timeout",
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


def shutdown_timeout(seconds: int) -> dict[str, Any]:
    """The argument of `LaunchConfig` by which its launcher, asked to end, gives ranks so long.

    torch 2.11 has none: it ends them as `ending_ranks_within` says.
    """
    known = inspect.signature(LaunchConfig).parameters
    return {"shutdown_timeout": seconds} if "shutdown_timeout" in known else {}


@contextmanager
def sharding_propagated_within(context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Inside, DTensor is in a `context` while it derives how a result is sharded, and its shape.

    It runs the operator in full size for that, on tensors without values, and the modes that are entered see it. On
    real tensors it does so once; on fake ones, which it takes for tracing, each time that its cache in C++ is left out.
    """
    propagator = DTensor._op_dispatcher.sharding_propagator

    def within(method: Callable[..., Any]) -> Callable[..., Any]:
        def propagate(*args: Any) -> Any:
            with context():
                return method(*args)

        return propagate

    names = ("propagate_op_sharding", "propagate_op_sharding_non_cached")
    methods: dict[str, Any] = {name: within(getattr(propagator, name)) for name in names}
    with mock.patch.multiple(propagator, **methods):
        yield


def settle_fully_sharded(root: torch.nn.Module) -> None:
    """Do now what `fully_shard` leaves to the first forward: under fake tensors it makes new sharded parameters.

    And let torch 2.12 free what a unit sent before the next unit sends, as 2.11 and 2.13 do.
    """
    state: Any = root._get_fsdp_state()  # type: ignore[operator]
    state._lazy_init()
    if hasattr(state._comm_ctx, "reduce_scatter_states"):
        state._comm_ctx.reduce_scatter_states = _EventsOfStates(state._comm_ctx.reduce_scatter_states)


class _Event(NamedTuple):
    event: Any


class _EventsOfStates(list[Any]):
    """Reductions under way: who loops over them, to wait for their events, is given the events and not the buffers.

    torch 2.12 clears the list and still has the last of it, in the variable of its loop, until the next unit has sent.
    """

    def __iter__(self) -> Iterator[Any]:
        return (_Event(state.event) for state in super().__iter__())


def storage_key(storage: torch.UntypedStorage) -> int:
    """Identity of a storage while it lives."""
    return storage._cdata


def num_references(tensor: torch.Tensor) -> tuple[int, int]:
    """How many hold this tensor in C++, and in Python.

    A thread of C++ that lets go first counts down the one; then it may have to wait for the interpreter's lock, with a
    reference of Python's in its hands, which keeps the tensor.
    """
    return int(tensor._use_count()), sys.getrefcount(tensor)  # type: ignore[attr-defined]


def num_holders(tensor: torch.Tensor) -> int:
    """How many tensors hold this one's storage, and one more."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


@contextmanager
def allocations() -> Iterator[list[dict[str, Any]]]:
    """Afterwards, all that CUDA's allocator did inside: action, address, size, and the Python frames that asked."""
    events: list[dict[str, Any]] = []
    torch.cuda.memory._record_memory_history(max_entries=500_000, stacks="python")
    try:
        yield events
        events += torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(None)


# torch 2.13 renamed the two tensor collectives and warns about the old names.
all_gather_into: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# --- FlexAttention below torch.compile --------------------------------------------------------------------------------

_FLEX_OPTIONS = {
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
}
"""What `flex_attention` passes to its operators by default."""


def _unchanged(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
    return score


def _gradients(score: Any, batch: Any, head: Any, query: Any, key: Any, dscore: Any) -> list[Any]:
    """Those of what `_unchanged` takes. torch would differentiate to find them, which must not be (`kernels.flex`)."""
    return [dscore, None, None, None, None]


def flex_forward(mask: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output and log-sum-exp, to the base of 2, of q, k, v [B, heads, length, D]."""
    from torch._higher_order_ops.flex_attention import flex_attention

    scale = q.shape[-1] ** -0.5
    return flex_attention(q, k, v, _unchanged, mask.as_tuple(), scale, _FLEX_OPTIONS, (), ())[:2]


def flex_backward(
    mask: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """dq, dk and dv; `lse` as `flex_forward` gives it."""
    from torch._higher_order_ops.flex_attention import flex_attention_backward

    graphs = _unchanged, _gradients
    scale, nothing = q.shape[-1] ** -0.5, torch.zeros_like(lse)
    given = (q, k, v, out, lse, dout, nothing, *graphs, mask.as_tuple(), scale, _FLEX_OPTIONS, (), ())
    return flex_attention_backward(*given)[:3]  # type: ignore[arg-type]


def inductor_compiled(function: Callable[..., Any], operands: list[Any]) -> Callable[..., Any]:
    """A function compiled for operands like these. Unlike `torch.compile`, also while a dispatch mode is entered."""
    from torch._inductor import compile as compile_graph
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        return compile_graph(make_fx(function)(*operands), operands)

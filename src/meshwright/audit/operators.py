"""How to read one operator of torch's dispatcher: is it a collective, a computation, how many FLOPs, how many bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from meshwright.comm import torch_private

COLLECTIVE_NAMESPACES = ("c10d", "_c10d_functional")


class Call(NamedTuple):
    """A collective as it reached the dispatcher. `written` are the tensors that it fills."""

    operation: str
    payload_bytes: int
    dtype: str
    written: tuple[torch.Tensor, ...]
    group: dist.ProcessGroup


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors that have a storage in an argument tree of lists, tuples and tensors; a sparse one has two."""
    if isinstance(tree, torch.Tensor):
        if tree.layout == torch.strided:
            yield tree
        elif tree.layout == torch.sparse_coo:
            yield from (tree._indices(), tree._values())
    elif isinstance(tree, list | tuple):
        for leaf in tree:
            yield from tensors(leaf)


def _first(args: tuple[Any, ...], outputs: Any) -> Any:
    return args[0]


def _second(args: tuple[Any, ...], outputs: Any) -> Any:
    return args[1]


def _outputs(args: tuple[Any, ...], outputs: Any) -> Any:
    return outputs


class _Collective(NamedTuple):
    operation: str
    payload: Callable[[tuple[Any, ...], Any], Any]
    written: Callable[[tuple[Any, ...], Any], Any]
    holds_one_part: bool = False
    """The argument is one rank's part of the payload: only the root has it all."""


# Which arguments hold the full tensor, and which are written.
# c10d operators write into arguments, functional ones return.
_COLLECTIVES = {
    "c10d.allreduce_": _Collective("all_reduce", _first, _first),
    "c10d.allreduce_coalesced_": _Collective("all_reduce", _first, _first),
    "c10d.allgather_": _Collective("all_gather", _first, _first),
    "c10d._allgather_base_": _Collective("all_gather", _first, _first),
    "c10d.allgather_into_tensor_coalesced_": _Collective("all_gather", _first, _first),
    "c10d.reduce_scatter_": _Collective("reduce_scatter", _second, _first),
    "c10d._reduce_scatter_base_": _Collective("reduce_scatter", _second, _first),
    "c10d.reduce_scatter_tensor_coalesced_": _Collective("reduce_scatter", _second, _first),
    "c10d.alltoall_": _Collective("all_to_all", _second, _first),
    "c10d.alltoall_base_": _Collective("all_to_all", _second, _first),
    "c10d.broadcast_": _Collective("broadcast", _first, _first),
    "c10d.scatter_": _Collective("scatter", _first, _first, holds_one_part=True),
    "c10d.gather_": _Collective("gather", _second, _first, holds_one_part=True),
    "c10d.reduce_": _Collective("reduce", _first, _first),
    "c10d.send": _Collective("shift", _first, lambda args, outputs: ()),
    "_c10d_functional.all_reduce": _Collective("all_reduce", _first, _outputs),
    "_c10d_functional.all_reduce_": _Collective("all_reduce", _first, _first),
    "_c10d_functional.all_reduce_coalesced": _Collective("all_reduce", _first, _outputs),
    "_c10d_functional.all_gather_into_tensor": _Collective("all_gather", _outputs, _outputs),
    "_c10d_functional.all_gather_into_tensor_out": _Collective("all_gather", _outputs, _outputs),
    "_c10d_functional.all_gather_into_tensor_coalesced": _Collective("all_gather", _outputs, _outputs),
    "_c10d_functional.reduce_scatter_tensor": _Collective("reduce_scatter", _first, _outputs),
    "_c10d_functional.reduce_scatter_tensor_coalesced": _Collective("reduce_scatter", _first, _outputs),
    "_c10d_functional.all_to_all_single": _Collective("all_to_all", _first, _outputs),
    "_c10d_functional.broadcast": _Collective("broadcast", _first, _outputs),
    "_c10d_functional.broadcast_": _Collective("broadcast", _first, _first),
}

RECEIVES = {"c10d.recv_", "c10d.recv_any_source_"}
"""Write their first argument; what they move is counted by its sender."""

_SILENT = RECEIVES | {
    "c10d.barrier",
    "c10d.monitored_barrier_",
    "_c10d_functional.wait_tensor",
    "_c10d_functional._wrap_tensor_autograd",
}
"""Move no payload of this rank: a message is counted by its sender, and waits are events of their own."""


def read_collective(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Call | None:
    """Read a call in one of the `COLLECTIVE_NAMESPACES`; None if it moves nothing.

    Raises NotImplementedError for an operator that is not known: a silent omission would falsify the ledger.
    """
    name = str(func.overloadpacket)
    if name in _SILENT:
        return None
    if name not in _COLLECTIVES:
        raise NotImplementedError(f"the recorder does not know the collective {name}")
    kind, group = _COLLECTIVES[name], _group(func, args, kwargs)
    payload = tuple(tensors(kind.payload(args, outputs)))
    payload_bytes = num_bytes(payload) * (group.size() if kind.holds_one_part else 1)
    dtype = str(payload[0].dtype).removeprefix("torch.")
    return Call(kind.operation, payload_bytes, dtype, tuple(tensors(kind.written(args, outputs))), group)


def _group(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dist.ProcessGroup:
    for argument in (*args, *kwargs.values()):
        group = torch_private.group_of(argument)
        if group is not None:
            return group
    names = [a for a in (*args, *kwargs.values()) if isinstance(a, str)]  # functional ones name it after the reduction
    return torch_private.group_named(names[-1])


# --- computation ------------------------------------------------------------------------------------------------------

_MATMULS = {
    "aten.mm": (0, 1),
    "aten.addmm": (1, 2),
    "aten.addmm_": (1, 2),
    "aten.bmm": (0, 1),
    "aten.baddbmm": (1, 2),
    "aten.baddbmm_": (1, 2),
    "aten.mv": (0, 1),
    "aten.addmv": (1, 2),
    "aten.dot": (0, 1),
}
"""Which arguments are multiplied."""

_ATTENTION = {
    "aten._scaled_dot_product_flash_attention_for_cpu": 2,
    "aten._scaled_dot_product_flash_attention": 2,
    "aten._scaled_dot_product_efficient_attention": 2,
    "aten._scaled_dot_product_cudnn_attention": 2,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": 5,
    "aten._scaled_dot_product_flash_attention_backward": 5,
    "aten._scaled_dot_product_efficient_attention_backward": 5,
    "aten._scaled_dot_product_cudnn_attention_backward": 5,
}
"""Matrix products of the size of the score matrix: QK and PV forward; QK again, dP, dV, dQ, dK backward."""


def kind_and_flops(func: Any, args: tuple[Any, ...]) -> tuple[str, int]:
    """Kind of operation (matmul, attention, elementwise) and its FLOPs, counted for matmul and attention only."""
    name = str(func.overloadpacket)
    if name in _MATMULS:
        a, b = (args[i] for i in _MATMULS[name])
        return "matmul", 2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)
    if name in _ATTENTION:
        at = 1 if name.endswith("backward") else 0  # backward operators take the gradient of the output first
        q, k = args[at], args[at + 1]
        return "attention", 2 * _ATTENTION[name] * math.prod(q.shape) * k.shape[-2]
    if func in torch_private.flop_registry or func.overloadpacket in torch_private.flop_registry:
        # Convolutions and the like, and attention of our own: the caller asks the formula that came with the operator.
        return "attention" if func.namespace == "meshwright" else "matmul", -1
    return "elementwise", 0


def torch_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> int:
    """FLOPs by torch's registry of formulas."""
    return int(torch_private.flop_registry[func.overloadpacket](*args, **kwargs, out_val=outputs))


def num_bytes(tree: Any) -> int:
    """Bytes of the elements of the tensors in a tree, storage shared or not."""
    return sum(t.numel() * t.element_size() for t in tensors(tree))

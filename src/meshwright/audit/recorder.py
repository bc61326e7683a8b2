"""The recorder: a dispatch mode that writes the `Trace` of whatever runs under it, real or fake.

It reads the operators that reach torch's dispatcher and the lifetimes of their storages, never what a scheme declares.
A storage's category comes from what holds it, and holds for its whole life:

    parameters            a module (its parameters and buffers)
    gradients             a parameter's `.grad`
    optimiser_states      an optimiser's state
    cast_weights          made by casting a parameter to another dtype
    logits                saved or allocated by the loss (site `loss`)
    saved_activations     autograd, for backward
    communication_buffers a collective that wrote it
    temporaries           nothing of these

Modules and optimisers are found through torch's global hooks, so that any training step can be recorded. Site and phase
come from `comm.scope` where the code states them, else from the module that runs (in backward: the module whose saved
tensors were last read).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from meshwright.account import Compute, Event, Issue, Memory, Repeat, Trace, Wait
from meshwright.audit import operators
from meshwright.comm import scope, torch_private
from meshwright.comm.mesh import axis_name

LOSS_SITE = "loss"

_PERSISTENT = ("parameters", "gradients", "optimiser_states")
_PRIORITY = (
    *_PERSISTENT,
    "cast_weights",
    "gathered_parameters",
    "logits",
    "saved_activations",
    "communication_buffers",
    "temporaries",
)
_UNPACKS_GATHERED = "fsdp.split_with_sizes_copy"
"""What fully_shard calls to put gathered parameters where their modules use them."""
_FREE_OPERATORS = {
    "aten.detach",
    "aten.promote_types",
    "aten.empty",
    "aten.empty_like",
    "aten.empty_strided",
    "aten.new_empty",
    "aten.lift_fresh",
}


class _Storage:
    """One storage while it lives, and the categories it was seen in."""

    __slots__ = ("categories", "known_before", "nbytes", "reference")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.categories = {"temporaries"}
        self.known_before = False
        self.reference: Any = None

    def successor(self, nbytes: int) -> _Storage:
        """The same storage after it was resized in place."""
        resized = _Storage(nbytes)
        resized.categories, resized.known_before, resized.reference = self.categories, self.known_before, self.reference
        return resized

    @property
    def category(self) -> str:
        return next(category for category in _PRIORITY if category in self.categories)


class _Held:
    """A `Memory` event whose category is settled only when recording ends."""

    __slots__ = ("phase", "sign", "site", "storage")

    def __init__(self, storage: _Storage, sign: int, phase: str, site: str) -> None:
        self.storage, self.sign, self.phase, self.site = storage, sign, phase, site

    def settle(self) -> Memory:
        return Memory(self.storage.category, self.sign * self.storage.nbytes, self.phase, self.site)


def _watched_resize(recorder: Recorder) -> Callable[..., Any]:
    resize = torch.UntypedStorage.resize_

    def watched(untyped: torch.UntypedStorage, *args: Any) -> Any:
        result = resize(untyped, *args)
        recorder.resized(untyped)
        return result

    return watched


class Recorder(torch_private.TorchDispatchMode):
    """Records everything that is executed while it is entered; `trace()` afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[Event | _Held] = []
        self._marks: list[int] = []
        self._storages: dict[int, _Storage] = {}
        self._tickets: dict[int, dict[int, int]] = {}
        self._num_issued = 0
        self._num_operations = 0
        self._received: tuple[int, int, int] | None = None
        """The last message that was posted to arrive: after how many operations, and where."""
        self._paired = 0
        """Ticket of the last one that left, and has one that arrives."""
        self._names: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
        self._modules: list[str] = []
        self._backward_site = ""
        self._in_optimiser = False
        self._active = False
        self._stack = ExitStack()

    def trace(self, *, repeat: int = 1) -> Trace:
        """The events recorded so far. Storages of modules and optimisers that were there before come first.

        What lies between the second and the third `mark` is taken to have happened `repeat` times.
        """
        before: list[Event] = []
        during: list[list[Event]] = [[], [], []]
        second, third = self._marks[1:3] if len(self._marks) > 2 else (0, 0)
        for index, event in enumerate(self._events):
            part = during[(index >= second) + (index >= third)]
            if not isinstance(event, _Held):
                part.append(event)
            elif event.storage.known_before and event.sign > 0 and event.storage.category in _PERSISTENT:
                before.append(event.settle())
            else:
                part.append(event.settle())
        middle = during[1] if repeat == 1 else [Repeat(repeat, tuple(during[1]))]
        return Trace((*before, *during[0], *middle, *during[2]))

    def mark(self) -> None:
        """Note this moment, for `trace`."""
        self._marks.append(len(self._events))

    def restart(self) -> None:
        """Forget what was recorded, but for the storages that are alive: the account begins here."""
        storages = list(self._storages.values())
        for storage in storages:
            storage.known_before = True
        self._events = [_Held(storage, 1, "forward", "") for storage in storages]
        self._marks.clear()
        self._tickets.clear()

    # --- entering and leaving ---

    def __enter__(self) -> Recorder:
        handles: list[Any] = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(self._enter_optimiser),
            register_optimizer_step_post_hook(self._leave_optimiser),
        ]
        for handle in handles:
            self._stack.callback(handle.remove)
        self._stack.enter_context(scope.observe(self))
        self._stack.enter_context(torch_private.sharding_propagated_within(scope.unaccounted))
        self._stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", _watched_resize(self)))
        self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
        self._active = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._active = False
        super().__exit__(*error)
        self._stack.close()

    # --- what runs ---

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in ("prim", "profiler") or scope.is_unaccounted():
            return func(*args, **kwargs)
        if any(hasattr(cls, "__tensor_flatten__") for cls in types):
            return NotImplemented  # a wrapper such as DTensor goes first; its local operations come back here
        outputs = func(*args, **kwargs)
        self._num_operations += 1
        phase, site = self._where()
        for tensor in operators.tensors(args):
            self._see(tensor, phase, site, known_before=True)
        if func.namespace in operators.COLLECTIVE_NAMESPACES:
            self._collective(func, args, kwargs, outputs, phase, site)
        else:
            self._computation(func, args, kwargs, outputs, phase, site)
        return outputs

    def _where(self) -> tuple[str, str]:
        here = scope.current()
        in_backward = torch_private.in_backward()
        phase = here.phase
        if phase is None:
            if in_backward:
                phase = "recompute" if self._modules else "backward"
            else:  # a module that runs while the optimiser steps is that of its closure
                phase = "optimiser" if self._in_optimiser and not self._modules else "forward"
        site = here.site
        if site is None:
            site = self._modules[-1] if self._modules else self._backward_site if in_backward else ""
        return phase, site

    def _collective(self, func: Any, args: Any, kwargs: dict[str, Any], outputs: Any, phase: str, site: str) -> None:
        if str(func.overloadpacket) == "_c10d_functional.wait_tensor":
            self._wait(args[0])
            return
        for tensor in operators.tensors(outputs):
            self._see(tensor, phase, site)
        if str(func.overloadpacket) in operators.RECEIVES:
            self._receive(args[0], phase, site)
        call = operators.read_collective(func, args, kwargs, outputs)
        if call is None:
            return
        self._num_issued += 1
        for tensor in call.written:
            storage = self._see(tensor, phase, site)
            storage.categories.add("communication_buffers")
            self._await(tensor, self._num_issued)
        if call.operation == "shift" and self._received is not None and self._received[0] == self._num_operations - 1:
            _, key, offset = self._received
            self._tickets.setdefault(key, {})[offset] = self._num_issued
            self._paired = self._num_issued
        group = scope.current().axis or axis_name(call.group), call.group.size()
        row = (call.operation, *group, call.dtype, call.payload_bytes, phase, site)
        self._events.append(Issue(*row, ticket=self._num_issued))

    def _receive(self, tensors: Any, phase: str, site: str) -> None:
        """A message that arrives is a communication buffer; if it was posted right before one that leaves, as a shift
        posts them, or right after one that has none yet, waiting for it is waiting for both."""
        last = self._events[-1] if self._events else None
        for tensor in operators.tensors(tensors):
            self._see(tensor, phase, site).categories.add("communication_buffers")
            if isinstance(last, Issue) and last.operation == "shift" and last.ticket != self._paired:
                self._await(tensor, last.ticket)
                self._paired = last.ticket
            else:
                key = torch_private.storage_key(tensor.untyped_storage())
                self._received = self._num_operations, key, int(tensor.storage_offset())

    def _computation(self, func: Any, args: Any, kwargs: dict[str, Any], outputs: Any, phase: str, site: str) -> None:
        name = str(func.overloadpacket)
        cast_of_parameter = name == "aten._to_copy" and any(
            "parameters" in self._see(tensor, phase, site).categories for tensor in operators.tensors(args[0])
        )
        for tensor in operators.tensors(outputs):
            storage = self._see(tensor, phase, site)
            if cast_of_parameter:
                storage.categories.add("cast_weights")
        if name == _UNPACKS_GATHERED:
            for tensor in operators.tensors(kwargs["out"]):
                self._see(tensor, phase, site).categories.add("gathered_parameters")
        if func.is_view or name in _FREE_OPERATORS:
            return
        kind, flops = operators.kind_and_flops(func, args)
        if flops < 0:
            flops = operators.torch_flops(func, args, kwargs, outputs)
        self._events.append(Compute(kind, flops, operators.num_bytes(args) + operators.num_bytes(outputs), phase, site))

    # --- storages ---

    def _see(self, tensor: torch.Tensor, phase: str, site: str, *, known_before: bool = False) -> _Storage:
        """The record of a tensor's storage; one seen for the first time is allocated now.

        `known_before`: it was not made under the recorder. If a module or optimiser holds it, it was there all along.
        """
        untyped = tensor.untyped_storage()
        key = torch_private.storage_key(untyped)
        storage = self._storages.get(key)
        if storage is None:
            storage = _Storage(untyped.nbytes())
            storage.known_before = known_before
            if site == LOSS_SITE and not known_before:
                storage.categories.add("logits")
            storage.reference = weakref.ref(untyped, self._on_free(key))
            self._storages[key] = storage
            self._events.append(_Held(storage, 1, phase, site))
        return storage

    def _on_free(self, key: int) -> Callable[[Any], None]:
        def freed(_: Any) -> None:
            storage = self._storages.pop(key, None)
            self._tickets.pop(key, None)
            if self._active and storage is not None:
                self._events.append(_Held(storage, -1, *self._where()))

        return freed

    def _hold(self, tensor: torch.Tensor | None, category: str) -> None:
        """Say that something of `category` holds a tensor, or the local tensors inside a wrapper."""
        if tensor is None or not isinstance(tensor, torch.Tensor):
            return
        if torch_private.is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                self._hold(getattr(tensor, name), category)
            return
        for part in operators.tensors(tensor):
            self._see(part, *self._where(), known_before=True).categories.add(category)

    def _pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, str]:
        site = self._where()[1]
        self._hold(tensor, "logits" if site == LOSS_SITE else "saved_activations")
        return tensor, site

    def _unpack(self, packed: tuple[torch.Tensor, str]) -> torch.Tensor:
        tensor, self._backward_site = packed
        return tensor

    def resized(self, untyped: torch.UntypedStorage) -> None:
        """A storage was given another size in place: fully_shard frees and restores gathered parameters so."""
        storage = self._storages.get(torch_private.storage_key(untyped))
        if storage is not None and untyped.nbytes() != storage.nbytes:
            phase, site = self._where()
            self._events.append(_Held(storage, -1, phase, site))
            storage = self._storages[torch_private.storage_key(untyped)] = storage.successor(untyped.nbytes())
            self._events.append(_Held(storage, 1, phase, site))

    # --- modules and optimisers ---

    def _enter_module(self, module: torch.nn.Module, args: Any) -> None:
        if not self._modules and not torch_private.in_backward():
            self._backward_site = ""
            if module not in self._names:
                self._adopt(module)
        self._modules.append(self._names.get(module, type(module).__name__))

    def _leave_module(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if self._modules:
            self._modules.pop()

    def _adopt(self, root: torch.nn.Module) -> None:
        for name, module in root.named_modules():
            self._names[module] = name
            for buffer in module.buffers(recurse=False):
                self._hold(buffer, "parameters")
        for parameter in root.parameters():
            self._hold_parameter(parameter)
            if parameter.requires_grad and parameter.is_leaf:
                handle = parameter.register_post_accumulate_grad_hook(lambda p: self._hold(p.grad, "gradients"))
                self._stack.callback(handle.remove)

    def _hold_parameter(self, parameter: torch.Tensor) -> None:
        self._hold(parameter, "parameters")
        self._hold(parameter.grad, "gradients")

    def _enter_optimiser(self, optimiser: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._in_optimiser = True
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                self._hold_parameter(parameter)
        self._hold_states(optimiser)

    def _leave_optimiser(self, optimiser: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._hold_states(optimiser)
        self._in_optimiser = False

    def _hold_states(self, optimiser: torch.optim.Optimizer) -> None:
        for state in optimiser.state.values():
            for value in state.values():
                self._hold(value, "optimiser_states")

    # --- waits ---

    def waited(self, pending: Any) -> None:
        """A `Pending` of comm/ was waited for (see `comm.scope.Observer`)."""
        self._wait(pending.tensor)

    def _await(self, tensor: torch.Tensor, ticket: int) -> None:
        """A collective fills this tensor. Several may fill parts of one storage: they are told apart by where."""
        places = self._tickets.setdefault(torch_private.storage_key(tensor.untyped_storage()), {})
        places[int(tensor.storage_offset())] = ticket

    def _wait(self, tensor: torch.Tensor) -> None:
        places = self._tickets.get(torch_private.storage_key(tensor.untyped_storage()), {})
        ticket = places.pop(int(tensor.storage_offset()), None)
        if ticket is None and len(places) == 1:  # somebody waits for a view of what arrives
            _, ticket = places.popitem()
        if ticket is not None:
            self._events.append(Wait(ticket, *self._where()))

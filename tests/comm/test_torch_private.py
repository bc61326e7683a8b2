"""Probes of the private torch APIs: a new torch that changes one fails here, by name."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.attention.flex_attention import create_block_mask, noop_mask

from meshwright.comm import torch_private
from meshwright.rehearsal.fake_world import fake_group, fake_tensors


def test_fake_group_has_any_size() -> None:
    with fake_group(1024, 1000):
        assert (dist.get_rank(), dist.get_world_size()) == (1000, 1024)
        dist.all_reduce(torch.zeros(2))


def test_in_backward_is_true_only_inside_the_engine() -> None:
    seen: list[bool] = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda gradient: seen.append(torch_private.in_backward()))
    (x * 2).sum().backward()
    assert seen == [True] and not torch_private.in_backward()


def test_groups_can_be_read_from_operators() -> None:
    seen: list[dist.ProcessGroup] = []

    class Mode(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.extend(g for g in map(torch_private.group_of, args) if g is not None)
            return func(*args, **(kwargs or {}))

    with fake_group(4, 0), Mode():
        dist.all_reduce(torch.zeros(1))
        assert seen == [dist.group.WORLD]
        assert torch_private.group_named(seen[0].group_name) is dist.group.WORLD


def test_holders_of_a_tensor_and_of_its_storage_are_counted_real_and_fake() -> None:
    for mode in (torch_private.FakeTensorMode(), torch.no_grad()):
        with mode:
            tensor = torch.zeros(4)
            alone, holders = torch_private.num_references(tensor), torch_private.num_holders(tensor)
            same = [tensor]
            assert torch_private.num_references(tensor) == (alone[0], alone[1] + 1)
            same.clear()
            view = tensor[1:]
            assert torch_private.num_references(tensor)[0] > alone[0]
            assert torch_private.num_holders(tensor) == holders + 1
            del view
            assert (torch_private.num_references(tensor), torch_private.num_holders(tensor)) == (alone, holders)


def test_storages_live_as_long_as_their_last_tensor_real_and_fake() -> None:
    for mode in (torch_private.FakeTensorMode(), torch.no_grad()):
        with mode:
            tensor = torch.zeros(4)
            key = torch_private.storage_key(tensor.untyped_storage())
            died: list[object] = []
            reference = weakref.ref(tensor.untyped_storage(), died.append)
            view = tensor[1:]
            del tensor
            assert not died and torch_private.storage_key(view.untyped_storage()) == key
            del view
            assert died and reference() is None


def test_fake_mode_can_be_left_for_a_moment() -> None:
    with torch_private.FakeTensorMode():
        assert isinstance(torch.zeros(1), torch_private.FakeTensor)
        with torch_private.unset_fake_temporarily():
            assert not isinstance(torch.zeros(1), torch_private.FakeTensor)


def test_the_launchers_patience_can_be_set() -> None:
    def patience() -> Any:
        return inspect.signature(torch_private.PContext.close).parameters["timeout"].default

    assert patience() == 30
    with torch_private.ending_ranks_within(5):
        assert patience() == 5
    assert patience() == 30


def test_a_launcher_takes_what_it_is_told_of_its_patience() -> None:
    told = torch_private.shutdown_timeout(5)
    config = torch_private.LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1, **told)
    assert all(getattr(config, name) == seconds == 5 for name, seconds in told.items())


def test_the_history_of_the_allocator_is_asked_for_as_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the two functions exist and take these arguments; what they give is checked on one."""
    memory = torch.cuda.memory
    signatures = {name: inspect.signature(getattr(memory, name)) for name in ("_record_memory_history", "_snapshot")}
    asked: list[Any] = []

    def record(*args: Any, **kwargs: Any) -> None:
        signatures["_record_memory_history"].bind(*args, **kwargs)
        asked.append((args, kwargs))

    def snapshot(*args: Any, **kwargs: Any) -> dict[str, Any]:
        signatures["_snapshot"].bind(*args, **kwargs)
        return {"device_traces": [["other device"], [{"action": "alloc"}]]}

    monkeypatch.setattr(memory, "_record_memory_history", record)
    monkeypatch.setattr(memory, "_snapshot", snapshot)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with torch_private.allocations() as events:
        assert events == [] and asked == [((), {"max_entries": 500_000, "stacks": "python"})]
    assert events == [{"action": "alloc"}] and asked[1:] == [((None,), {})]


def test_flop_registry_knows_matmul() -> None:
    assert torch_private.flop_registry[torch.ops.aten.mm]((2, 3), (3, 5)) == 2 * 2 * 3 * 5


def test_a_settled_fully_sharded_model_keeps_its_parameters_through_the_first_step() -> None:
    """Whoever took them before, such as an optimiser, has those that are trained; the last ranks' are padded."""
    with fake_group(4, 3):
        mesh = init_device_mesh("cpu", (4,))
        with fake_tensors():
            model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
            fully_shard(model[0], mesh=mesh)
            fully_shard(model, mesh=mesh)
            torch_private.settle_fully_sharded(model)
            before = _storages(model)
            model(torch.zeros(2, 6)).sum().backward()
            assert _storages(model) == before


def test_a_settled_fully_sharded_model_frees_what_a_unit_sent_before_the_next_one_sends() -> None:
    alive: list[int] = []
    sent: list[weakref.ref[Any]] = []

    class Mode(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if DTensor in types:
                return NotImplemented
            if "reduce_scatter" in func.__name__:
                alive.append(sum(storage() is not None for storage in sent))
                sent.append(weakref.ref(args[1].untyped_storage()))
            return func(*args, **(kwargs or {}))

    with fake_group(2, 0):
        mesh = init_device_mesh("cpu", (2,))
        with fake_tensors():
            model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
            for unit in (*model, model):
                fully_shard(unit, mesh=mesh)
            torch_private.settle_fully_sharded(model)
            with Mode():
                model(torch.zeros(2, 6)).sum().backward()
    assert alive == [0, 0, 0, 0]


def test_what_dtensor_runs_to_propagate_shardings_can_be_told_apart() -> None:
    """Of a sum of tensors split in two, what is left is the sum of their local halves."""
    inside: list[bool] = [False]
    seen: list[tuple[bool, Any, torch.Size]] = []

    @contextmanager
    def noted() -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    class Mode(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if DTensor in types:
                return NotImplemented
            outputs = func(*args, **(kwargs or {}))
            if isinstance(outputs, torch.Tensor):
                seen.append((inside[-1], func, outputs.shape))
            return outputs

    add = torch.ops.aten.add.Tensor
    with fake_group(2, 0):
        mesh = init_device_mesh("cpu", (2,))
        with fake_tensors():
            split = DTensor.from_local(torch.zeros(5, 77), mesh, [Shard(0)], run_check=False)  # in no cache yet
            with Mode(), torch_private.sharding_propagated_within(noted):
                split + split
    assert [(func, shape) for within, func, shape in seen if not within] == [(add, (5, 77))]
    assert (True, add, (10, 77)) in seen


def _storages(model: nn.Module) -> list[int]:
    parameters = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    assert len(parameters) == 4
    return [torch_private.storage_key(parameter.to_local().untyped_storage()) for parameter in parameters]


@pytest.mark.parametrize("causal", [True, False])
def test_flex_operators_take_a_log_sum_exp_to_the_base_of_two(causal: bool) -> None:
    """Not compiled here, for a CPU has no backward: their own dense form, against attention written out."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, heads, 130, 16, generator=generator) for heads in (4, 2, 2, 4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    scores = leaves[0] @ leaves[1].repeat_interleave(2, 1).mT / 4
    if causal:
        scores = scores + torch.full((130, 130), -torch.inf).triu(1)
    expected = torch.softmax(scores, -1) @ leaves[2].repeat_interleave(2, 1)
    base_2 = torch.logsumexp(scores, -1) / math.log(2)
    seen = (lambda _, __, query, key: query >= key) if causal else noop_mask
    mask = create_block_mask(seen, None, None, 130, 130, device="cpu")
    out, lse = torch_private.flex_forward(mask, q, k, v)
    assert torch.allclose(out, expected, atol=1e-5) and torch.allclose(lse, base_2, atol=1e-5)
    found = torch_private.flex_backward(mask, q, k, v, expected.detach(), dout, base_2.detach())
    for a, b in zip(found, torch.autograd.grad(expected, leaves, dout), strict=True):
        assert torch.allclose(a, b, atol=1e-5)

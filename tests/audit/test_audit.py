"""`meshwright.audit` and `meshwright.rehearse` around plain PyTorch: DDP, fully_shard, DTensor and one's own code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import ranked_steps
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import meshwright
from meshwright.account import Compute, Ledger, StepAccount, diff_ledgers
from meshwright.comm.ranks import Ranks
from meshwright.errors import UserError

WEIGHT_BYTES = ranked_steps.WIDTH * ranked_steps.HIDDEN * 4
Pool = Callable[[int], Ranks]


def calls(ledger: Ledger) -> Counter[tuple[str, str, int]]:
    """(operation, phase, payload bytes) -> count."""
    counted: Counter[tuple[str, str, int]] = Counter()
    for key, count in ledger.rows.items():
        counted[key.operation, key.phase, key.payload_bytes] += count
    return counted


def rehearsed(kind: str, world: int, rank: int = 0) -> StepAccount:
    with meshwright.rehearse(world=world, rank=rank) as r:
        model, optimiser = getattr(ranked_steps, kind)()
        ranked_steps.train(model, optimiser)
        r.restart()
        ranked_steps.train(model, optimiser)
    return r.account


def test_ddp_sums_its_gradients_in_one_bucket(ranks: Pool) -> None:
    account = ranks(2).run(ranked_steps.audited, "data_parallel")[0]
    assert calls(account.ledger)["all_reduce", "backward", 2 * WEIGHT_BYTES] == 1
    assert account.footprint.bytes["parameters"] == 2 * WEIGHT_BYTES
    assert account.footprint.bytes["gradients"] == 2 * WEIGHT_BYTES
    assert account.footprint.bytes["optimiser_states"] == 4 * WEIGHT_BYTES + 2 * 4


def test_fully_shard_gathers_and_scatters_each_unit(ranks: Pool) -> None:
    account = ranks(2).run(ranked_steps.audited, "sharded")[0]
    counted = calls(account.ledger)
    assert counted["all_gather", "forward", WEIGHT_BYTES] == 2
    assert counted["all_gather", "backward", WEIGHT_BYTES] == 2
    assert counted["reduce_scatter", "backward", WEIGHT_BYTES] == 2
    assert sum(counted.values()) == 6
    assert account.footprint.bytes["parameters"] == WEIGHT_BYTES, "each of two ranks holds half of two weights"


def test_dtensor_tensor_parallelism_sums_the_output_of_the_row_layer(ranks: Pool) -> None:
    account = ranks(2).run(ranked_steps.audited, "tensor_parallel")[0]
    output_bytes = ranked_steps.BATCH * ranked_steps.WIDTH * 4
    assert calls(account.ledger) == {("all_reduce", "forward", output_bytes): 1}
    assert account.footprint.bytes["parameters"] == WEIGHT_BYTES


@pytest.mark.parametrize("kind", ["sharded", "tensor_parallel"])
def test_rehearsal_counts_what_the_run_counted(ranks: Pool, kind: str) -> None:
    run = ranks(2).run(ranked_steps.audited, kind)[1]
    rehearsal = rehearsed(kind, world=2, rank=1)
    assert not diff_ledgers(run.ledger, rehearsal.ledger)
    assert run.work.flops(kind="matmul") == rehearsal.work.flops(kind="matmul") > 0
    for category in ("parameters", "gradients", "optimiser_states", "saved_activations"):
        assert run.footprint.bytes[category] == rehearsal.footprint.bytes[category]


def test_a_rehearsal_of_many_ranks_needs_none() -> None:
    account = rehearsed("sharded", world=16, rank=11)
    assert {key.group_size for key in account.ledger.rows} == {16}
    assert account.footprint.bytes["parameters"] == 2 * WEIGHT_BYTES // 16


def test_ddp_cannot_be_rehearsed_and_says_so_in_one_line() -> None:
    with pytest.raises(UserError, match="DistributedDataParallel cannot be rehearsed") as error:
        rehearsed("data_parallel", world=2)
    assert "\n" not in str(error.value)
    assert not dist.is_initialized()


@pytest.mark.parametrize(("world", "rank"), [(4, 4), (4, -1)])
def test_a_rank_outside_its_world_is_refused(world: int, rank: int) -> None:
    refused = pytest.raises(UserError, match=f"rank {rank} is not in a world of 4: use 0 to 3")
    with refused, meshwright.rehearse(world=world, rank=rank):
        pass


class _Chatty(nn.Module):
    """A module with a collective that nobody declared."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x


def test_a_bare_collective_is_seen_at_its_module() -> None:
    with meshwright.rehearse(world=8) as r:
        nn.Sequential(nn.Identity(), _Chatty())(torch.zeros(3))
    ((key, count),) = r.account.ledger.rows.items()
    assert (key.operation, key.group_size, key.site, key.payload_bytes, count) == ("all_reduce", 8, "1", 12, 1)


def test_memory_of_plain_code_by_hand() -> None:
    """Peak of y = relu(x @ w) summed: w, its gradient, x saved, relu's output saved, and what backward makes."""
    x, layer = torch.ones(8, 16), nn.Linear(16, 32, bias=False)
    layer(x).relu().sum().backward()
    with meshwright.audit() as a:  # type: ignore[operator]
        layer(x).relu().sum().backward()
    bytes_of = a.account.footprint.bytes
    assert bytes_of["parameters"] == bytes_of["gradients"] == 16 * 32 * 4
    assert bytes_of["saved_activations"] == 8 * 16 * 4
    assert a.account.work.flops(kind="matmul") == 2 * (2 * 8 * 16 * 32)


def test_flops_equal_torchs_own_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6, 5))
    x = torch.ones(2, 4, 8)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    with meshwright.audit() as a:  # type: ignore[operator]
        model(x).sum().backward()
    assert a.account.work.flops() == counter.get_total_flops() > 0


def test_what_dtensor_runs_for_shapes_alone_is_not_counted() -> None:
    """Nothing is cached yet for this shape, so the sum is run in full size too, to see its shape."""
    with meshwright.rehearse(world=2) as r:
        mesh = init_device_mesh("cpu", (2,))
        split = DTensor.from_local(torch.zeros(5, 79), mesh, [Shard(0)], run_check=False)
        r.restart()
        split + split
    touched = [event.bytes for event in r.account.trace.events if isinstance(event, Compute)]
    assert touched == [3 * 5 * 79 * 4]


def test_functional_attention_is_counted_as_attention() -> None:
    q = torch.ones(2, 3, 16, 8)
    with meshwright.audit() as a:  # type: ignore[operator]
        nn.functional.scaled_dot_product_attention(q, q, q)
    assert a.account.work.flops(kind="attention") == 4 * 2 * 3 * 16 * 16 * 8


def test_an_unknown_collective_is_not_skipped_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    from meshwright.audit import operators

    monkeypatch.delitem(operators._COLLECTIVES, "c10d.allreduce_")
    refused = pytest.raises(NotImplementedError, match=r"does not know the collective c10d\.allreduce_")
    with refused, meshwright.rehearse(world=2):
        dist.all_reduce(torch.zeros(1))


def test_sparse_gradients_are_counted_by_their_parts() -> None:
    table = nn.Embedding(50, 4, sparse=True)
    with meshwright.audit() as a:
        table(torch.tensor([1, 2, 3])).sum().backward()
    assert a.account.footprint.bytes["parameters"] == 50 * 4 * 4
    assert 0 < a.account.footprint.bytes["gradients"] < 50 * 4 * 4


def test_an_optimiser_that_fails_does_not_swallow_the_next_forward() -> None:
    layer = nn.Linear(4, 4)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)

    def failing() -> float:
        raise ValueError("planted")

    with meshwright.audit() as a:
        with pytest.raises(ValueError, match="planted"):
            optimiser.step(failing)
        layer(torch.ones(2, 4)).sum().backward()
    assert a.account.work.flops(phase="optimiser") == 0
    assert a.account.work.flops(phase="forward") == 2 * 2 * 4 * 4


def test_products_with_vectors_count() -> None:
    with meshwright.audit() as a:
        (torch.ones(3, 5) @ torch.ones(5)) @ torch.ones(3)
    assert a.account.work.flops(kind="matmul") == 2 * 3 * 5 + 2 * 3


@pytest.mark.parametrize("world", [0, -1, "4", 2.5])
def test_a_world_that_is_no_number_of_ranks_is_refused(world: object) -> None:
    with (
        pytest.raises(UserError, match="is not a number of ranks: use 1 or more"),
        meshwright.rehearse(world=world),  # type: ignore[arg-type]
    ):
        pass


def test_meshes_made_in_a_rehearsal_have_real_ranks() -> None:
    with meshwright.rehearse(world=8, rank=5):
        mesh = DeviceMesh("cpu", [[0, 1, 2, 3], [4, 5, 6, 7]], mesh_dim_names=("a", "b"))
        assert mesh.mesh.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert mesh["b"].mesh.tolist() == [4, 5, 6, 7]
        with unset_fake_temporarily():
            assert torch.ones(2).sum().item() == 2
        with pytest.raises(UserError, match="give it a nested list, or use init_device_mesh"):
            DeviceMesh("cpu", torch.arange(8))

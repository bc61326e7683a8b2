"""Ulysses' exchange on real ranks: what arrives is a slice of the whole tensor, to the bit; what is sent is counted."""

import pytest
import ranked_context as ranked
import torch

from meshwright.account import LedgerKey

B, S, D = 2, 8, 3  # S of all ranks together
ITEMSIZE = 8
WORLDS = pytest.mark.parametrize("world", [2, 4])
BATCHES = pytest.mark.parametrize("batch", [1, 2])


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def exchanges(world, phase, *payloads):
    """Rows of exchanges of so many elements each."""
    rows = {}
    for elements in payloads:
        key = LedgerKey("all_to_all", "ulysses", world, phase, ranked.SITE, "float64", elements * ITEMSIZE)
        rows[key] = rows.get(key, 0) + 1
    return rows


@WORLDS
@BATCHES
@pytest.mark.parametrize("heads", [4, 8])
def test_exchange_and_back(ranks, world, batch, heads):
    """Multi-head: two tensors of all heads, there and back."""
    x, y, dx, dy = (randn(batch, S, heads, D, seed=i) for i in range(4))
    elements = batch * S // world * heads * D
    for rank, own in enumerate(ranks(world).run(ranked.exchange, x, y, dx, dy)):
        for whole, inside in zip((x, y), own.inside, strict=True):
            assert torch.equal(inside, whole.chunk(world, 2)[rank])
        assert torch.equal(own.back, x.chunk(world, 1)[rank])
        for whole, gradient in zip((dx, dy), own.outcome.gradients, strict=True):
            assert torch.equal(gradient, whole.chunk(world, 1)[rank])
        both = elements, elements
        assert own.outcome.rows == exchanges(world, "forward", *both) | exchanges(world, "backward", *both)


@WORLDS
@BATCHES
def test_return_trip(ranks, world, batch):
    """`to_sequence` and its gradient."""
    x, dx = randn(batch, S, 4, D), randn(batch, S, 4, D, seed=1)
    elements = batch * S // world * 4 * D
    for rank, own in enumerate(ranks(world).run(ranked.return_trip, x, dx)):
        assert torch.equal(own.outputs[0], x.chunk(world, 1)[rank])
        assert torch.equal(own.gradients[0], dx.chunk(world, 2)[rank])
        assert own.rows == exchanges(world, "forward", elements) | exchanges(world, "backward", elements)


@pytest.mark.parametrize(("world", "heads", "kv_heads"), [(2, 4, 2), (2, 8, 4), (4, 8, 4), (4, 16, 8)])
def test_grouped_heads_that_divide(ranks, world, heads, kv_heads):
    """A rank's query heads stay with the key heads that they share."""
    q, k = randn(B, S, heads, D), randn(B, S, kv_heads, D)
    dq, dk = randn(B, S, heads, D, seed=1), randn(B, S, kv_heads, D, seed=1)
    payloads = [B * S // world * n * D for n in (heads, kv_heads)]
    for rank, own in enumerate(ranks(world).run(ranked.exchange, q, k, dq, dk)):
        group, per_rank = heads // kv_heads, kv_heads // world
        shared = torch.arange(heads).chunk(world)[rank] // group
        assert torch.equal(shared.unique(), rank * per_rank + torch.arange(per_rank))
        for whole, inside in zip((q, k), own.inside, strict=True):
            assert torch.equal(inside, whole.chunk(world, 2)[rank])
        assert torch.equal(own.outcome.gradients[1], dk.chunk(world, 1)[rank])
        assert own.outcome.rows == exchanges(world, "forward", *payloads) | exchanges(world, "backward", *payloads)


@pytest.mark.parametrize(("world", "kv_heads"), [(2, 1), (4, 1), (4, 2)])
@BATCHES
def test_copies_of_few_key_heads(ranks, world, kv_heads, batch):
    """Fewer key heads than ranks: neighbours get copies, whose gradients are added up. Each copy is sent."""
    q, k = randn(batch, S, 4, D), randn(batch, S, kv_heads, D)
    dq, dk = randn(batch, S, 4, D, seed=1), randn(batch, S, world, D, seed=2)
    copies = world // kv_heads
    sums = torch.stack([dk[:, :, i * copies : (i + 1) * copies].sum(2) for i in range(kv_heads)], 2)
    payloads = [batch * S // world * n * D for n in (4, world)]
    for rank, own in enumerate(ranks(world).run(ranked.exchange, q, k, dq, dk)):
        assert torch.equal(own.inside[1], k[:, :, rank // copies : rank // copies + 1])
        expected = sums.chunk(world, 1)[rank]
        assert (own.outcome.gradients[1] - expected).abs().max() <= copies * torch.finfo(torch.float64).eps * 8
        assert own.outcome.rows == exchanges(world, "forward", *payloads) | exchanges(world, "backward", *payloads)


@WORLDS
@BATCHES
def test_elements_sent_are_those_of_the_paper(ranks, world, batch):
    """Section 3.2: 4·N·h/P of which a rank keeps its own P-th; N tokens of all ranks, h features. Again in backward."""
    heads = 4
    problem = ranked.Problem(*(randn(batch, S, heads, D, seed=i) for i in range(4)))
    tokens, features = batch * S, heads * D
    for own in ranks(world).run(ranked.context, problem, 1, world, "zigzag"):
        for phase in ("forward", "backward"):
            exchanged = {key: count for key, count in own.rows.items() if key.phase == phase}
            assert sum(exchanged.values()) == 4
            sent = sum(key.wire_bytes * count for key, count in exchanged.items()) // ITEMSIZE
            assert sent * world**2 == 4 * tokens * features * (world - 1)
        assert {key.operation for key in own.rows} == {"all_to_all"}

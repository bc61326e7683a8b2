"""Recomputation: the same numbers to the bit from what `rerun` keeps, and everything inside done once more."""

import weakref

import pytest
import ranked_tensor as ranked
import torch
from torch import nn

from meshwright.account import Compute, LedgerKey
from meshwright.audit.recorder import Recorder
from meshwright.parallel.recompute import rerun


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def mixed(x, y, scale):
    """Of two inputs with gradients and one without."""
    return (x @ y).tanh() * scale + x.sum(1, keepdim=True).exp()


def inputs():
    x, y, scale = randn(4, 5), randn(5, 3), randn(4, 3)
    return [x.requires_grad_(), y.requires_grad_(), scale]


def gradients_of(result, leaves):
    return torch.autograd.grad(result, leaves, randn(*result.shape, seed=9))


def test_values_and_gradients():
    *leaves, scale = inputs()
    plain, again = mixed(*leaves, scale), rerun(mixed, *leaves, scale)
    assert torch.equal(plain, again)
    for expected, found in zip(gradients_of(plain, leaves), gradients_of(again, leaves), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_gradients_of_those_that_need_them(needed):
    x, y, scale = inputs()
    leaves = [leaf.detach().requires_grad_(n) for leaf, n in zip((x, y), needed, strict=True)]
    learned = [leaf for leaf in leaves if leaf.requires_grad]
    plain, again = mixed(*leaves, scale), rerun(mixed, *leaves, scale)
    again.backward(randn(4, 3, seed=9))
    for leaf, expected in zip(learned, gradients_of(plain, learned), strict=True):
        assert torch.equal(leaf.grad, expected)
    assert [leaf.grad is None for leaf in leaves] == [not n for n in needed]


def test_an_input_may_be_missing():
    def shifted(x, bias):
        return x.square() if bias is None else x.square() + bias

    x = randn(3).requires_grad_()
    again = rerun(shifted, x, None)
    assert torch.equal(again, x.square())
    assert torch.equal(gradients_of(again, [x])[0], gradients_of(x.square(), [x])[0])


def test_an_input_given_twice_gets_both_gradients():
    x = randn(3).requires_grad_()
    (found,) = gradients_of(rerun(torch.mul, x, x), [x])
    assert torch.equal(found, gradients_of(x * x, [x])[0])


def test_only_inputs_are_kept():
    packed = []

    def pack(tensor):
        packed.append(tensor.data_ptr())
        return tensor

    given = inputs()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rerun(mixed, *given)
        assert packed == [x.data_ptr() for x in given]
        packed.clear()
        mixed(*given)
        assert set(packed) - {x.data_ptr() for x in given}, "the function itself keeps more"


def test_the_result_is_not_kept():
    """A storage that only the caller holds goes when he lets go of it: backward needs the graph alone."""
    x = randn(8).requires_grad_()
    result = rerun(torch.exp, x)
    edge, dy = torch.autograd.graph.get_gradient_edge(result), torch.ones_like(result)
    freed = []
    weakref.finalize(result.untyped_storage(), freed.append, True)
    del result
    assert freed
    torch.autograd.backward((edge,), (dy,))
    assert torch.equal(x.grad, x.detach().exp())


def test_parameters_inside_receive_gradients():
    """As often as backward comes by, onto what is there; through a second layer of recomputation too."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, dy = randn(4, 5).requires_grad_(), randn(4, 3, seed=1)
    expected = torch.autograd.grad(module(x), [x, *module.parameters()], dy)

    def nested(x):
        return rerun(module, rerun(lambda x: x.clone(), x))

    for function in (module, nested):
        for leaf in (x, *module.parameters()):
            leaf.grad = None
        for times in (1, 2):
            rerun(function, x).backward(dy)
            for leaf, once in zip((x, *module.parameters()), expected, strict=True):
                assert torch.equal(leaf.grad, times * once)


def test_without_gradients_it_is_a_plain_call():
    calls, given = [], inputs()

    def counted(*tensors):
        calls.append([x is y for x, y in zip(tensors, given, strict=True)])
        return mixed(*tensors)

    with torch.no_grad():
        result = rerun(counted, *given)
    assert calls == [[True, True, True]], "the very tensors, once"
    assert torch.equal(result, mixed(*given)) and not result.requires_grad and result.grad_fn is None


def test_positions_are_an_input_too():
    """Integers have no gradient, and must not be asked for one."""
    x, index = randn(5).requires_grad_(), torch.tensor([4, 0, 0])
    (found,) = gradients_of(rerun(torch.take, x, index), [x])
    assert torch.equal(found, gradients_of(x.take(index), [x])[0])


@pytest.mark.parametrize("frozen", [False, True])
def test_everything_is_computed_once_more(frozen):
    """The product of forward again in phase `recompute`; in `backward` only those of gradients that are needed."""
    x, weight = randn(4, 5).requires_grad_(), randn(5, 3).requires_grad_(not frozen)
    with Recorder() as recorder:
        rerun(torch.mm, x, weight).backward(randn(4, 3))
    products = [e for e in recorder.trace().events if isinstance(e, Compute) and e.kind == "matmul"]
    assert [e.phase for e in products] == ["forward", "recompute", "backward", "backward"][: 3 if frozen else 4]
    assert {e.flops for e in products} == {2 * 4 * 5 * 3}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("split", [False, True])
def test_collectives_inside_happen_again(ranks, world, split):
    B, S, E, F = 2, 8, 8, 12
    problem = randn(B, S, E), randn(F, E), randn(E, F), randn(B, S, E, seed=1)

    def row(operation, phase, count=1):
        return {LedgerKey(operation, "tensor", world, phase, ranked.SITE, "float64", B * S * E * 8): count}

    for plain, again in ranks(world).run(ranked.rerun_pair, *problem, split):
        for expected, found in zip([*plain.outputs, *plain.gradients], [*again.outputs, *again.gradients], strict=True):
            assert torch.equal(found, expected)
        if split:
            forward = row("all_gather", "forward") | row("reduce_scatter", "forward")
            recompute = row("all_gather", "recompute") | row("reduce_scatter", "recompute")
            backward = row("all_gather", "backward", 2) | row("reduce_scatter", "backward")
        else:
            forward, recompute, backward = (row("all_reduce", p) for p in ("forward", "recompute", "backward"))
        assert plain.rows == forward | backward
        assert again.rows == forward | recompute | backward

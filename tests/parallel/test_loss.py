"""The loss in chunks of tokens, on real ranks: values against the whole loss, traffic and memory against the contract.

Problems are whole and, where nothing else is said, float64. Every rank's results are compared.
"""

from collections import Counter

import pytest
import ranked_loss as ranked
import torch
import torch.nn.functional as F
from ranked_loss import HEAD, LOSS, Problem
from reference.precision import error

from meshwright.account import Ledger, LedgerKey
from meshwright.config.tree import Layout, Model, Training
from meshwright.parallel.loss import IGNORE
from meshwright.schemes.loss import ChunkedCrossEntropy, CrossEntropy
from meshwright.schemes.tape import Sizes, Tape

B, S, E = 2, 4, 6
N = B * S
WORLDS = pytest.mark.parametrize(
    ("world", "split"),
    [(1, False), (2, False), (2, True), (4, False), (4, True)],
    ids=["1", "tensor 2", "tensor 2, split", "tensor 4", "tensor 4, split"],
)
CHUNKS = pytest.mark.parametrize("chunk", [1, 4, 5, 100])
"""Of eight tokens: each alone, two chunks, a short last one, more than there are."""
VOCABULARIES = pytest.mark.parametrize("vocab_size", [12, 10, 9, 5])
"""On 4 ranks: even; a last rank that is partly padding; ranks without a column of their own (9 and 5)."""

ROUNDING = 1e-13
"""Relative to the largest element: float64, sums of at most a few dozen terms."""


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def problem_of(vocab_size=10, dloss=0.37, labels="some", seq_len=S):
    """Labels: all, none, some, or none among the first four tokens, which is a chunk of four."""
    found = torch.randint(vocab_size, (B, seq_len), generator=torch.Generator().manual_seed(vocab_size))
    found[0, 0] = found[1, 3] = vocab_size - 1
    missing = {"all": [], "some": [1, 6], "none in a chunk": range(4), "none": range(N)}[labels]
    found.view(-1)[list(missing)] = IGNORE
    h, weight = randn(B, seq_len, E), randn(vocab_size, E)
    return Problem(2 * h, weight, found, torch.tensor(dloss, dtype=torch.float64))


def unsharded(problem):
    """Loss, dh, dw on one device, in the dtype of the problem."""
    h, weight = (x.clone().requires_grad_() for x in problem[:2])
    labels = problem.labels.flatten()
    loss = F.cross_entropy(F.linear(h, weight).flatten(0, 1), labels, reduction="sum", ignore_index=IGNORE)
    return [loss.detach(), *torch.autograd.grad(loss, [h, weight], problem.dloss.to(loss.dtype))]


def assert_equal(found, expected):
    assert found.shape == expected.shape
    assert error(found, expected) <= ROUNDING * expected.abs().max().clamp_min(1e-300)


def together(by_rank, split, vocab_size):
    """Loss, dh and dw of all ranks; the loss, and dh of a region that is whole, are every rank's."""
    for own in by_rank:
        assert torch.equal(own.outputs[0], by_rank[0].outputs[0])
        assert split or torch.equal(own.gradients[0], by_rank[0].gradients[0])
    dh = torch.cat([own.gradients[0] for own in by_rank], 1) if split else by_rank[0].gradients[0]
    dw = torch.cat([own.gradients[1] for own in by_rank])
    assert not dw[vocab_size:].any(), "rows that are padding"
    return [by_rank[0].outputs[0], dh, dw[:vocab_size]]


def assert_loss(by_rank, split, problem):
    found = together(by_rank, split, len(problem.weight))
    for name, ours, expected in zip(("loss", "dh", "dw"), found, unsharded(problem), strict=True):
        assert ours.shape == expected.shape
        assert error(ours, expected) <= ROUNDING * expected.abs().max().clamp_min(1e-300), name


def row(operation, world, phase, site, elements, dtype="float64"):
    itemsize = getattr(torch, dtype).itemsize
    return LedgerKey(operation, "tensor", world, phase, site, dtype, elements * itemsize)


def sizes_of(chunk, num_tokens=N):
    """Tokens of each chunk."""
    return [min(chunk, num_tokens - start) for start in range(0, num_tokens, chunk)]


def sent(world, split, chunk, *, backward=True):
    """Two all-reduces a chunk; the input enters once and leaves once."""
    rows = Counter()
    if world == 1:
        return rows
    for tokens in sizes_of(chunk):
        rows.update(row("all_reduce", world, "forward", LOSS, n * tokens) for n in (1, 2))
    if split:
        rows[row("all_gather", world, "forward", HEAD, N * E)] += 1
    if backward:
        rows[row("reduce_scatter" if split else "all_reduce", world, "backward", HEAD, N * E)] += 1
    return rows


@WORLDS
@CHUNKS
@VOCABULARIES
def test_values_and_traffic(ranks, world, split, chunk, vocab_size):
    problem = problem_of(vocab_size)
    by_rank = ranks(world).run(ranked.chunked, problem, chunk, split, 1e4)  # padding holds 1e4 and never enters
    assert_loss(by_rank, split, problem)
    for own in by_rank:
        assert own.rows == sent(world, split, chunk)


@WORLDS
@CHUNKS
@pytest.mark.parametrize("labels", ["all", "none in a chunk", "none"])
def test_labels(ranks, world, split, chunk, labels):
    problem = problem_of(labels=labels)
    by_rank = ranks(world).run(ranked.chunked, problem, chunk, split)
    assert_loss(by_rank, split, problem)
    for own in by_rank:
        assert own.rows == sent(world, split, chunk), "a chunk without labels sends all the same"
        assert (labels == "none") == (not any(x.any() for x in (*own.outputs, *own.gradients)))


@WORLDS
@pytest.mark.parametrize("dloss", [1.0, 0.0, -2.5, 1 / 4096])
def test_gradient_of_the_loss(ranks, world, split, dloss):
    problem = problem_of(dloss=dloss)
    assert_loss(ranks(world).run(ranked.chunked, problem, 3, split), split, problem)


@WORLDS
@CHUNKS
def test_the_whole_loss(ranks, world, split, chunk):
    """Ours of logits that all exist: the same numbers on every rank, and in one chunk the same calls."""
    problem, pool = problem_of(9), ranks(world)
    ours, theirs = (pool.run(ranked.chunked, problem, chunk, split), pool.run(ranked.whole, problem, split))
    for own, other in zip(ours, theirs, strict=True):
        for found, expected in zip([*own.outputs, *own.gradients], [*other.outputs, *other.gradients], strict=True):
            assert_equal(found, expected)
        if chunk >= N:
            again = Counter({row("all_gather", world, "backward", HEAD, N * E): int(split)})  # whole, it is not kept
            assert Counter(own.rows) + again == Counter(other.rows)


@WORLDS
@pytest.mark.parametrize("chunk", [3, 1000])
def test_bf16_within_twice_plain_pytorch(ranks, world, split, chunk):
    """Activations in bf16, weights and their gradients in float32."""
    seq_len = 64
    problem = problem_of(40, dloss=1 / 7, seq_len=seq_len)
    h, weight = problem.h.bfloat16(), problem.weight.bfloat16()
    exact = unsharded(problem._replace(h=h.double(), weight=weight.double()))
    plain = unsharded(problem._replace(h=h, weight=weight))
    by_rank = ranks(world).run(ranked.chunked, problem._replace(h=h, weight=weight.float()), chunk, split)
    ours = together(by_rank, split, 40)
    assert [x.dtype for x in ours] == [torch.float64, torch.bfloat16, torch.float32]
    for name, found, same_precision, expected in zip(("loss", "dh", "dw"), ours, plain, exact, strict=True):
        allowed = 2 * error(same_precision.double(), expected) + torch.finfo(torch.bfloat16).eps * expected.abs().max()
        assert error(found.double(), expected) <= allowed, name
    if world > 1:
        operation = "reduce_scatter" if split else "all_reduce"
        for own in by_rank:
            assert own.rows[row(operation, world, "backward", HEAD, B * seq_len * E, "bfloat16")] == 1
            losses = {key: count for key, count in own.rows.items() if key.site == LOSS}
            assert {key.dtype for key in losses} == {"float32"}
            assert sum(losses.values()) == 2 * len(sizes_of(chunk, B * seq_len))


def test_sums_over_chunks_are_float32(ranks):
    """128 equal terms of one sign, of which only dlogits and each chunk's product are rounded to bf16."""
    h, weight, labels = torch.ones(2, 64, E), torch.zeros(40, E), torch.zeros(2, 64, dtype=torch.int64)
    problem = Problem(h.bfloat16(), weight, labels, torch.ones((), dtype=torch.float64))
    expected = torch.full((40, E), 128 / 40)
    expected[0] -= 128
    for chunk in (1, 3):
        (own,) = ranks(1).run(ranked.chunked, problem, chunk, False)
        assert ((own.gradients[1] - expected).abs() <= torch.finfo(torch.bfloat16).eps * expected.abs()).all()


@WORLDS
@CHUNKS
def test_without_gradients_only_the_loss_is_computed(ranks, world, split, chunk):
    problem = problem_of()
    columns = -(-10 // world)
    for own in ranks(world).run(ranked.evaluated, problem, chunk, split):
        assert_equal(own.loss, unsharded(problem)[0])
        assert not own.loss.requires_grad
        assert own.rows == sent(world, split, chunk, backward=False)
        assert [(event.phase, event.flops) for event in own.matmuls] == [
            ("forward", 2 * tokens * E * columns) for tokens in sizes_of(chunk)
        ]


@WORLDS
@CHUNKS
def test_no_product_is_computed_twice(ranks, world, split, chunk):
    """One product for the logits and one for each gradient, of each chunk: as many FLOPs as of the whole."""
    for forward, backward in ranks(world).run(ranked.products, problem_of(), chunk, split):
        columns = -(-10 // world)
        one = [2 * tokens * E * columns for tokens in sizes_of(chunk)]
        assert forward == one
        assert backward == [flops for flops in one for _ in range(2)]


# --- memory -----------------------------------------------------------------------------------------------------------

MODEL = Model(layers=1, d_model=2, d_ff=4, heads=2, kv_heads=2, head_dim=2, vocab_size=64)
TOKENS = 32
"""In two sequences, of few features: logits [32, 64] are by far the largest."""


def long_problem():
    labels = torch.randint(64, (2, TOKENS // 2), generator=torch.Generator().manual_seed(1))
    labels[0, ::5] = IGNORE
    one = torch.ones((), dtype=torch.float64)
    return Problem(randn(2, TOKENS // 2, 2).float(), randn(64, 2).float(), labels, one)


def by_formula(world, split, chunk):
    """What `schemes.loss` says, forward and backward."""
    layout = Layout(tensor=world, sequence_parallel=split)
    training = Training(batch=2, seq_len=TOKENS // 2, precision="float32", device="cpu", loss_chunk=chunk)
    sizes, tape = Sizes.of(MODEL, layout, training), Tape()
    loss = ChunkedCrossEntropy(sizes) if chunk else CrossEntropy(sizes, TOKENS)
    if not chunk:
        tape.alloc(loss.logits_bytes + TOKENS * 8, "logits")  # the head's output; the labels, which are kept
    for phase, run in (("forward", loss.forward), ("backward", loss.backward)):
        with tape.at(LOSS, phase):
            run(tape)
    return tape.trace()


@WORLDS
def test_logits_never_exist_whole(ranks, world, split):
    """The largest storage of the loss is a chunk's logits; its peak is what `schemes.loss` says, to the byte."""
    found = {c: ranks(world).run(ranked.logits, long_problem(), c, split) for c in (0, 4, 5, 16, 1000)}
    row_bytes = 4 * 64 // world
    for chunk, by_rank in found.items():
        largest = min(chunk or TOKENS, TOKENS) * row_bytes
        kept = [2 * row_bytes, 4 * TOKENS * 2] if chunk else []  # dw [V/T, 2] and dh [N, 2]
        for own in by_rank:
            assert own.largest == max(largest, *kept, 0)
            assert own.peak == ranked.Logits.of(by_formula(world, split, chunk)).peak
    peaks = [found[chunk][0].peak for chunk in (4, 5, 16, 1000)]
    assert peaks == sorted(peaks)
    assert found[16][0].peak < found[0][0].peak < found[1000][0].peak, "one chunk of all saves nothing"
    assert found[0][0].peak - found[4][0].peak > (TOKENS - 4) * row_bytes


@pytest.mark.parametrize("chunk", [4, 5, 1000])
def test_without_gradients_nothing_is_kept(ranks, chunk):
    """Evaluation holds the sum, and of each chunk what the whole loss of so many tokens does; no dh, no dw."""
    (own,) = ranks(1).run(ranked.evaluated, long_problem(), chunk, False)
    training = Training(batch=2, seq_len=TOKENS // 2, precision="float32", device="cpu")
    loss, tape = CrossEntropy(Sizes.of(MODEL, Layout(), training), min(chunk, TOKENS)), Tape()
    tape.alloc(8 + loss.logits_bytes, "logits")
    loss.forward(tape)
    assert own.logits_peak == ranked.Logits.of(tape.trace()).peak


def test_ledger_by_formula():
    """Counts that tests above find in runs, from `schemes.loss`: two calls a chunk of 5 of 32 tokens."""
    rows = Ledger.of(by_formula(2, True, 5)).rows
    in_chunks = {key.payload_bytes: count for key, count in rows.items() if key.operation == "all_reduce"}
    assert in_chunks == {4 * 5: 6, 4 * 10: 6, 4 * 2: 1, 4 * 4: 1}

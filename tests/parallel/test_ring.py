"""Ring attention on real ranks: values against unsharded attention and torch's ring, messages against the contract.

Problems are whole and, where nothing else is said, float64. Every rank's results and ledger are compared.
"""

import importlib

import pytest
import ranked_context as ranked
import torch
import torch.nn.functional as F
from ranked_context import KERNEL, Problem, joined, plain_attention
from reference.precision import error

from meshwright.account import LedgerKey
from meshwright.parallel import ring
from meshwright.schemes.ring import Block, Schedule, Step

B, D = 2, 4
CHUNK = 3
ORDERS = pytest.mark.parametrize("order", ["contiguous", "zigzag"])
HEADS = pytest.mark.parametrize(
    ("heads", "kv_heads"),
    [pytest.param(2, 2, id="multi-head"), pytest.param(4, 2, id="grouped"), pytest.param(3, 1, id="one-kv-head")],
)

ROUNDING = 1e-13
"""Relative to the largest element: float64, sums of at most a few dozen terms."""

NAMES = "out", "dq", "dk", "dv"


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def problem_of(seq_len, heads=2, kv_heads=2, batch=B, head_dim=D):
    """Scores of a few units either way: softmax is far from uniform."""
    widths = heads, kv_heads, kv_heads, heads
    q, k, v, dout = (randn(batch, seq_len, n, head_dim, seed=i) for i, n in enumerate(widths))
    return Problem(2 * q, 2 * k, v, dout)


def unsharded(problem, attention=plain_attention):
    """out, dq, dk, dv on one device."""
    leaves = [x.clone().requires_grad_() for x in problem[:3]]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, problem.dout)]


def assert_equal(found, expected, tolerance=ROUNDING):
    assert found.shape == expected.shape
    assert error(found, expected) <= tolerance * expected.abs().max()


def assert_attention(by_rank, positions, problem):
    """The outcomes of all ranks, together, are unsharded attention."""
    expected = dict(zip(NAMES, unsharded(problem), strict=True))
    for i, name in enumerate(NAMES):
        parts = [[*own.outputs, *own.gradients][i] for own in by_rank]
        assert error(joined(parts, positions), expected[name]) <= ROUNDING * expected[name].abs().max(), name


def run(ranks, world, function, *arguments):
    """On a pool, or right here: a ring of one needs no group."""
    return [function(*arguments)] if world == 1 else ranks(world).run(function, *arguments)


def messages(world, phase, elements, dtype, count):
    itemsize = getattr(torch, dtype).itemsize
    key = LedgerKey("shift", "ring", world, phase, ranked.SITE, dtype, elements * itemsize)
    return {key: count} if world > 1 else {}


def chunks_of(order):
    return 1 if order == "contiguous" else 2


# --- values and messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@ORDERS
@HEADS
def test_values_and_messages(ranks, world, order, heads, kv_heads):
    """k and v make P-1 hops each way, dk and dv P hops: all in float64 here."""
    local = CHUNK * chunks_of(order)
    problem = problem_of(world * local, heads, kv_heads)
    by_rank = run(ranks, world, ranked.ring, problem, order)
    assert_attention(by_rank, ranked.ring_positions(world, order, world * local), problem)
    elements = B * local * kv_heads * D
    for own in by_rank:
        forward = messages(world, "forward", elements, "float64", 2 * (world - 1))
        assert own.rows == forward | messages(world, "backward", elements, "float64", 2 * (world - 1) + 2 * world)


@pytest.mark.parametrize("batch", [1, 3])
def test_other_batches(ranks, batch):
    problem = problem_of(2 * 2 * CHUNK, batch=batch)
    positions = ranked.ring_positions(2, "zigzag", 2 * 2 * CHUNK)
    assert_attention(ranks(2).run(ranked.ring, problem, "zigzag"), positions, problem)


@ORDERS
@HEADS
def test_bf16_within_twice_plain_pytorch(ranks, order, heads, kv_heads):
    """Against scaled_dot_product_attention in bf16; sums of gradients travel in float32.

    Beyond the rule: each of at most P blocks rounds its share of an element to bf16, half a unit of the last place of
    what a share can be, before they are added in float32. P = 4 halves are two units.
    """
    world, local = 4, 8 * chunks_of(order)
    problem = problem_of(world * local, heads, kv_heads, head_dim=8).to(torch.bfloat16)

    def same_precision(q, k, v):
        k, v = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    exact, plain = unsharded(problem.to(torch.float64)), unsharded(problem, same_precision)
    by_rank = ranks(world).run(ranked.ring, problem, order)
    positions = ranked.ring_positions(world, order, world * local)
    for i, name in enumerate(NAMES):
        found = joined([[*own.outputs, *own.gradients][i] for own in by_rank], positions)
        assert found.dtype == torch.bfloat16
        shares = world / 2 * torch.finfo(torch.bfloat16).eps * exact[i].abs().max()
        assert error(found.double(), exact[i]) <= 2 * error(plain[i].double(), exact[i]) + shares, name
    elements = B * local * kv_heads * 8
    for own in by_rank:
        assert own.rows == (
            messages(world, "forward", elements, "bfloat16", 2 * (world - 1))
            | messages(world, "backward", elements, "bfloat16", 2 * (world - 1))
            | messages(world, "backward", elements, "float32", 2 * world)
        )


# --- schedules made by hand -------------------------------------------------------------------------------------------


def singles(ours, theirs):
    """A block for each pair of chunks that the mask allows, last first: rows of early chunks wait for their turn."""
    return tuple(
        Block(i, i + 1, j, j + 1, query == key)
        for i, query in reversed(list(enumerate(ours)))
        for j, key in enumerate(theirs)
        if query >= key
    )


def planned(chunks, holders, blocks=singles):
    """Schedules of ranks that hold keys by `holders`: the source, for each step and rank.

    A hop takes what a rank holds to whoever holds it next, the last hop takes it home.
    """
    size = len(chunks)
    next_holders = [*holders[1:], range(size)]

    def step(now, then, rank):
        source = now[rank]
        return Step(source, blocks(chunks[rank], chunks[source]), list(then).index(source), now.index(then[rank]))

    return [
        Schedule(rank, size, chunks, tuple(step(*pair, rank) for pair in zip(holders, next_holders, strict=True)))
        for rank in range(size)
    ]


BACKWARDS = [0, 1, 2], [1, 2, 0], [2, 0, 1]
ZIGZAG = (0, 5), (1, 4), (2, 3)


def split_diagonal(ours, theirs):
    """The own block in three pieces of which the first leaves the rows of the early chunk empty; else zigzag's."""
    if ours == theirs:
        return Block(1, 2, 0, 1, False), Block(1, 2, 1, 2, True), Block(0, 1, 0, 1, True)
    return (Block(0, 2, 0, 1, False),) if theirs < ours else (Block(1, 2, 0, 2, False),)


def whole_diagonal(ours, theirs):
    return (Block(0, 2, 0, 2, True),) if ours == theirs else split_diagonal(ours, theirs)


BY_HAND = {
    "backwards": planned(ZIGZAG, BACKWARDS, whole_diagonal),
    "split-diagonal": planned(ZIGZAG, BACKWARDS, split_diagonal),
    "one-block-a-pair": planned(((0, 1), (2, 3), (4, 5)), BACKWARDS),
    "chunks-in-no-order": planned(((3, 0), (5, 1), (4, 2)), BACKWARDS),
    "three-chunks-a-rank": planned(((0, 5, 7), (8, 1, 3), (2, 4, 6)), BACKWARDS),
    "pairs-exchange": planned(
        ((7, 0), (1, 6), (5, 2), (4, 3)), ([0, 1, 2, 3], [1, 0, 3, 2], [3, 2, 1, 0], [2, 3, 0, 1])
    ),
    "changing-hops": planned(
        ((0, 7), (1, 6), (2, 5), (3, 4)), ([0, 1, 2, 3], [3, 0, 1, 2], [1, 2, 3, 0], [2, 3, 0, 1])
    ),
}
"""Keys that go another way, and blocks whose rows have seen nothing before."""


def test_schedules_by_hand_are_what_they_claim():
    backwards = BY_HAND["backwards"][1]
    assert [(step.source, step.send_to, step.receive_from) for step in backwards.steps] == [
        (1, 0, 2),
        (2, 0, 2),
        (0, 0, 2),
    ]
    exchange = BY_HAND["pairs-exchange"][0]
    assert [(s.source, s.send_to, s.receive_from) for s in exchange.steps] == [
        (0, 1, 1),
        (1, 2, 2),
        (3, 1, 1),
        (2, 2, 2),
    ]
    assert [step.send_to for step in BY_HAND["changing-hops"][0].steps] == [1, 2, 3, 2]
    first = BY_HAND["one-block-a-pair"][0].steps[0].blocks[0]
    assert first.first_query == 1, "the rows of the early chunk are empty still"


@pytest.mark.parametrize("name", BY_HAND)
@HEADS
def test_schedules_by_hand(ranks, name, heads, kv_heads):
    plans = BY_HAND[name]
    world, num_chunks = len(plans), sum(map(len, plans[0].chunks))
    problem = problem_of(num_chunks * CHUNK, heads, kv_heads)
    by_rank = ranks(world).run(ranked.by_hand, problem, plans)
    assert_attention(by_rank, ranked.planned_positions(plans, num_chunks * CHUNK), problem)


# --- order in time ----------------------------------------------------------------------------------------------------

POST, WAIT = ["post", "post"], ["wait", "wait"]  # k and v, or dk and dv


def test_course_of_a_ring_of_three(ranks):
    """Messages leave before the computation that hides them, and are waited for after it.

    Zigzag has one block a step on every rank: all ranks do the same in the same order.
    """
    for course in ranks(3).run(ranked.courses, problem_of(3 * 2 * CHUNK), "zigzag"):
        assert [moment.word for moment in course["forward"]] == [
            *(*POST, "attend", *WAIT),  # the first block covers all rows: there is nothing to merge with
            *(*POST, "attend", "add", *WAIT),
            *("attend", "add"),
        ]
        assert [moment.word for moment in course["backward"]] == [
            *(*POST, "attend", *WAIT, *POST),  # keys and, once they are there, the first gradients behind them
            *(*POST, "attend", "add", *WAIT, *WAIT, "add", *POST),  # add: to dq; to the sums that arrived
            *("attend", "add", *WAIT, "add", *POST),  # the keys stay
            *WAIT,  # the gradients are home
        ]
        assert [m.message for m in course["backward"] if m.word == "wait"] == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9]


def hidden_by(course):
    """For each hop of two messages, in the order in which they are posted: blocks computed until it is waited for."""
    num_hops = sum(moment.word == "post" for moment in course) // 2
    hops = []
    for first in range(0, 2 * num_hops, 2):
        both_posted, one_waited = course.index(("post", first + 1)), course.index(("wait", first))
        assert course[both_posted - 1] == ("post", first) and course[one_waited + 1] == ("wait", first + 1)
        hops.append(sum(moment.word == "attend" for moment in course[both_posted:one_waited]))
    return hops


@pytest.mark.parametrize("world", [3, 4])
@ORDERS
def test_blocks_between_post_and_wait(ranks, world, order):
    """A hop of the keys is under its own step's block, one of gradients under the next step's: the last under none.

    Zigzag has a block at every step; contiguous rank r has none after step r.
    """
    by_rank = ranks(world).run(ranked.courses, problem_of(world * chunks_of(order) * CHUNK), order)
    for rank, course in enumerate(by_rank):
        blocks = [1] * world if order == "zigzag" else [int(step <= rank) for step in range(world)]
        assert hidden_by(course["forward"]) == blocks[:-1]
        keys, gradients = blocks[:-1], [*blocks[1:], 0]
        in_turn = [n for step in zip(keys, gradients, strict=False) for n in step]
        assert hidden_by(course["backward"]) == [*in_turn, gradients[-1]]


# --- merging ----------------------------------------------------------------------------------------------------------

ROWS = 6  # of two chunks of 3
ALL, LATE = Block(0, 2, 0, 2, False), Block(1, 2, 0, 2, False)


def visible(seed, *hidden_rows):
    """[6, 6] of a block: at random, but these rows see nothing."""
    mask = torch.rand(ROWS, ROWS, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:, 0] = True
    mask[list(hidden_rows)] = False
    return mask


NOTHING = torch.zeros(ROWS, ROWS, dtype=torch.bool)
SHOWN = {
    "one-block": [(ALL, visible(1))],
    "all-see-all": [(ALL, visible(1)), (ALL, visible(2)), (ALL, visible(3))],
    "first-shows-some-rows-nothing": [(ALL, visible(1, 0, 4)), (ALL, visible(2, 1)), (ALL, visible(3))],
    "first-shows-nothing": [(ALL, NOTHING), (ALL, visible(2)), (ALL, visible(3))],
    "nothing-and-nothing": [(ALL, NOTHING), (ALL, NOTHING), (ALL, visible(3))],
    "later-ones-show-nothing": [(ALL, visible(1)), (ALL, NOTHING), (ALL, visible(3, 2, 3))],
    "begins-with-late-rows": [(LATE, visible(1)), (ALL, visible(2)), (LATE, visible(3))],
    "late-rows-see-nothing-at-first": [(LATE, NOTHING), (LATE, visible(2, 5)), (ALL, visible(3))],
    "some-rows-never-see": [(LATE, visible(1)), (ALL, visible(2, 1, 4)), (LATE, visible(3, 4))],
    "no-row-ever-sees": [(ALL, NOTHING), (LATE, NOTHING)],
}
"""Blocks in the order in which they are attended, and what each shows to the whole local sequence."""


def masked_block(q, k, v, mask):
    """Output and log-sum-exp of one block: a row that sees nothing has 0 and -inf."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).double().masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.double()), lse


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filled_rows", [0, 2])
def test_merged(monkeypatch, name, dtype, filled_rows):
    """Blocks one after the other are the softmax over all keys at once; no NaN where a row has seen none.

    A kernel may fill up the rows of its log-sum-exp: with NaN here, which must not be read.
    """
    H, shown = 2, SHOWN[name]
    q, keys, values = randn(B, ROWS, H, D), randn(B, len(shown) * ROWS, H, D), randn(B, len(shown) * ROWS, H, D, seed=1)
    q, keys, values = (x.to(dtype) for x in (4 * q, keys, values))
    masks = iter([mask for _, mask in shown])
    accumulated = torch.promote_types(dtype, torch.float32)

    def block_of(q, k, v, kernel, *, causal, visible):
        out, lse = masked_block(q, k, v, next(masks)[ROWS - q.shape[1] :])
        return out.to(dtype), F.pad(lse.to(accumulated), (0, filled_rows), value=torch.nan), ()

    monkeypatch.setattr(ring, "attention_forward", block_of)
    merged = ring._Merged(q, ring._Blocks(Schedule(0, 1, ((0, 1),), ()), q.shape[1], None), KERNEL)
    for (block, _), *held in zip(shown, keys.split(ROWS, 1), values.split(ROWS, 1), strict=True):
        merged.attend(Step(0, (block,), 0, 0), tuple(held))
    out, lse, _ = merged.result()

    seen = torch.cat([mask & (torch.arange(ROWS) >= 3 * block.first_query).unsqueeze(1) for block, mask in shown], 1)
    expected_out, expected_lse = masked_block(q, keys, values, seen)
    finite = expected_lse.isfinite()
    assert finite.all() != (name in ("some-rows-never-see", "no-row-ever-sees"))
    assert (out.dtype, lse.dtype) == (dtype, accumulated)
    assert (lse[~finite] == -torch.inf).all()
    assert not out[:, ~seen.any(1)].any()
    # Each merge takes the exponential of a difference of log-sum-exps; a block's output and the result are rounded.
    merging = len(shown) * (1 + expected_lse.where(finite, 0).abs().max()) * torch.finfo(accumulated).eps
    assert error(lse.where(finite, 0).double(), expected_lse.where(finite, 0)) <= merging
    allowed = (merging + 2 * torch.finfo(dtype).eps) * values.double().abs().max()
    assert error(out.double(), expected_out) <= allowed


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [3, 4])
@ORDERS
def test_memory_is_linear_in_the_local_sequence(ranks, world, order):
    """Twice the sequence, twice the bytes, to the byte: there is nothing of the size of the scores."""
    for short, *longer in ranks(world).run(ranked.footprints, [16, 32, 64], order):
        for factor, other in zip([2, 4], longer, strict=True):
            assert other.bytes == {category: factor * nbytes for category, nbytes in short.bytes.items()}
        assert short.bytes["saved_activations"] == 4 * 16 * (4 * 2 * 4 + 2), "q, k, v, out [16, 2, 4] and lse [2, 16]"


def test_memory_does_not_grow_with_the_ring(ranks):
    peaks = [max(own.peak for (own,) in ranks(world).run(ranked.footprints, [16], "zigzag")) for world in (3, 4)]
    assert peaks[0] == peaks[1]


# --- torch's ring attention -------------------------------------------------------------------------------------------

THEIRS = "torch.distributed.tensor.experimental._context_parallel"


@pytest.fixture
def _template():
    try:
        attention = importlib.import_module(THEIRS + "._attention")
    except ImportError:
        attention = None
    if not hasattr(attention, "_templated_ring_attention_backward"):
        pytest.skip(f"this torch has no {THEIRS}")


@pytest.mark.usefixtures("_template")
@pytest.mark.parametrize("world", [2, 4])
@ORDERS
def test_torch_ring_attention(ranks, world, order):
    """Output and gradients of each rank, by torch's template over the same kernel."""
    problem = problem_of(world * 2 * CHUNK)
    ours = ranks(world).run(ranked.ring, problem, order)
    for theirs, own in zip(ranks(world).run(ranked.oracle, problem, order == "zigzag"), ours, strict=True):
        for expected, found in zip(theirs, [*own.outputs, *own.gradients], strict=True):
            assert_equal(found, expected)


@pytest.mark.usefixtures("_template")
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_zigzag_is_torch_head_and_tail(world):
    seq_len = world * 2 * CHUNK
    positions = ranked.ring_positions(world, "zigzag", seq_len)
    assert torch.equal(torch.cat(positions), ranked.oracle_order(world, seq_len))

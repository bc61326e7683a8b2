"""Collective matmul on real ranks: against the unsharded operation and torch's fused ones; its traffic and its order.

Problems are float64 and whole; `ranked_matmul` cuts them. S is the whole sequence, of which a rank has S/T outside a
region that is split. 6 positions a rank do not divide into 4 pieces, 12 not into 5.
"""

import pytest
import ranked_matmul as ranked
import torch
import torch.nn.functional as F
from ranked_matmul import Shape
from ranked_tensor import SITE
from reference.precision import error
from reference.unsharded import ROUNDING, assert_equal, randn, unsharded

from meshwright.account import LedgerKey
from meshwright.schemes.tape import Pipeline

E, FEATURES, S_OF_A_RANK = 24, 36, 6
WORLDS = pytest.mark.parametrize("world", [2, 3, 4])
BATCHES = pytest.mark.parametrize("batch", [1, 2])
SPLITS = pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])

PIPELINES = pytest.mark.parametrize(
    "pipeline",
    [
        Pipeline(1),
        Pipeline(3),
        Pipeline(4, "bidirectional"),
        Pipeline(5, "bidirectional"),
        Pipeline(99),
    ],
    ids=lambda p: f"{p.chunks} {p.ring}",
)
"""Uncut; even or not; both ways; more pieces than rows."""


def joined(by_rank, dim):
    return torch.cat(by_rank, dim)


def sums(world, elements, pipeline, phase, width=E):
    """Rows of slice by slice sums of so many elements, `width` a row."""
    return rows_of("all_reduce", world, phase, elements // width, pipeline, width)


def hops(world, elements, pipeline, phase, width=E, rings=1):
    """Rows of a ring that brings parts of so many elements to every rank."""
    return rows_of("shift", world, phase, elements // width, pipeline, width, rings * (world - 1))


def rows_of(operation, world, phase, num_rows, pipeline, width, times=1, dtype="float64", itemsize=8):
    """Literally: k pieces whose ends are at i·rows/k, rounded down."""
    k = min(pipeline.chunks, num_rows)
    rows = {}
    for i in range(k):
        payload = ((i + 1) * num_rows // k - i * num_rows // k) * width * itemsize
        key = LedgerKey(operation, "tensor", world, phase, SITE, dtype, payload)
        rows[key] = rows.get(key, 0) + times
    return rows


def sent_bytes(rows, phase):
    return sum(key.wire_bytes * count for key, count in rows.items() if key.phase == phase)


# --- the layers of parallel.tensor ------------------------------------------------------------------------------------


@WORLDS
@BATCHES
@SPLITS
@PIPELINES
def test_column_linear(ranks, world, batch, split, pipeline):
    S, widths = S_OF_A_RANK * world, (FEATURES, 12)
    x, weights = randn(batch, S, E), [randn(w, E) for w in widths]
    biases, dys = [randn(w, seed=2) for w in widths], [randn(batch, S, w, seed=1) for w in widths]
    ys, (dx, *dps) = unsharded(
        lambda x, *p: [F.linear(x, p[i], p[2 + i]) for i in range(2)], [x, *weights, *biases], dys
    )
    by_rank = ranks(world).run(ranked.column, Shape(split, pipeline), x, weights, biases, dys)
    for i, y in enumerate(ys):
        assert_equal(joined([own.outputs[i] for own in by_rank], -1), y)
    for i, dp in enumerate(dps, start=1):
        assert_equal(joined([own.gradients[i] for own in by_rank], 0), dp)
    if split:
        assert_equal(joined([own.gradients[0] for own in by_rank], 1), dx)
        part = batch * S_OF_A_RANK * E
        expected = hops(world, part, pipeline, "forward") | hops(world, part, pipeline, "backward", rings=2)
    else:
        expected = sums(world, batch * S * E, pipeline, "backward")
    for own in by_rank:
        assert split or error(own.gradients[0], dx) <= ROUNDING * dx.abs().max()
        assert own.rows == expected


@WORLDS
@BATCHES
@SPLITS
@PIPELINES
def test_row_linear(ranks, world, batch, split, pipeline):
    S = S_OF_A_RANK * world
    x, weight, bias = randn(batch, S, FEATURES), randn(E, FEATURES), randn(E, seed=2)
    dy = randn(batch, S, E, seed=1)
    (y,), (dx, dw, db) = unsharded(lambda *p: [F.linear(*p)], [x, weight, bias], [dy])
    by_rank = ranks(world).run(ranked.row, Shape(split, pipeline), x, weight, [bias], dy)
    assert_equal(joined([own.gradients[0] for own in by_rank], -1), dx)
    assert_equal(joined([own.gradients[1] for own in by_rank], 1), dw)
    if split:
        part = batch * S_OF_A_RANK * E
        assert_equal(joined([own.outputs[0] for own in by_rank], 1), y)
        assert_equal(sum(own.gradients[2] for own in by_rank), db)
        expected = hops(world, part, pipeline, "forward") | hops(world, part, pipeline, "backward")
    else:
        expected = sums(world, batch * S * E, pipeline, "forward")
        for own in by_rank:
            assert_equal(own.outputs[0], y)
            assert_equal(own.gradients[2], db)
    for own in by_rank:
        assert own.rows == expected


@WORLDS
@SPLITS
def test_without_bias_and_with_one_weight(ranks, world, split):
    S, shape = S_OF_A_RANK * world, Shape(split, Pipeline(2, "bidirectional"))
    x, up, down = randn(1, S, E), randn(FEATURES, E), randn(E, FEATURES)
    h, dh, dy = randn(1, S, FEATURES), randn(1, S, FEATURES, seed=1), randn(1, S, E, seed=1)
    (y,), (dx, dw) = unsharded(lambda *p: [F.linear(*p)], [x, up], [dh])
    column = ranks(world).run(ranked.column, shape, x, [up], [], [dh])
    assert_equal(joined([own.outputs[0] for own in column], -1), y)
    assert_equal(joined([own.gradients[1] for own in column], 0), dw)
    (y,), (dx, dw) = unsharded(lambda *p: [F.linear(*p)], [h, down], [dy])
    row = ranks(world).run(ranked.row, shape, h, down, [], dy)
    assert_equal(joined([own.gradients[0] for own in row], -1), dx)
    assert_equal(joined([own.gradients[1] for own in row], 1), dw)


@WORLDS
@BATCHES
@SPLITS
@PIPELINES
def test_wire_bytes_are_those_of_the_uncut_layer(ranks, world, batch, split, pipeline):
    """To the byte where a sum's slices divide by the ranks; each that does not is rounded up by less than a byte."""
    S = S_OF_A_RANK * world
    x, up, h = randn(batch, S, E), randn(FEATURES, E), randn(batch, S, FEATURES)
    down, dy = randn(E, FEATURES), randn(batch, S, E, seed=1)
    for function, arguments in ((ranked.column, (x, [up], [], [h])), (ranked.row, (h, down, [], dy))):
        cut, uncut = (
            ranks(world).run(function, Shape(split, cutting), *arguments)[0].rows for cutting in (pipeline, None)
        )
        assert cut.keys() != uncut.keys() or (pipeline.chunks == 1 and not split)
        for phase in ("forward", "backward"):
            whole = sent_bytes(uncut, phase)
            assert whole <= sent_bytes(cut, phase) <= whole + sum(cut.values())


# --- activations that are split along their features ------------------------------------------------------------------


@WORLDS
@PIPELINES
def test_gather_columns_matmul(ranks, world, pipeline):
    N = 13  # every rank has all rows: they need not divide
    x, weight, dy = randn(N, E), randn(FEATURES, E), randn(N, FEATURES, seed=1)
    (y,), (dx, dw) = unsharded(lambda x, w: [x @ w.T], [x, weight], [dy])
    by_rank = ranks(world).run(ranked.gather_columns, pipeline, x, weight, dy)
    assert_equal(joined([own.outputs[0] for own in by_rank], 1), y)
    assert_equal(joined([own.gradients[0] for own in by_rank], 1), dx)
    assert_equal(joined([own.gradients[1] for own in by_rank], 0), dw)
    width = E // world
    expected = hops(world, N * width, pipeline, "forward", width)
    for own in by_rank:
        assert own.rows == expected | hops(world, N * width, pipeline, "backward", width, rings=2)


@WORLDS
@PIPELINES
def test_matmul_scatter_columns(ranks, world, pipeline):
    N = 13
    x, weight, dy = randn(N, FEATURES), randn(E, FEATURES), randn(N, E, seed=1)
    (y,), (dx, dw) = unsharded(lambda x, w: [x @ w.T], [x, weight], [dy])
    by_rank = ranks(world).run(ranked.scatter_columns, pipeline, x, weight, dy)
    assert_equal(joined([own.outputs[0] for own in by_rank], 1), y)
    assert_equal(joined([own.gradients[0] for own in by_rank], 1), dx)
    assert_equal(joined([own.gradients[1] for own in by_rank], 1), dw)
    width = E // world
    expected = hops(world, N * width, pipeline, "forward", width) | hops(world, N * width, pipeline, "backward", width)
    for own in by_rank:
        assert own.rows == expected


def test_one_rank_sends_nothing():
    from meshwright.audit.recorder import Recorder
    from meshwright.comm.collectives import Axis
    from meshwright.parallel.matmul_columns import gather_columns_matmul, matmul_scatter_columns

    x, weight, dy = randn(5, E), randn(FEATURES, E), randn(5, FEATURES, seed=1)
    (y,), gradients = unsharded(lambda x, w: [x @ w.T], [x, weight], [dy])
    for function in (gather_columns_matmul, matmul_scatter_columns):
        with Recorder() as recorder:
            found = unsharded(
                lambda x, w, function=function: [function(x, w, Axis("tensor"), Pipeline(2), SITE)], [x, weight], [dy]
            )
        for ours, plain in zip((*found[0], *found[1]), (y, *gradients), strict=True):
            assert_equal(ours, plain)
        assert not any(hasattr(event, "ticket") for event in recorder.trace().expanded())


# --- precision --------------------------------------------------------------------------------------------------------


@SPLITS
@pytest.mark.parametrize("kind", ["column", "row", "gather columns", "scatter columns"])
def test_bf16_within_twice_plain_pytorch(ranks, kind, split):
    """Activations in bf16, weights and their gradients in float32; half the bytes on the wire.

    Beyond the rule, one unit in the last place: the two terms of a sum over the ranks are each rounded before it.
    """
    world, batch, S = 2, 2, 8
    into, out = (E, 64) if kind in ("column", "gather columns") else (64, E)
    x, weight, dy = (t.bfloat16() for t in (randn(batch, S, into), randn(out, into), randn(batch, S, out, seed=1)))

    def results(*whole):
        (y,), gradients = unsharded(lambda *p: [F.linear(*p)], whole[:2], whole[2:])
        return [t.double() for t in (y, *gradients)]

    exact, plain = results(x.double(), weight.double(), dy.double()), results(x, weight, dy)
    shape, pipeline, whole = Shape(split, Pipeline(3)), Pipeline(3), (batch, S, -1)
    outside = 1 if split else None
    if kind == "column":
        by_rank = ranks(world).run(ranked.column, shape, x, [weight.float()], [], [dy])
        dims = (-1, outside, 0)
    elif kind == "row":
        by_rank = ranks(world).run(ranked.row, shape, x, weight.float(), [], dy)
        dims = (outside, -1, 1)
    else:
        function = ranked.gather_columns if kind == "gather columns" else ranked.scatter_columns
        by_rank = ranks(world).run(function, pipeline, x.flatten(0, 1), weight.float(), dy.flatten(0, 1))
        dims = (-1, -1, 0 if kind == "gather columns" else 1)
    for i, dim in enumerate(dims):
        parts = [(*own.outputs, *own.gradients)[i] for own in by_rank]
        ours = parts[0] if dim is None else joined(parts, dim)
        assert ours.dtype == (torch.float32 if i == 2 else torch.bfloat16)
        if i < 2:
            ours = ours.view(whole)
        allowed = 2 * error(plain[i], exact[i]) + torch.finfo(torch.bfloat16).eps * exact[i].abs().max()
        assert error(ours.double(), exact[i]) <= allowed
    assert {key.dtype for key in by_rank[1].rows} == {"bfloat16"}


# --- torch's fused operations, as they fall back ----------------------------------------------------------------------


@WORLDS
@BATCHES
def test_fused_all_gather_matmul(ranks, world, batch):
    S = S_OF_A_RANK * world
    x, weights = randn(batch, S, E), [randn(FEATURES, E), randn(12, E)]
    dys = [randn(batch, S, len(weight), seed=1) for weight in weights]
    theirs = ranks(world).run(ranked.fused_gather, 1, x, weights)
    ours = ranks(world).run(ranked.column, Shape(True, Pipeline(4)), x, weights, [], dys)
    for expected, own in zip(theirs, ours, strict=True):
        for y, found in zip(expected, own.outputs, strict=True):
            assert_equal(found, y)


@WORLDS
@BATCHES
def test_fused_matmul_reduce_scatter(ranks, world, batch):
    S = S_OF_A_RANK * world
    x, weight, dy = randn(batch, S, FEATURES), randn(E, FEATURES), randn(batch, S, E, seed=1)
    theirs = ranks(world).run(ranked.fused_scatter, 1, x, weight)
    ours = ranks(world).run(ranked.row, Shape(True, Pipeline(4)), x, weight, [], dy)
    for expected, own in zip(theirs, ours, strict=True):
        assert_equal(own.outputs[0], expected)


@WORLDS
def test_fused_operations_along_features(ranks, world):
    x, up, down = randn(12, E), randn(FEATURES, E), randn(E, FEATURES)
    h, dy = randn(12, FEATURES), randn(12, E, seed=1)
    theirs = ranks(world).run(ranked.fused_gather, 1, x, [up])
    ours = ranks(world).run(ranked.gather_columns, Pipeline(4), x, up, h)
    for (expected,), own in zip(theirs, ours, strict=True):
        assert_equal(own.outputs[0], expected)
    theirs = ranks(world).run(ranked.fused_scatter, 1, h, down)
    ours = ranks(world).run(ranked.scatter_columns, Pipeline(4), h, down, dy)
    for expected, own in zip(theirs, ours, strict=True):
        assert_equal(own.outputs[0], expected)


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "split", "world", "forward", "backward"),
    [
        # The own rows are multiplied under both pieces, then each piece as it comes.
        ("column", True, 2, "ii c wc wc", "ii cici c c ww c ww"),
        ("column", True, 3, "ii c wicwic wcwc", "ii cici c c wiwi c wiwi c ww c ww"),
        ("column", False, 2, "c", "cici c ww"),
        # Sums for others leave as they are made; the rank's own are made before any is waited for.
        ("row", True, 2, "cici c ww", "ii cc wcc wcc"),
        ("row", True, 3, "cici cwicwi c ww", "ii cc wiccwicc wccwcc"),
        ("row", False, 2, "cici ww", "cc"),
    ],
)
def test_products_are_computed_while_a_transfer_is_on_the_wire(ranks, kind, split, world, forward, backward):
    """i a piece is put on the wire, c a product, w a wait. Who waits for a piece at once has iw next to each other."""
    S, shape = S_OF_A_RANK * world, Shape(split, Pipeline(2))
    into, out = (E, FEATURES) if kind == "column" else (FEATURES, E)
    arguments = shape, kind, randn(1, S, into), randn(out, into), randn(1, S, out, seed=1)
    for letters in ranks(world).run(ranked.order, *arguments):
        assert letters["forward"] == forward.replace(" ", "")
        assert letters["backward"] == backward.replace(" ", "")


@SPLITS
def test_the_uncut_layer_waits_at_once(ranks, split):
    """What the letters look like where nothing is hidden in forward."""
    shape, S = Shape(split, None), 2 * S_OF_A_RANK
    (row, _) = ranks(2).run(ranked.order, shape, "row", randn(1, S, FEATURES), randn(E, FEATURES), randn(1, S, E))
    assert row["forward"] == "ciw"

"""The table of schemes against figures worked out by hand."""

from __future__ import annotations

from itertools import product

import pytest

from meshwright.account import Compute, Issue, Wait
from meshwright.errors import UserError
from meshwright.schemes.question import Question, hybrid
from meshwright.schemes.table import SCHEMES, Row, rows, table

N, H, P = 4096, 2048, 8
"""Tokens, width, ranks; 16 heads of 128, so two for each rank."""

GRADIENTS = 12 * H * H + 2 * H
"""Parameters of the block: all divide by the number of ranks."""

BLOCK = N * H // P
"""Elements of a rank's part of a tensor of the sequence."""

TENSOR, SEQUENCE, TENSOR_CUT, SEQUENCE_CUT, ULYSSES, CONTIGUOUS, ZIGZAG, HYBRID, *STATES = (s.name for s in SCHEMES)
NAIVE, FLAT, PER_PARAMETER, BUCKETED, ZERO_1, ZERO_2, ZERO_3 = STATES


def row(name: str, degree: int = P, seq: int = N, **sizes: int) -> Row:
    return next(row for row in table(seq, H, degree, **sizes) if row.scheme == name)


def elements(found: Row) -> tuple[int, int]:
    return found.elements_forward, found.elements_backward


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_tensor_parallelism_sends_four_activations_twice() -> None:
    """Two all-reduces of N·H forward, two backward; of each, one rank sends 2·7/8: 8(t-1)/t·bsh."""
    found = row(TENSOR)
    assert (found.operation, found.calls_forward, found.calls_backward) == ("all_reduce", 2, 2)
    assert elements(found) == (29_360_128, 29_360_128)
    assert found.elements == 8 * 7 * N * H // 8 == 58_720_256
    assert found.payload_bytes == 2 * 4 * N * H


def test_sequence_parallelism_sends_ten_halves() -> None:
    """Two gathers and two scatters forward, four and two backward, 7/8 of N·H each: 10(t-1)/t·bsh."""
    found = row(SEQUENCE)
    assert (found.operation, found.calls_forward, found.calls_backward) == ("all_gather, reduce_scatter", 4, 6)
    assert elements(found) == (4 * 7 * N * H // 8, 6 * 7 * N * H // 8)
    assert found.elements == 10 * 7 * N * H // 8 == 73_400_320


def test_pipelining_sends_the_same_in_more_calls() -> None:
    """Four slices instead of each all-reduce; four pieces of each of seven hops instead of each gather or scatter."""
    found = row(TENSOR_CUT)
    assert (found.operation, found.calls_forward, found.calls_backward) == ("all_reduce", 4 * 2, 4 * 2)
    assert elements(found) == elements(row(TENSOR))
    found = row(SEQUENCE_CUT)
    assert (found.operation, found.calls_forward, found.calls_backward) == ("shift", 4 * 7 * 4, 4 * 7 * 6)
    assert elements(found) == elements(row(SEQUENCE))


def test_ulysses_sends_by_its_paper() -> None:
    """4·N·h·(P-1)/P² forward, in one call each for q, k, v and out; mirrored backward."""
    found = row(ULYSSES)
    assert (found.operation, found.calls_forward, found.calls_backward) == ("all_to_all", 4, 4)
    assert elements(found) == (4 * N * H * 7 // 64, 4 * N * H * 7 // 64) == (3_670_016, 3_670_016)


def test_ulysses_sends_less_of_grouped_heads() -> None:
    """k and v of 8 KV heads are half of q; of 4, which two ranks share each, a half as well."""
    q = BLOCK * 7 // 8
    assert row(ULYSSES, heads=16, kv_heads=8).elements_forward == 2 * q + 2 * q // 2
    assert row(ULYSSES, heads=16, kv_heads=4).elements_forward == 2 * q + 2 * q // 2


@pytest.mark.parametrize("name", [CONTIGUOUS, ZIGZAG])
def test_a_ring_sends_every_other_ranks_keys(name: str) -> None:
    """Forward 7 hops of k and of v, N/8·H each. Backward the same, and 8 hops of dk and of dv, in float32."""
    found = row(name)
    assert (found.operation, found.calls_forward, found.calls_backward) == ("shift", 2 * 7, 2 * 7 + 2 * 8)
    assert elements(found) == (2 * 7 * BLOCK, 2 * 7 * BLOCK + 2 * 8 * BLOCK) == (14_680_064, 31_457_280)
    assert found.bytes == 2 * (14 + 14) * BLOCK + 4 * 16 * BLOCK
    assert row(name, heads=16, kv_heads=4).bytes == found.bytes // 4


def test_a_hybrid_is_both() -> None:
    """Ulysses over 2, each of half of its N/8·H; rings of 4, of chunks of N/4 tokens and half of the heads."""
    found = row(HYBRID)
    assert found.splits.endswith("ulysses 2 × ring 4")
    assert (found.operation, found.calls_forward, found.calls_backward) == ("all_to_all, shift", 4 + 6, 4 + 6 + 8)
    assert elements(found) == (4 * BLOCK // 2 + 6 * BLOCK, 4 * BLOCK // 2 + 6 * BLOCK + 8 * BLOCK)


@pytest.mark.parametrize(
    ("degree", "ulysses", "ring"), [(1, 1, 1), (2, 1, 2), (7, 1, 7), (8, 2, 4), (12, 3, 4), (16, 4, 4), (64, 8, 8)]
)
def test_degrees_of_the_hybrid_are_as_even_as_they_come(degree: int, ulysses: int, ring: int) -> None:
    layout = hybrid(degree)
    assert (layout.ulysses, layout.ring, layout.world) == (ulysses, ring, degree)


def test_a_hybrid_of_a_prime_is_a_ring() -> None:
    found = {row.scheme: row for row in table(7 * 64, 7 * 128, 7)}
    assert (found[HYBRID].bytes, found[HYBRID].saved_bytes) == (found[ZIGZAG].bytes, found[ZIGZAG].saved_bytes)


def test_naive_data_parallelism_sends_each_gradient() -> None:
    """12·H² weights and two norms of H, in eight float32 gradients, all after backward; 2·7/8 of each is sent."""
    found = row(NAIVE)
    assert (found.operation, found.calls_forward, found.calls_backward) == ("all_reduce", 0, 8)
    assert elements(found) == (0, 2 * 7 * (12 * H * H + 2 * H) // 8)
    assert found.payload_bytes == 4 * (12 * H * H + 2 * H)


def test_all_strategies_send_the_same_in_other_calls() -> None:
    """A matrix of H² float32 has 16 MiB, one of the MLP 64: each fills a bucket of 25 MiB, beside which norms fit."""
    calls = {FLAT: 1, PER_PARAMETER: 8, BUCKETED: 6}
    for name, count in calls.items():
        found = row(name)
        assert (found.operation, found.calls_forward, found.calls_backward) == ("all_reduce", 0, count)
        assert elements(found) == elements(row(NAIVE))


def test_zero_1_scatters_gradients_and_gathers_parameters() -> None:
    """Both float32: together what an all-reduce sends."""
    found = row(ZERO_1)
    assert (found.calls_forward, found.calls_backward, found.calls_optimiser) == (0, 6, 6)
    assert elements(found) == (0, 7 * GRADIENTS // 8)
    assert (found.elements_optimiser, found.bytes) == (7 * GRADIENTS // 8, row(NAIVE).bytes)


def test_zero_2_gathers_once_and_zero_3_twice() -> None:
    """In bf16, one unit a block; gradients are scattered in float32."""
    for name, gathers in ((ZERO_2, 1), (ZERO_3, 2)):
        found = row(name)
        assert (found.calls_forward, found.calls_backward, found.calls_optimiser) == (1, gathers, 0)
        assert elements(found) == (7 * GRADIENTS // 8, gathers * 7 * GRADIENTS // 8)
        assert found.bytes == (2 * gathers + 4) * 7 * GRADIENTS // 8


def test_bytes_are_those_on_the_wire() -> None:
    """Two a number, but for float32 gradients."""
    for found in table(N, H, P):
        assert found.bytes == found.wire_bytes
        floats = {
            CONTIGUOUS: 16 * BLOCK,
            ZIGZAG: 16 * BLOCK,
            HYBRID: 8 * BLOCK,
            **dict.fromkeys(STATES, found.elements),
        }
        floats |= {ZERO_2: 7 * GRADIENTS // 8, ZERO_3: 7 * GRADIENTS // 8}  # what is gathered is in bf16
        assert found.bytes == 2 * found.elements + 2 * floats.get(found.scheme, 0)


def test_activations_grow_with_the_batch_and_gradients_do_not() -> None:
    for one, three in zip(table(N, H, P), table(N, H, P, batch=3), strict=True):
        assert three.elements == (1 if one.scheme in STATES else 3) * one.elements


def test_one_rank_sends_nothing_and_keeps_the_same_under_every_scheme() -> None:
    found = table(N, H, 1)
    for row in found:
        assert (row.operation, row.calls_forward, row.calls_backward, row.bytes) == ("none", 0, 0, 0)
        assert (row.when_seq_grows, row.when_degree_grows, row.when_both_grow) == (None, None, None)
        assert row.saved_bytes == found[0].saved_bytes


# --- how it grows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "growth"),
    [
        (TENSOR, ("x2", "x1.07", "x2.14")),  # 15/16 over 7/8
        (SEQUENCE, ("x2", "x1.07", "x2.14")),
        (ULYSSES, ("x2", "x0.536", "x1.07")),  # 15/256 over 7/64
        (ZIGZAG, ("x2", "x1.03", "x2.07")),  # (4·15 + 4·16·2)/16 over (4·7 + 4·8·2)/8, in bytes: 15.5/15
        (HYBRID, ("x2", "x0.607", "x1.21")),
        (NAIVE, ("x1", "x1.07", "x1.07")),
    ],
)
def test_growth(name: str, growth: tuple[str, str, str]) -> None:
    found = row(name)
    if name == HYBRID:  # ulysses 2 × ring 4, then 4 × 4: in elements of two bytes, 4/2 + 12 + 16·2 over 8 and 16 ranks
        before, after = (8 * 1 / 2 + 12 + 16) / 8, (8 * 3 / 4 + 12 + 16) / 16
        growth = ("x2", f"x{after / before:.3g}", f"x{2 * after / before:.3g}")
    assert (found.when_seq_grows, found.when_degree_grows, found.when_both_grow) == growth


def test_no_growth_where_the_doubled_degree_is_illegal() -> None:
    """16 heads do not divide over 32 ranks, a ring does; 4096 + 16 tokens are not 32 zigzag chunks."""
    assert (row(ULYSSES, degree=16).when_degree_grows, row(ULYSSES, degree=16).when_both_grow) == (None, None)
    assert row(ULYSSES, degree=16).when_seq_grows == "x2"
    assert row(ZIGZAG, degree=16).when_degree_grows == "x1.02"
    found = row(ZIGZAG, seq=4096 + 16)
    assert (found.when_degree_grows, found.when_both_grow) == (None, "x2.07")


# --- what is kept and hidden ------------------------------------------------------------------------------------------


def test_saved_bytes_by_formula() -> None:
    """In bf16, by 2·N·H. TP: the inputs of both norms and their outputs, whole; q, k, v, out and the MLP's two hidden
    layers of 4, an eighth: 4 + 12/8. Float32 rows: mean and deviation of two norms; log-sum-exp of 2 heads a rank, with
    24 bytes of the kernel's random state. The other schemes divide all of it. Ulysses keeps out twice: as attention
    made it and as the next layer reads it.
    """
    unit = 2 * N * H
    assert row(TENSOR).saved_bytes == unit * (4 + 12 / P) + 4 * N * (2 * 2 + 2) + 24
    assert row(SEQUENCE).saved_bytes == unit * 16 / P + 4 * N * (2 * 2 / P + 2) + 24
    assert row(TENSOR_CUT).saved_bytes == row(TENSOR).saved_bytes
    assert row(SEQUENCE_CUT).saved_bytes == row(SEQUENCE).saved_bytes
    assert row(CONTIGUOUS).saved_bytes == row(ZIGZAG).saved_bytes == unit * 16 / P + 4 * N // P * (2 * 2 + 16) + 24
    assert row(ULYSSES).saved_bytes == row(HYBRID).saved_bytes == unit * 17 / P + 4 * N // P * (2 * 2 + 16) + 24
    assert row(NAIVE).saved_bytes == unit * 16 + 4 * N * (2 * 2 + 16) + 24


HIDDEN = {
    TENSOR: (0, 2),
    SEQUENCE: (0, 4),
    TENSOR_CUT: (2 * 3, 2 * 4),
    SEQUENCE_CUT: (4 * 28, 6 * 28),
    ULYSSES: (0, 0),
    ZIGZAG: (14, 28),
    HYBRID: (6, 12),
    NAIVE: (0, 0),
}
"""Calls between whose issue and wait a matmul or attention is computed."""


@pytest.mark.parametrize("name", HIDDEN)
def test_what_overlaps_is_what_the_pages_write(name: str) -> None:
    """Of a ring every hop, but for the two that carry dk and dv home."""
    scheme = next(scheme for scheme in SCHEMES if scheme.name == name)
    flying: dict[int, tuple[str, bool]] = {}
    found = {"forward": 0, "backward": 0}
    for event in scheme.trace(Question.of(N, H, P)).expanded():
        if isinstance(event, Issue):
            flying[event.ticket] = (event.phase, False)
        elif isinstance(event, Compute) and event.kind in ("matmul", "attention"):
            flying = {ticket: (phase, True) for ticket, (phase, _) in flying.items()}
        elif isinstance(event, Wait):
            phase, hidden = flying.pop(event.ticket)
            found[phase] += hidden
    assert tuple(found.values()) == HIDDEN[name]
    assert (sum(found.values()) == 0) == (scheme.overlaps == "nothing")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"seq": 96, "degree": 3},
            "--degree 3 does not divide --hidden 2048 (each rank holds as many heads): "
            "use a degree of 2 or 4, or a hidden of 2046 or 2049",
        ),
        (
            {"heads": 60},
            "--heads 60 does not divide --hidden 2048 (each head is an equal part of the width): use 32 or 64\n"
            "--degree 8 does not divide --heads 60 (tensor parallelism and Ulysses give each rank as many whole "
            "heads): use 4",
        ),
        (
            {"heads": 4},
            "--degree 8 is above --heads 4 (tensor parallelism and Ulysses give each rank as many whole heads): use 4",
        ),
        (
            {"heads": 16, "kv_heads": 3},
            "--kv-heads 3 does not divide --heads 16 (each KV head serves as many query heads): use 2 or 4\n"
            "--degree 8 neither divides --kv-heads 3 nor is a multiple of it (ranks split the KV heads evenly or "
            "replicate them): use 1",
        ),
        (
            {"hidden": 1536, "seq": 96, "degree": 6, "kv_heads": 3},
            "--degree 6 = ulysses 2 × ring 3, whose ulysses neither divides --kv-heads 3 nor is a multiple of it "
            "(ranks split the KV heads evenly or replicate them): use 3 or 12",
        ),
        (
            {"seq": 100},
            "--seq 100 is not divisible by 2 × --degree = 16 (a zigzag ring gives each rank two chunks of as many "
            "tokens): use 96 or 112",
        ),
        (
            {"seq": 0, "batch": -1},
            "--seq 0 must be between 1 and 1099511627776: use 1\n--batch -1 must be between 1 and 1099511627776: use 1",
        ),
        ({"seq": 2**20, "degree": 2048}, "--degree 2048 must be between 1 and 1024: use 1024"),
    ],
)
def test_refusals(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as error:
        table(**{"seq": N, "hidden": H, "degree": P} | sizes)
    assert str(error.value) == message


def test_exactly_what_a_scheme_cannot_split_is_refused() -> None:
    """The messages are worded here, the rules are the layouts' own: over a grid of sizes they must be the same."""
    refused = 0
    for seq, degree, heads, kv_heads in product((1, 8, 12, 24), (1, 2, 3, 4, 6), (1, 2, 6, 12), (1, 2, 3, 4, 6, 12)):
        question = Question(seq, 48, degree, 1, heads, kv_heads)
        legal = all(scheme.can_split(question) for scheme in SCHEMES)
        try:
            assert Question.of(seq, 48, degree, 1, heads, kv_heads) == question
            assert legal, question
            assert len(rows(question)) == len(SCHEMES)
        except UserError:
            refused += 1
            assert not legal, question
    assert refused > 100


def test_heads_are_whole_on_each_rank_unless_given() -> None:
    """128 wide where that leaves each rank one or more; else as wide as divides."""
    assert Question.of(N, 4096, 8).heads == 32
    assert Question.of(N, 4096, 64).heads == 64
    assert Question.of(N, 192, 2).heads == 6
    assert Question.of(N, 4096, 8, heads=16) == Question(N, 4096, 8, 1, 16, 16)

"""ZeRO-2 and ZeRO-3 by formula: rows of every rank's parts, and the ledger of a small job worked out by hand.

The model below, its parameters [dim0, rest] and what N ranks send of them, N·ceil(dim0/N)·rest elements:

                                  shape     N = 4             N = 2
    a layer   attention_norm      [6]       4·2      =   8    2·3      =   6
              query               [8, 6]    4·2·6    =  48    2·4·6    =  48
              key, value          [4, 6]    4·1·6    =  24    2·2·6    =  24    each
              output              [6, 8]    4·2·8    =  64    2·3·8    =  48
              mlp_norm            [6]                    8                 6
              gate, up            [10, 6]   4·3·6    =  72    2·5·6    =  60    each
              down                [6, 10]   4·2·10   =  80    2·3·10   =  60
                                                       400               336
    the root  embedding, head     [7, 6]    4·2·6    =  48    2·4·6    =  48    each
              norm                [6]                    8                 6
                                                       104               102
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.account import EXACT_CATEGORIES, Ledger, LedgerKey, StepAccount
from meshwright.config.tree import Job, Layout, Model, Training
from meshwright.planner.step import formula
from meshwright.schemes.fsdp import FullyShardedUnits, Unit, own_numel, padded_numel
from meshwright.schemes.params import ParamSpec, Split, param_specs
from meshwright.schemes.tape import Group
from meshwright.schemes.units import Run, Units

MODEL = Model(layers=4, d_model=6, d_ff=10, heads=2, kv_heads=1, head_dim=4, vocab_size=7)
LAYER, ROOT = {4: 400, 2: 336}, {4: 104, 2: 102}
every_accumulation = pytest.mark.parametrize("accumulation", [1, 2, 3])
repeatable = settings(max_examples=200, derandomize=True, deadline=None)


def job(accumulation: int = 1, precision: str = "float32", reduce_precision: str = "float32", **layout: int) -> Job:
    training = Training(
        batch=24,
        seq_len=8,
        accumulation=accumulation,
        precision=precision,  # type: ignore[arg-type]
        reduce_precision=reduce_precision,  # type: ignore[arg-type]
        device="cpu",
    )
    return Job(model=MODEL, layout=Layout(**layout), training=training)


# --- parts of parameters ----------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 70), width=st.integers(1, 5), ranks=st.integers(1, 17), flat=st.booleans())
@repeatable
def test_own_parts_are_the_parameter(rows: int, width: int, ranks: int, flat: bool) -> None:
    """Parts of ceil(rows/ranks), the last shorter or empty; padded, all are as long as the first."""
    spec = ParamSpec("w", (rows,) if flat else (rows, width))
    own = [own_numel(spec, ranks, coordinate) for coordinate in range(ranks)]
    assert sum(own) == spec.local_numel
    assert own == sorted(own, reverse=True)
    assert padded_numel(spec, ranks) == ranks * own[0]
    assert sum(n not in (0, own[0]) for n in own) <= 1


def test_parts_by_hand() -> None:
    spec = ParamSpec("w", (10, 3))
    assert [own_numel(spec, 4, rank) for rank in range(4)] == [9, 9, 9, 3]
    assert padded_numel(spec, 4) == 36
    assert [own_numel(spec, 6, rank) for rank in range(6)] == [6, 6, 6, 6, 6, 0]
    assert padded_numel(spec, 16) == 48
    divided = ParamSpec("w", (13, 3), Split("tensor", 2, 0, 2))
    assert padded_numel(divided, 4) == 4 * 2 * 3, "of the 7 rows of a tensor rank, one of them padding already"


@pytest.mark.parametrize("ranks", [2, 4])
def test_units_by_hand(ranks: int) -> None:
    specs = param_specs(MODEL, Layout(), 8)
    layer = [spec for spec in specs if spec.name.startswith("layers.1.")]
    root = [spec for spec in specs if not spec.name.startswith("layers.")]
    assert Unit.of(layer, ranks) == Unit(LAYER[ranks], 60, "temporaries")
    assert Unit.of(root, ranks) == Unit(ROOT[ranks], 42, "temporaries")
    assert Unit.of(root, ranks, loss_chunk=5) == Unit(ROOT[ranks], 42, "logits"), "the head's gradient"
    assert Unit.of(root[:-1], ranks, loss_chunk=5).last_category == "temporaries", "tied: the last is a norm"
    assert Unit.of([], ranks) == Unit(0, 0, "temporaries")


# --- the ledger of a small job ----------------------------------------------------------------------------------------


def units(ranks: int) -> dict[str, int]:
    """Elements that are sent, by site."""
    return {"root": ROOT[ranks], **{f"layers.{i}": LAYER[ranks] for i in range(4)}}


def of_units(account: StepAccount) -> dict[LedgerKey, int]:
    return {key: count for key, count in account.ledger.rows.items() if key.site in units(4)}


def row(operation: str, axis: str, size: int, phase: str, site: str, dtype: str, nbytes: int) -> LedgerKey:
    return LedgerKey(operation, axis, size, phase, site, dtype, nbytes)


@every_accumulation
@pytest.mark.parametrize("zero", [2, 3])
def test_ledger_of_four_ranks(zero: int, accumulation: int) -> None:
    """Each micro-batch gathers each unit, with zero 3 layers twice, and reduces it."""
    expected = {}
    for site, elements in units(4).items():
        nbytes = 4 * elements
        expected[row("all_gather", "shard", 4, "forward", site, "float32", nbytes)] = accumulation
        if zero == 3 and site != "root":
            expected[row("all_gather", "shard", 4, "backward", site, "float32", nbytes)] = accumulation
        expected[row("reduce_scatter", "shard", 4, "backward", site, "float32", nbytes)] = accumulation
    for rank in range(4):
        account = formula(job(accumulation, shard=4, zero=zero), rank)
        assert of_units(account) == expected
        others = {key.site for key in account.ledger.rows.keys() - expected.keys()}
        assert others == {"step", "norm_of_gradients"}


@every_accumulation
@pytest.mark.parametrize("zero", [2, 3])
def test_ledger_of_replicas(zero: int, accumulation: int) -> None:
    """HSDP: as two ranks; once a step half of each unit is summed over the replicas."""
    expected = {}
    for site, elements in units(2).items():
        nbytes = 4 * elements
        expected[row("all_gather", "shard", 2, "forward", site, "float32", nbytes)] = accumulation
        if zero == 3 and site != "root":
            expected[row("all_gather", "shard", 2, "backward", site, "float32", nbytes)] = accumulation
        expected[row("reduce_scatter", "shard", 2, "backward", site, "float32", nbytes)] = accumulation
        expected[row("all_reduce", "replicate", 2, "backward", site, "float32", nbytes // 2)] = 1
    assert of_units(formula(job(accumulation, shard=2, replicate=2, zero=zero))) == expected


@pytest.mark.parametrize(("reduce_precision", "itemsize"), [("float32", 4), ("bf16", 2)])
def test_ledger_in_bf16(reduce_precision: str, itemsize: int) -> None:
    """Gathered in the compute dtype, reduced, over replicas too, in the reduce dtype."""
    rows = of_units(formula(job(1, "bf16", reduce_precision, shard=2, replicate=2, zero=3)))
    reduced = {"float32": "float32", "bf16": "bfloat16"}[reduce_precision]
    found = {(key.operation, key.phase, key.dtype, key.payload_bytes) for key in rows if key.site == "layers.2"}
    assert found == {
        ("all_gather", "forward", "bfloat16", 336 * 2),
        ("all_gather", "backward", "bfloat16", 336 * 2),
        ("reduce_scatter", "backward", reduced, 336 * itemsize),
        ("all_reduce", "backward", reduced, 336 // 2 * itemsize),
    }


def test_states_are_sharded_over_the_sequence_too() -> None:
    rows = of_units(formula(job(shard=2, ring=2, zero=3)))
    assert {(key.axis, key.group_size) for key in rows} == {("shard*ring", 4)}
    assert {key.payload_bytes for key in rows} == {1600, 416}


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("degrees", [{"shard": 4}, {"shard": 2, "replicate": 2}], ids=["FSDP", "HSDP"])
def test_prefetch_changes_the_footprint_only(zero: int, accumulation: int, degrees: dict[str, int]) -> None:
    """Two and three layers are gathered ahead: so many more buffers of the wire live at the peak, at most."""
    accounts = [formula(job(accumulation, zero=zero, prefetch=n, **degrees)) for n in (1, 2, 3)]
    assert all(account.ledger == accounts[0].ledger for account in accounts)
    assert all(account.work == accounts[0].work for account in accounts)
    bytes_of_a_layer = 4 * LAYER[degrees["shard"]]
    for more, account in enumerate(accounts[1:], start=1):
        for category in EXACT_CATEGORIES:
            assert account.footprint.bytes[category] == accounts[0].footprint.bytes[category], category
        assert 0 <= account.footprint.peak - accounts[0].footprint.peak <= more * bytes_of_a_layer
    if zero == 3:
        assert accounts[2].footprint.peak - accounts[1].footprint.peak == bytes_of_a_layer


def test_more_prefetch_than_layers_is_all_layers() -> None:
    assert formula(job(shard=4, prefetch=4)).trace == formula(job(shard=4, prefetch=9)).trace


# --- in which order units run -----------------------------------------------------------------------------------------


def fully_sharded(layers: int, prefetch: int, zero: int) -> FullyShardedUnits:
    unit = Unit(8, 2, "temporaries")
    return FullyShardedUnits(
        layer=unit,
        root=unit,
        num_layers=layers,
        group=Group("shard", 4),
        replicas=Group("replicate", 1),
        reshards=zero == 3,
        prefetch=prefetch,
        dtype="float32",
        p=4,
        reduce_dtype="float32",
        r=4,
        is_first=True,
        is_last=True,
    )


def unrolled(runs: list[Run], step: int) -> list[int]:
    return [run.first + step * i for run in runs for i in range(run.times)]


@given(layers=st.integers(1, 12), prefetch=st.integers(1, 14), zero=st.sampled_from([0, 2, 3]))
@repeatable
def test_every_layer_runs_once_in_order(layers: int, prefetch: int, zero: int) -> None:
    ours = fully_sharded(layers, prefetch, zero) if zero else Units()
    forward, backward = list(ours.forward_runs(layers)), list(ours.backward_runs(layers))
    assert unrolled(forward, 1) == list(range(layers))
    assert unrolled(backward, -1) == list(range(layers - 1, -1, -1))
    for runs in (forward, backward):
        assert [run.is_first for run in runs] == [True] + [False] * (len(runs) - 1)
        assert all(run.times > 0 for run in runs)
        assert zero == 0 or runs[0].times == 1, "what the first layer does, no other does"


@given(layers=st.integers(1, 12), prefetch=st.integers(1, 14), zero=st.sampled_from([2, 3]))
@repeatable
def test_every_layer_is_gathered_once_and_before_it_runs(layers: int, prefetch: int, zero: int) -> None:
    """The first `prefetch` ahead of the first, each other one by the layer that is so far before it."""
    ours = fully_sharded(layers, prefetch, zero)
    ahead = [i for run in ours.forward_runs(layers) for i in range(run.first, run.first + run.times) if run.puts_ahead]
    assert ahead == ([] if prefetch == 1 else list(range(max(0, layers - prefetch))))
    back = [
        i for run in ours.backward_runs(layers) for i in range(run.first, run.first - run.times, -1) if run.puts_ahead
    ]
    assert back == ([] if zero == 2 else list(range(layers - 1, prefetch - 1, -1)))


@given(layers=st.integers(1, 6), prefetch=st.integers(1, 7), zero=st.sampled_from([2, 3]))
@repeatable
def test_the_ledger_does_not_depend_on_how_layers_are_grouped(layers: int, prefetch: int, zero: int) -> None:
    """Every layer has its own rows: one gather forward, with zero 3 one backward, one reduction."""
    base = job(shard=4, zero=zero, prefetch=prefetch)
    rows = Ledger.of(formula(replace(base, model=replace(MODEL, layers=layers))).trace).rows
    for i in range(layers):
        own = sorted((key.operation, key.phase, count) for key, count in rows.items() if key.site == f"layers.{i}")
        gathers = [("all_gather", "backward", 1)] if zero == 3 else []
        assert own == [*gathers, ("all_gather", "forward", 1), ("reduce_scatter", "backward", 1)]
    assert {key.site for key in rows if key.site.startswith("layers")} == {f"layers.{i}" for i in range(layers)}

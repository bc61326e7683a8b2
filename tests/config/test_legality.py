"""Every rule of legality: its message word for word, and that its advice is legal."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.config.files import load_job
from meshwright.config.legality import check_processes, complete_world, require_legal, violations
from meshwright.config.tree import Cluster, Layout, Link, Model, Training
from meshwright.errors import UserError

QUICKSTART = load_job("quickstart")


def broken(layout, model=QUICKSTART.model, **training):
    """Rule → message of everything that a layout breaks."""
    found = layout.violations(model, QUICKSTART.cluster, replace(QUICKSTART.training, **training))
    assert len({violation.rule for violation in found}) == len(found)
    return {violation.rule: violation.message for violation in found}


def test_legal_layouts():
    for layout in (
        Layout(),
        Layout(tensor=8),
        Layout(replicate=4, tensor=2),
        Layout(ring=2, ulysses=4, tensor=2, sequence_parallel=True),
        Layout(replicate=2, ring=4, ring_order="contiguous", recompute="full"),
        Layout(ulysses=8, recompute="selective"),
    ):
        assert broken(layout) == {}


def test_size_is_not_a_violation():
    assert broken(Layout(replicate=1024, tensor=8), batch=1024) == {}


def test_all_broken_rules_with_the_nearest_legal_values():
    assert broken(Layout(replicate=3, tensor=3), accumulation=2) == {
        "heads": "layout.tensor = 3 does not divide model.heads = 8 (tensor × ulysses must divide the query heads): "
        "use 1, 2, 4 or 8",
        "kv_heads": "layout.tensor = 3 neither divides model.kv_heads = 4 nor is a multiple of it "
        "(tensor must split the KV heads evenly or replicate them): use 1, 2, 4 or 8",
        "d_ff": "layout.tensor = 3 does not divide model.d_ff = 704 "
        "(each tensor-parallel rank holds an equal part of the MLP): use 1, 2, 4 or 8",
        "batch": "training.batch = 16 is not divisible by layout.replicate × training.accumulation = 3 × 2 = 6 "
        "(replicate × shard × accumulation: each rank takes as many sequences in each micro-batch): "
        "use a batch of 12 or 18",
    }


def test_axes_that_are_not_available():
    assert broken(Layout(shard=2, pipeline=2))["available"] == (
        "layout.pipeline = 2 is not available yet (all other axes are): set it to 1"
    )


def test_what_states_are_sharded_over():
    assert "zero" not in broken(Layout(shard=2)) | broken(Layout(ring=2, zero=1)) | broken(Layout(replicate=2))
    assert broken(Layout(replicate=2, shard=4, zero=0))["zero"] == (
        "layout.shard = 4 with layout.zero = 0 shards nothing (ranks that hold copies of all states are replicas): "
        "use layout.zero 1, 2 or 3, or layout.replicate 8"
    )
    assert broken(Layout(replicate=4, zero=2))["zero"] == (
        "layout.zero = 2 has no ranks to shard over (shard × ring × ulysses = 1; replicate holds copies): "
        "use layout.shard 4, or layout.zero 0"
    )


def test_precision_of_sums_is_a_choice_where_they_are_not_in_place():
    low = Training(reduce_precision="bf16", batch=16, seq_len=256)
    rules = [v.rule for v in Layout(shard=2).violations(Model(), Cluster(), low)]
    assert rules == []
    (violation,) = Layout(replicate=2).violations(Model(), Cluster(), low)
    assert violation.message == (
        "training.reduce_precision = bf16 needs layout.zero 2 or 3, not 0 (the others sum the float32 gradients where "
        "they are): use float32, or shard the states"
    )


def test_automatic_buckets_need_figures_of_the_links():
    layout, training = Layout(replicate=4, bucket_mib="auto"), Training()
    unknown = Cluster(hosts=2, devices_per_host=2)
    (violation,) = layout.violations(Model(), unknown, training)
    assert violation.message == (
        "layout.bucket_mib = auto needs cluster.intra.bandwidth and cluster.inter.bandwidth, not known of this cluster "
        "(the best size follows from the links): give a cluster of meshwright bench calibrate, or a number such as 25"
    )
    known = Cluster(hosts=1, devices_per_host=4, intra=Link(1e-5, 1e9))
    assert layout.violations(Model(), known, training) == []
    for without_size in (Layout(tensor=2), Layout(replicate=4, gradients="flat"), Layout(shard=4)):
        assert replace(without_size, bucket_mib="auto").violations(Model(), unknown, training) == []


def test_sequence_and_heads_over_two_axes():
    found = broken(Layout(ring=3, ulysses=2, tensor=3))
    assert found["sequence"] == (
        "training.seq_len = 256 is not divisible by layout.ring × layout.ulysses × 2 for zigzag = 3 × 2 × 2 = 12 "
        "(each rank holds as many tokens): use 252 or 264, or training.pad true"
    )
    assert found["heads"] == (
        "layout.tensor × layout.ulysses = 3 × 2 = 6 does not divide model.heads = 8 "
        "(tensor × ulysses must divide the query heads): use layout.tensor 1, 2 or 4"
    )


@pytest.mark.parametrize(
    ("layout", "seq_len", "refusal"),
    [
        (Layout(ring=4), 252, "252 is not divisible by layout.ring × 2 for zigzag = 4 × 2 = 8 {}: use 248 or 256"),
        (Layout(ring=4, ring_order="contiguous"), 254, "254 is not divisible by layout.ring = 4 {}: use 252 or 256"),
        (Layout(ulysses=4), 255, "255 is not divisible by layout.ulysses = 4 {}: use 252 or 256"),
        (Layout(ulysses=8), 7, "7 is not divisible by layout.ulysses = 8 {}: use 8"),
        (
            Layout(tensor=4, sequence_parallel=True),
            254,
            "254 is not divisible by layout.tensor = 4 {}: use 252 or 256",
        ),
        (
            Layout(ring=2, ulysses=2, tensor=2, sequence_parallel=True),
            250,
            "250 is not divisible by layout.ring × layout.ulysses × layout.tensor × 2 for zigzag = 2 × 2 × 2 × 2 = 16 "
            "{}: use 240 or 256",
        ),
        (
            Layout(ring=2, ulysses=2, tensor=2, sequence_parallel=True, ring_order="contiguous"),
            252,
            "252 is not divisible by layout.ring × layout.ulysses × layout.tensor = 2 × 2 × 2 = 8 {}: use 248 or 256",
        ),
    ],
    ids=["zigzag", "contiguous", "ulysses", "too short", "sequence parallel", "all", "all contiguous"],
)
def test_a_sequence_that_does_not_divide(layout, seq_len, refusal):
    rule = "(each rank holds as many tokens)"
    assert broken(layout, seq_len=seq_len) == {
        "sequence": f"training.seq_len = {refusal.format(rule)}, or training.pad true"
    }
    assert broken(layout, seq_len=seq_len, pad=True) == {}


def test_lengths_that_need_not_divide():
    """Zigzag has two chunks a rank only where there is a ring; tensor divides sequences only if it is asked to."""
    assert broken(Layout(ring=4, ring_order="contiguous"), seq_len=252) == {}
    assert broken(Layout(ulysses=4, ring_order="zigzag"), seq_len=252) == {}
    assert broken(Layout(tensor=4), seq_len=255) == {}
    assert broken(Layout(sequence_parallel=True), seq_len=255) == {}


def test_shape_of_the_model():
    model = replace(QUICKSTART.model, kv_heads=3, head_dim=33)
    assert broken(Layout(), model) == {
        "grouped_heads": "model.heads = 8 is not a multiple of model.kv_heads = 3 "
        "(each KV head serves the same number of query heads): use kv_heads 1, 2, 4 or 8",
        "head_dim": "model.head_dim = 33 is odd (rotary embedding turns pairs of features): use 32 or 34",
    }
    assert broken(Layout(), replace(QUICKSTART.model, head_dim=33, positions="learned")) == {}


def test_more_kv_ranks_than_heads_replicate_them():
    assert broken(Layout(tensor=8), replace(QUICKSTART.model, kv_heads=2)) == {}
    model = replace(QUICKSTART.model, heads=12, kv_heads=4, d_ff=768)
    assert broken(Layout(tensor=6), model) == {
        "kv_heads": "layout.tensor = 6 neither divides model.kv_heads = 4 nor is a multiple of it "
        "(tensor must split the KV heads evenly or replicate them): use 1, 2, 4 or 12"
    }


def test_tensor_alone_must_fit_the_kv_heads():
    """3 ranks cannot share 4 KV heads, although the 12 of tensor × ulysses could replicate each of them 3 times."""
    model = replace(QUICKSTART.model, heads=12, kv_heads=4, d_ff=768)
    assert broken(Layout(ulysses=4), model) == broken(Layout(tensor=4), model) == {}
    (message,) = broken(Layout(tensor=3, ulysses=4), model).values()
    rule, _, advice = message.rpartition(": use ")
    assert rule == (
        "layout.tensor = 3 neither divides model.kv_heads = 4 nor is a multiple of it "
        "(tensor must split the KV heads evenly or replicate them)"
    )
    assert "1" in re.findall(r"\d+", advice)


def test_tensor_and_ulysses_share_the_heads():
    llama = load_job("llama3-8b").model  # 32 query heads, 8 KV heads
    assert broken(Layout(tensor=8, ulysses=4), llama) == {}
    assert broken(Layout(tensor=8, ulysses=8), llama) == {
        "heads": "layout.tensor × layout.ulysses = 8 × 8 = 64 does not divide model.heads = 32 "
        "(tensor × ulysses must divide the query heads): use layout.ulysses 1, 2 or 4"
    }
    assert broken(Layout(ulysses=16)) == {
        "heads": "layout.ulysses = 16 does not divide model.heads = 8 "
        "(tensor × ulysses must divide the query heads): use layout.ulysses 1, 2, 4 or 8"
    }
    model = replace(QUICKSTART.model, heads=12, kv_heads=4, d_ff=768)
    assert broken(Layout(tensor=2, ulysses=3), model, seq_len=300) == {
        "kv_heads": "layout.tensor × layout.ulysses = 2 × 3 = 6 neither divides model.kv_heads = 4 nor is a multiple "
        "of it (tensor × ulysses must split the KV heads evenly or replicate them): use layout.ulysses 1, 2 or 6"
    }


@given(
    tensor=st.integers(1, 12),
    ulysses=st.integers(1, 12),
    kv_heads=st.integers(1, 12),
    shared_by=st.integers(1, 6),
)
def test_heads_are_legal_exactly_if_every_rank_can_hold_as_many(tensor, ulysses, kv_heads, shared_by):
    """The rule says what the executors need: an equal split, or whole heads, first over tensor, then over ulysses."""
    heads = kv_heads * shared_by
    model = replace(QUICKSTART.model, heads=heads, kv_heads=kv_heads, d_ff=tensor)

    def fits(ranks, num_heads):
        return num_heads % ranks == 0 or ranks % num_heads == 0

    own_kv_heads = max(1, kv_heads // tensor)
    possible = heads % (tensor * ulysses) == 0 and fits(tensor, kv_heads) and fits(ulysses, own_kv_heads)
    found = broken(Layout(tensor=tensor, ulysses=ulysses), model, seq_len=12 * ulysses)
    assert possible == (not found), found
    for message in found.values():
        _, names_ulysses, advice = message.rpartition(": use layout.ulysses ")
        if names_ulysses and fits(tensor, kv_heads):
            for advised in map(int, re.findall(r"\d+", advice)):
                assert broken(Layout(tensor=tensor, ulysses=advised), model, seq_len=12 * advised) == {}


def test_models_without_attention_have_no_rules_of_heads():
    ffn = Model(block="ffn", d_ff=704, heads=8)
    assert broken(Layout(tensor=11), ffn) == {}
    assert set(broken(Layout(tensor=3), ffn)) == {"d_ff"}


@given(
    tensor=st.integers(1, 16),
    heads=st.integers(1, 24),
    kv_heads=st.integers(1, 24),
    d_ff=st.integers(1, 1024),
    block=st.sampled_from(["decoder", "ffn"]),
)
def test_the_advised_degrees_are_legal(tensor, heads, kv_heads, d_ff, block):
    model = Model(block=block, heads=heads, kv_heads=kv_heads, d_ff=d_ff)
    for rule, text in broken(Layout(tensor=tensor), model).items():
        for advised in re.findall(r"\d+", text.rpartition(": use ")[2]):
            if rule == "grouped_heads":
                assert heads % int(advised) == 0
            else:
                assert not {"heads", "kv_heads", "d_ff"} & set(broken(Layout(tensor=int(advised)), model))


@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 100))
def test_the_advised_batches_are_legal(replicate, accumulation, batch):
    for text in broken(Layout(replicate=replicate), accumulation=accumulation, batch=batch).values():
        for advised in re.findall(r"\d+", text.rpartition("a batch of ")[2]):
            assert broken(Layout(replicate=replicate), accumulation=accumulation, batch=int(advised)) == {}


@given(
    ring=st.integers(1, 6),
    ulysses=st.integers(1, 8),
    tensor=st.sampled_from([1, 2, 4]),
    sequence_parallel=st.booleans(),
    order=st.sampled_from(["contiguous", "zigzag"]),
    seq_len=st.integers(1, 300),
)
def test_the_advised_lengths_and_padding_are_legal(ring, ulysses, tensor, sequence_parallel, order, seq_len):
    layout = Layout(ring=ring, ulysses=ulysses, tensor=tensor, sequence_parallel=sequence_parallel, ring_order=order)
    assert "sequence" not in broken(layout, seq_len=seq_len, pad=True)
    padded = layout.padded(seq_len)
    lengths = range(seq_len, padded + 1)
    assert [length for length in lengths if "sequence" not in broken(layout, seq_len=length)] == [padded]
    if message := broken(layout, seq_len=seq_len).get("sequence"):
        advised = [int(number) for number in re.findall(r"\d+", message.rpartition(": use ")[2])]
        assert (advised[-1] == padded and advised[0] < seq_len) or advised == [padded]
        assert all("sequence" not in broken(layout, seq_len=length) for length in advised)


def test_require_legal_raises_a_line_for_each_violation():
    require_legal(QUICKSTART)
    layout = Layout(tensor=3)
    with pytest.raises(UserError) as caught:
        require_legal(replace(QUICKSTART, layout=layout))
    found = violations(layout, QUICKSTART.model, QUICKSTART.cluster, QUICKSTART.training)
    assert str(caught.value).splitlines() == [violation.message for violation in found]


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


def test_world_goes_to_replicate_unless_that_was_typed():
    assert complete_world(Layout(tensor=8), 1024, {"tensor"}) == Layout(replicate=128, tensor=8)
    assert complete_world(Layout(replicate=4, tensor=8), 8, {"tensor"}) == Layout(tensor=8)
    assert complete_world(Layout(replicate=2, tensor=2), 4, {"replicate", "tensor"}) == Layout(replicate=2, tensor=2)
    assert refusal(complete_world, Layout(replicate=2, tensor=2), 8, {"replicate"}) == (
        "--world 8 is not the product of the degrees, replicate 2 × tensor 2 = 4: "
        "use --world 4, or leave out layout.replicate"
    )
    assert refusal(complete_world, Layout(ring=2, tensor=2), 10, {"tensor"}) == (
        "--world 10 is not divisible by ring 2 × tensor 2 = 4, the product of the degrees other than replicate: "
        "use 8 or 12"
    )
    assert refusal(complete_world, Layout(tensor=4), 0, {"tensor"}) == (
        "--world 0 is not divisible by tensor 4 = 4, the product of the degrees other than replicate: use 4"
    )


def test_processes_equal_the_world():
    check_processes(Layout(replicate=2, tensor=2), 4)
    assert refusal(check_processes, Layout(replicate=2, tensor=2), 3) == (
        "--processes 3 is not the product of the degrees, replicate 2 × tensor 2 = 4: "
        "use --processes 4, or change a degree"
    )
    assert refusal(check_processes, Layout(), 2) == (
        "--processes 2 is not the product of the degrees, 1 = 1: use --processes 1, or change a degree"
    )


def tiered(layout, devices_per_host):
    """Rule → message of a layout on hosts of so many devices."""
    cluster = Cluster(hosts=2, devices_per_host=devices_per_host)
    found = violations(layout, QUICKSTART.model, cluster, QUICKSTART.training)
    return {violation.rule: violation.message for violation in found}


def test_sums_by_tiers_need_ranks_to_share_hosts():
    both = "layout.hierarchical = true needs as many ranks, 2 or more, of each gradient group on each of several hosts,"
    why = "(a host's ranks divide what goes to other hosts): use layout.hierarchical false"
    for layout in (Layout(replicate=4), Layout(replicate=2, ring=2), Layout(replicate=4, tensor=2)):
        own = replace(layout, hierarchical=True)
        assert tiered(own, 2 * layout.tensor) == {}
        assert "tiers" in tiered(own, layout.world)
    assert tiered(Layout(replicate=4, hierarchical=True), 8) == {
        "tiers": f"{both} but layout.replicate = 4 has 4 ranks on one host of cluster.devices_per_host = 8 {why} or "
        "cluster.devices_per_host 2"
    }
    assert tiered(Layout(replicate=2, tensor=4, hierarchical=True), 4) == {
        "tiers": f"{both} but layout.replicate = 2 has 1 rank on each of 2 hosts of cluster.devices_per_host = 4 {why}"
    }
    assert tiered(Layout(replicate=4, ring=2, hierarchical=True), 6) == {
        "tiers": f"{both} but layout.replicate × layout.ring = 4 × 2 = 8 has 6 and 2 ranks on its hosts of "
        f"cluster.devices_per_host = 6 {why} or cluster.devices_per_host 2 or 4"
    }
    assert tiered(Layout(tensor=4, hierarchical=True), 2) == {
        "tiers": f"{both} but layout.replicate = 1 has 1 rank on one host of cluster.devices_per_host = 2 {why}"
    }


def test_sums_by_tiers_are_of_whole_gradients():
    assert tiered(Layout(ring=4, zero=1, hierarchical=True), 2) == {
        "hierarchical": "layout.hierarchical = true with layout.zero = 1 sums no gradients whole (sharded states are "
        "reduce-scattered): use layout.hierarchical false or layout.zero 0"
    }
    found = tiered(Layout(shard=4, hierarchical=True), 4)
    assert found.keys() == {"hierarchical", "tiers"}
    assert found["hierarchical"] == (
        "layout.hierarchical = true with layout.zero = 3 sums no gradients whole (sharded states are "
        "reduce-scattered): use layout.hierarchical false"
    )


@given(
    replicate=st.integers(1, 6),
    ring=st.sampled_from([1, 2, 4]),
    tensor=st.sampled_from([1, 2, 4]),
    devices_per_host=st.integers(1, 12),
)
def test_the_advised_hosts_are_legal(replicate, ring, tensor, devices_per_host):
    layout = Layout(replicate=replicate, ring=ring, tensor=tensor, hierarchical=True)
    if message := tiered(layout, devices_per_host).get("tiers"):
        for advised in re.findall(r"\d+", message.rpartition("hierarchical false")[2]):
            assert "tiers" not in tiered(layout, int(advised))


def test_half_batches_halve_the_micro_batch_of_a_rank():
    halved = Layout(tensor=2, half_batches=True)
    assert broken(halved) == broken(replace(halved, replicate=4, sequence_parallel=True)) == {}
    assert broken(halved, batch=5) == {
        "half_batches": "training.batch = 5 leaves a rank a micro-batch of 5 (layout.half_batches = true halves it): "
        "use a batch of 4 or 6, or layout.half_batches false"
    }
    assert broken(replace(halved, replicate=2, shard=2), batch=12, accumulation=3) == {
        "half_batches": "training.batch = 12, divided by layout.replicate × layout.shard × training.accumulation = "
        "2 × 2 × 3 = 12, leaves a rank a micro-batch of 1 (layout.half_batches = true halves it): use a batch of 24, "
        "or layout.half_batches false"
    }
    assert broken(replace(halved, tensor=1), batch=5) == {}, "nothing is halved"
    assert broken(replace(halved, replicate=2), batch=5).keys() == {"batch"}, "one rule at a time"


def test_half_batches_and_cut_products_hide_the_same_communication():
    assert broken(Layout(tensor=2, half_batches=True, overlap="pipelined")) == {
        "half_batches_overlap": "layout.half_batches = true with layout.overlap = pipelined would hide the same "
        "communication twice (a product that is cut waits for all of its own pieces, so that nothing is left to run "
        "under the other half): use layout.overlap none, or layout.half_batches false"
    }
    assert broken(Layout(half_batches=True, overlap="pipelined")) == {}


def test_half_batches_need_attention_beside_an_mlp():
    linear = replace(QUICKSTART.model, block="ffn")
    assert broken(Layout(tensor=2, half_batches=True), linear, batch=5) == {
        "half_batches": "layout.half_batches = true needs attention and an MLP to run beside each other, and "
        "model.block = ffn has linear layers only: use layout.half_batches false"
    }


@given(batch=st.integers(1, 60), replicate=st.integers(1, 4), accumulation=st.integers(1, 4))
def test_the_advised_batches_can_be_halved(batch, replicate, accumulation):
    layout, options = Layout(replicate=replicate, tensor=2, half_batches=True), {"accumulation": accumulation}
    if message := broken(layout, batch=batch, **options).get("half_batches"):
        for advised in re.findall(r"\d+", message.rpartition("use a batch of")[2]):
            assert broken(layout, batch=int(advised), **options) == {}

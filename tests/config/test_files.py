"""Files of jobs: exact round trips, strictness, and the messages of each mistake."""

import dataclasses
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright import catalog
from meshwright.config import tree
from meshwright.config.files import dump_job, load_cluster, load_device, load_job
from meshwright.config.values import structure
from meshwright.errors import UserError


def message(function, *arguments):
    """The text of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


@pytest.fixture
def job_file(tmp_path):
    def write(text, name="job.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def anything(kind):
    """Any value of the type of a field."""
    if dataclasses.is_dataclass(kind):
        return st.builds(kind, **{name: anything(inner) for name, inner in typing.get_type_hints(kind).items()})
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) is dict:
        return st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), anything(float), max_size=3)
    finite = st.floats(allow_nan=False, allow_infinity=False)
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    if len(typing.get_args(kind)) == 2 and typing.get_args(kind)[0] in (int, float):  # a number or a word
        return st.one_of(*map(anything, typing.get_args(kind)))
    return {int: st.integers(), float: finite, bool: st.booleans(), str: text}[kind]


@given(anything(tree.Job))
def test_a_dumped_job_reads_back_equal(job):
    import tomllib

    assert structure(tomllib.loads(dump_job(job)), tree.Job, "dump") == job


@pytest.mark.parametrize("name", catalog.names("models"))
def test_catalog_jobs_replay(name, job_file):
    job = load_job(name, [("layout.tensor", "2")])
    path = job_file(dump_job(job))
    assert load_job(path) == job
    assert dump_job(load_job(str(path))) == dump_job(job)


def test_a_small_file(job_file):
    job = load_job(job_file("[model]\nlayers = 2\n[training]\nlearning_rate = 1\nseq_len = 128.0\n", "mine.toml"))
    assert job.name == job.model.name == "mine"
    assert job.model.layers == 2
    assert job.model.d_model == 256
    assert (job.training.learning_rate, type(job.training.learning_rate)) == (1.0, float)
    assert (job.training.seq_len, type(job.training.seq_len)) == (128, int)
    assert job.cluster == load_cluster("laptop")


def test_rope_scaling_in_a_file_and_as_options(job_file):
    path = job_file("[model]\nrope_theta = 500000\n[model.rope_scaling]\nfactor = 8\noriginal_positions = 4096\n")
    in_file = load_job(path)
    assert in_file.model.rope_scaling == tree.RopeScaling(8.0, 1.0, 4.0, 4096)
    options = [("model.rope_scaling.factor", "32"), ("model.rope-scaling.high-freq-factor", "2.5")]
    job = load_job(path, options)
    assert job.model.rope_scaling == tree.RopeScaling(32.0, 1.0, 2.5, 4096)
    assert job.model.rope_theta == 500000
    assert load_job(job_file(dump_job(job), "dump.toml")) == job
    assert load_job("quickstart").model.rope_scaling == tree.RopeScaling() == tree.RopeScaling(1.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("field", "value", "refusal"),
    [
        ("factor", "0.5", "factor = 0.5 must be at least 1"),
        ("factor", "inf", 'factor = "inf" is not a number'),
        ("low_freq_factor", "0", "low_freq_factor = 0.0 must be above 0"),
        ("low_freq_factor", "4", "high_freq_factor = 4.0 must be above model.rope_scaling.low_freq_factor = 4.0"),
        ("high_freq_factor", "0.5", "high_freq_factor = 0.5 must be above model.rope_scaling.low_freq_factor = 1.0"),
        ("original_positions", "0", "original_positions = 0 must be between 1 and 2**40"),
        ("original_positions", "8192.5", 'original_positions = "8192.5" is not a whole number'),
    ],
)
def test_rope_scaling_is_refused_with_one_line(field, value, refusal):
    assert message(load_job, "quickstart", [(f"model.rope_scaling.{field}", value)]) == f"model.rope_scaling.{refusal}"


def test_mistakes_in_a_table_of_rope_scaling(job_file):
    path = job_file('[model]\nrope_scaling = { factor = "8", low_freq_facto = 1 }')
    assert message(load_job, path).replace(f"{path}: ", "").splitlines() == [
        'model.rope_scaling.factor = "8" is not a number',
        "model.rope_scaling.low_freq_facto is not a field: did you mean model.rope_scaling.low_freq_factor?",
    ]
    assert message(load_job, job_file("[model]\nrope_scaling = 8")).endswith("model.rope_scaling = 8 is not a table")


def test_cluster_and_device_files_lie_beside_the_job(job_file):
    job_file("memory_bytes = 24e9", "card.toml")
    job_file(
        'device = "card.toml"\ndevices_per_host = 2\nintra = { bandwidth = 1e9 }\ninter = { bandwidth = 1e8 }',
        "pair.toml",
    )
    job = load_job(job_file('cluster = "pair.toml"'))
    assert (job.cluster.name, job.cluster.devices) == ("pair", 2)
    assert (job.cluster.device.name, job.cluster.device.memory_bytes) == ("card", 24_000_000_000)


def test_all_mistakes_of_a_file_at_once(job_file):
    path = job_file(
        """
        clutser = "laptop"
        [model]
        layers = "four"
        heads = 2.5
        kv_heads = true
        norm = "rms"
        bias = 1
        d_modle = 512
        [training]
        learning_rate = nan
        [cluster]
        intra = 3
        [cluster.device]
        peak_flops = { bf16 = "fast" }
        """
    )
    assert message(load_job, path).replace(f"{path}: ", "").splitlines() == [
        'model.layers = "four" is not a whole number',
        "model.heads = 2.5 is not a whole number",
        "model.kv_heads = true is not a whole number",
        'model.norm = "rms" is not one of rmsnorm, layernorm',
        "model.bias = 1 is not true or false",
        "model.d_modle is not a field: did you mean model.d_model?",
        'cluster.device.peak_flops.bf16 = "fast" is not a number',
        "cluster.intra = 3 is not a table",
        "training.learning_rate = nan is not a number",
        "clutser is not a field: did you mean cluster?",
    ]


def test_all_ranges_at_once(job_file):
    path = job_file(
        """
        name = "a/b"
        [model]
        layers = 0
        vocab_size = -1
        [layout]
        tensor = 0
        [training]
        batch = 0
        learning_rate = 0.0
        beta2 = 1.0
        [cluster]
        device = { peak_flops = { bf61 = 1e12, bf16 = 0 } }
        intra = { bandwidth = 1e9 }
        """
    )
    assert message(load_job, path).splitlines() == [
        'name = "a/b" cannot name a run folder: use letters, digits, dots and dashes',
        "model.layers = 0 must be between 1 and 2**16",
        "model.vocab_size = -1 must be between 1 and 2**40",
        "layout.tensor = 0 must be between 1 and 2**31 - 1",
        "cluster.inter.bandwidth = 0.0 must be above 0",
        "cluster.device.peak_flops.bf61 is not a precision: use float32 or bf16",
        "cluster.device.peak_flops.bf16 = 0.0 must be above 0 (leave it out if it is unknown)",
        "training.batch = 0 must be between 1 and 2**40",
        "training.learning_rate = 0.0 must be above 0",
        "training.beta2 = 1.0 must be at least 0 and below 1",
    ]


def test_absurd_sizes_are_out_of_range():
    absurd = {
        "model.d_model": 10**23,
        "layout.replicate": 10**12,
        "training.seed": 2**63,
        "training.warmup_steps": 2**41,
        "training.timeout_seconds": 1e300,
    }
    overrides = [(path, str(value)) for path, value in absurd.items()]
    assert message(load_job, "quickstart", overrides).splitlines() == [
        f"model.d_model = {10**23} must be between 1 and 2**40",
        f"layout.replicate = {10**12} must be between 1 and 2**31 - 1",
        "training.warmup_steps = 2199023255552 must be between 0 and 2**40",
        "training.seed = 9223372036854775808 must be between 0 and 2**63 - 1",
        "training.timeout_seconds = 1e+300 must be above 0 and at most 1e9",
    ]
    assert message(load_job, "quickstart", [("layout.replicate", str(2**30)), ("layout.tensor", "2")]) == (
        "the number of ranks, the product of the degrees = 2147483648, must be between 1 and 2**31 - 1"
    )
    assert load_job("quickstart", [("training.seed", str(2**63 - 1))]).training.seed == 2**63 - 1


def test_an_unknown_key_without_a_neighbour_names_the_fields(job_file):
    path = job_file("[layout]\nzzz = 1")
    assert message(load_job, path) == (
        f"{path}: layout.zzz is not a field: use one of layout.replicate, layout.shard, layout.ring, layout.ulysses, "
        "layout.tensor, layout.pipeline, layout.gradients, layout.bucket_mib, layout.zero, "
        "layout.prefetch, layout.sequence_parallel, layout.recompute, layout.ring_order, layout.overlap, "
        "layout.overlap_chunks, layout.overlap_ring, layout.hierarchical, layout.half_batches"
    )


def test_names_that_do_not_exist():
    assert message(load_job, "llama3-8") == (
        "llama3-8 is neither a file nor in the catalog's models: did you mean llama3-8b?"
    )
    assert message(load_job, "zzz.toml") == (
        "zzz.toml is neither a file nor in the catalog's models: use a TOML file or one of 2.7b, gpt3-175b, large, "
        "llama2-7b, llama3-405b, llama3-70b, llama3-8b, llama3.1-8b, medium, quickstart, small, smollm-1.7b, xl, "
        "xxl-ffn"
    )
    assert message(load_cluster, "h100x9") == (
        "h100x9 is neither a file nor in the catalog's clusters: did you mean h100x8?"
    )
    assert message(load_device, "h10") == "h10 is neither a file nor in the catalog's devices: did you mean h100?"


@pytest.mark.parametrize("load", [load_job, load_cluster, load_device])
def test_a_name_that_is_too_long(load):
    assert message(load, "x" * 5000) == f"{'x' * 5000} cannot be read: File name too long"


def test_files_that_are_no_jobs(job_file, tmp_path):
    broken = job_file("layers = = 2")
    assert message(load_job, broken) == f"{broken} is not TOML: Invalid value (at line 1, column 10)"
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    assert message(load_job, binary).startswith(f"{binary} is not TOML: 'utf-8' codec can't decode byte 0xff")
    assert message(load_job, tmp_path) == f"{tmp_path} is a run folder, not a file: give {broken}"
    digits = job_file(f"layers = {'9' * 5000}", "digits.toml")
    assert message(load_job, digits).startswith(f"{digits} is not TOML: Exceeds the limit")
    (tmp_path / "config.json").write_text("{}")
    assert message(load_job, tmp_path) == (
        f"{tmp_path} is a folder with a config.json of Hugging Face, which this version does not read: give a TOML file"
    )


def test_the_catalog_wins_over_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert load_job("quickstart").name == "quickstart"

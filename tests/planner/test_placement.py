"""Where ranks and parameters are."""

from __future__ import annotations

from meshwright.config.files import load_job
from meshwright.config.tree import Job
from meshwright.planner.placement import Placement


def job(*overrides: tuple[str, str]) -> Job:
    return load_job("quickstart", overrides)


def test_ranks_fill_hosts_with_tensor_innermost() -> None:
    placed = Placement.of(job(("layout.tensor", "2"), ("layout.replicate", "4"))).to_json()
    assert (placed["world"], placed["hosts"], placed["devices_per_host"]) == (8, 2, 4)
    where = [(p["host"], p["coordinates"]["replicate"], p["coordinates"]["tensor"]) for p in placed["ranks"]]
    assert where == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 2, 0), (1, 2, 1), (1, 3, 0), (1, 3, 1)]


def test_parts_of_parameters() -> None:
    """257 rows over 2 ranks are 129 and 128, padding left out. A norm is whole everywhere."""
    placed = Placement.of(job(("layout.tensor", "2"), ("model.vocab_size", "257"))).to_json()
    parameters = {p["name"]: p for p in placed["parameters"]}
    assert parameters["embedding.weight"] == {
        "name": "embedding.weight",
        "global_shape": [257, 256],
        "local_shape": [129, 256],
        "axis": "tensor",
        "dim": 0,
        "ranges": [[0, 129], [129, 257]],
        "state_rows": None,
    }
    assert placed["states"] == {"zero": 0, "axis": None, "ranks": 1}
    assert parameters["layers.3.mlp.down.weight"]["ranges"] == [[0, 352], [352, 704]]
    assert parameters["layers.3.mlp.down.weight"]["dim"] == 1
    assert parameters["norm.weight"]["ranges"] is None


def test_shared_kv_heads_are_on_several_ranks() -> None:
    placed = Placement.of(job(("layout.tensor", "8"))).to_json()  # 4 KV heads of 32
    key = next(p for p in placed["parameters"] if p["name"] == "layers.0.attention.key.weight")
    assert key["ranges"] == [[0, 32], [0, 32], [32, 64], [32, 64], [64, 96], [64, 96], [96, 128], [96, 128]]


def test_rows_of_sharded_states() -> None:
    """Of 129 rows on a tensor rank, 3 ranks hold 43 each; of 4 KV heads of 32, over 2, 22, 22 and 20 rows."""
    overrides = (("layout.tensor", "2"), ("layout.shard", "3"), ("model.vocab_size", "257"), ("training.batch", "3"))
    placed = Placement.of(job(*overrides)).to_json()
    parameters = {p["name"]: p for p in placed["parameters"]}
    assert placed["states"] == {"zero": 3, "axis": "shard", "ranks": 3}
    assert parameters["embedding.weight"]["state_rows"] == [[0, 43], [43, 86], [86, 129]]
    assert parameters["layers.0.attention.key.weight"]["state_rows"] == [[0, 22], [22, 44], [44, 64]]

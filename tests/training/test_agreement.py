"""The last lines of a run."""

from __future__ import annotations

from typing import Any

from training.tiny import job

from meshwright.config.tree import Layout
from meshwright.planner.step import formula
from meshwright.training.agreement import comparison_table, ledger_line


def accounts() -> dict[str, Any]:
    return {source: formula(job(Layout(tensor=2))).to_json() for source in ("formula", "rehearsal", "run")}


def test_agreement() -> None:
    agreeing = accounts()
    assert ledger_line(agreeing) == (
        f"ledger: {len(agreeing['run']['ledger'])} rows agree among formula, rehearsal and run"
    )


def test_the_first_difference_is_named() -> None:
    differing = accounts()
    row = next(row for row in differing["run"]["ledger"] if row["site"] == "layers.0.mlp" and row["phase"] == "forward")
    row["count"] += 1
    num_rows = len(differing["run"]["ledger"])
    assert ledger_line(differing) == (
        f"ledger: 1 of {num_rows} rows differ among formula, rehearsal and run; the first, all_reduce of 8192 bytes "
        "float32 over tensor (2) in forward at layers.0.mlp: formula 1, rehearsal 1, run 2 calls"
    )


def test_a_missing_row_counts_as_none() -> None:
    differing = accounts()
    del differing["rehearsal"]["ledger"][0]
    assert ledger_line(differing).endswith("formula 1, rehearsal 0, run 1 calls")


def test_predicted_beside_measured() -> None:
    compared = accounts()
    for account, peak in zip(compared.values(), (1024, 1024, 2048), strict=True):
        account["footprint"]["peak"] = peak
        account["work"]["by_kind"] = {"matmul": {"flops": 4_000_000}, "attention": {"flops": 96}}
        account["ledger"] = []
    compared["run"]["timeline"] |= {"step_seconds": 0.25, "compute_seconds": 0.2}
    compared["run"]["timeline"]["exposed_seconds"] = {"tensor": 0.03, "replicate": 0.01}
    assert comparison_table(compared, memory_bytes=4096).splitlines() == [
        "                               formula   rehearsal         run",
        "peak memory                      1 KiB       1 KiB       2 KiB",
        "allocator's peak                     -           -       4 KiB",
        "matmul and attention FLOPs   4,000,096   4,000,096   4,000,096",
        "sent by a rank                     0 B         0 B         0 B",
        "step                                 -           -      250 ms",
        "exposed communication                -           -       40 ms",
    ]

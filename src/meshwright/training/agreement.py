"""The last lines of a run: do formula, rehearsal and run agree, and what was predicted beside what was measured.

Works on the plain data of accounts (as in plan.json, rehearsal.json and run.json), and returns text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meshwright.account import EXACT_KINDS, Ledger, LedgerKey
from meshwright.units import format_bytes, format_seconds

Account = Mapping[str, Any]


def ledger_line(accounts: Mapping[str, Account]) -> str:
    """How many ledger rows agree among all sources; if not all do, how many differ, and the first of them."""
    ledgers = {source: Ledger.from_json(account["ledger"]).rows for source, account in accounts.items()}
    keys = sorted(set().union(*ledgers.values()))
    differing = [key for key in keys if len({rows.get(key, 0) for rows in ledgers.values()}) > 1]
    sources = _listed(list(accounts))
    if not differing:
        return f"ledger: {len(keys)} rows agree among {sources}"
    counts = ", ".join(f"{source} {rows.get(differing[0], 0)}" for source, rows in ledgers.items())
    first = f"{_row(differing[0])}: {counts} calls"
    return f"ledger: {len(differing)} of {len(keys)} rows differ among {sources}; the first, {first}"


def comparison_table(accounts: Mapping[str, Account], *, memory_bytes: int | None = None) -> str:
    """Peak memory, FLOPs and seconds of a step, a column for each source; `memory_bytes` is the allocator's peak."""
    rows = [
        ["", *accounts],
        ["peak memory", *(format_bytes(account["footprint"]["peak"]) for account in accounts.values())],
        ["matmul and attention FLOPs", *(f"{_flops(account):,}" for account in accounts.values())],
        [
            "sent by a rank",
            *(format_bytes(Ledger.from_json(account["ledger"]).wire_bytes()) for account in accounts.values()),
        ],
        ["step", *(_seconds(account["timeline"]["step_seconds"]) for account in accounts.values())],
        ["exposed communication", *(_seconds(_exposed(account)) for account in accounts.values())],
    ]
    if memory_bytes is not None:
        rows.insert(2, ["allocator's peak", *["-"] * (len(accounts) - 1), format_bytes(memory_bytes)])
    return _aligned(rows)


def _flops(account: Account) -> int:
    by_kind = account["work"]["by_kind"]
    return sum(by_kind.get(kind, {"flops": 0})["flops"] for kind in EXACT_KINDS)


def _exposed(account: Account) -> float | None:
    """Seconds over all axes; None where the account has no time of its own."""
    timeline = account["timeline"]
    return None if timeline["compute_seconds"] is None else sum(timeline["exposed_seconds"].values())


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else format_seconds(seconds)


def _row(key: LedgerKey) -> str:
    return (
        f"{key.operation} of {key.payload_bytes} bytes {key.dtype} over {key.axis} ({key.group_size}) "
        f"in {key.phase} at {key.site}"
    )


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "   ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    )

"""Attention over a divided sequence, measured on gloo ranks of this machine: ring, Ulysses, and the two together.

    meshwright bench ring [--quick]

One global problem, q [B, seq, H, D] against k and v [B, seq, K, D], forward and backward, in every case of `CASES`. A
case is run twice over: once recorded, for FLOPs, wire bytes and peak memory of each rank, which must equal the formula
(`schemes.context`); then timed, without a recorder. The cases take turns, so that a sample of one has its pair in every
other, and what is compared is the ratio of pairs. One device with the whole sequence stands in the grid under two names
(ring 1 and ulysses 1): their ratio is this machine's noise.

All ranks share the cores of this machine, a thread each, so the seconds of n ranks are not those of a cluster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, get_args

from meshwright.bench import record
from meshwright.bench.context import Account, Precision, Setting, account_rank, formula, time_rank
from meshwright.bench.pairs import ratio_row
from meshwright.comm.ranks import BYTES_OF_A_RANK, RankError, Ranks, available_memory
from meshwright.config.legality import divisors, listed, near_multiples
from meshwright.config.tree import Cluster, Layout
from meshwright.errors import UserError
from meshwright.units import format_bytes

NOTE = "all ranks share the cores of this machine, a thread each: not the seconds of a cluster"
TIMEOUT_SECONDS = 1800.0

QUICK = Setting(seq=512, heads=4, kv_heads=2, head_dim=32, samples=6)

CASES: dict[str, Layout] = {
    "ring 1": Layout(),
    "ulysses 1": Layout(),
    "ring 2 contiguous": Layout(ring=2, ring_order="contiguous"),
    "ring 2 zigzag": Layout(ring=2),
    "ulysses 2": Layout(ulysses=2),
    "ring 4 contiguous": Layout(ring=4, ring_order="contiguous"),
    "ring 4 zigzag": Layout(ring=4),
    "ulysses 4": Layout(ulysses=4),
    "ring 2 zigzag × ulysses 2": Layout(ring=2, ulysses=2),
}
"""The grid; cases that are compared stand near each other, as they are timed in this order."""

ONE_DEVICE = "ring 1"
COMPARED = [
    ("ring 2 contiguous", "ring 2 zigzag"),
    ("ring 4 contiguous", "ring 4 zigzag"),
    *((ONE_DEVICE, name) for name in CASES if name != ONE_DEVICE),
]


def measure(setting: Setting) -> list[dict[str, Any]]:
    """A row for each case, then a row for each comparison. Raises UserError, before any rank starts, for bad sizes."""
    check(setting)
    check_memory(setting, available_memory())
    run = _Run(setting)
    with ExitStack() as stack:
        pools = _Pools(stack)
        for name in CASES:
            run.account(pools, name)
        for index in range(setting.samples):
            for name in reversed(CASES) if index % 2 else CASES:
                run.time(pools, name)
    return [*(run.row(name) for name in CASES), *comparisons(run.seconds, run.failed, record.num_cores())]


# --- what this machine and these layouts can take ---------------------------------------------------------------------


def check(setting: Setting) -> None:
    """Raise UserError with a line for each size that some case cannot divide."""
    if mistakes := [*_below_one(setting)] or [*_indivisible(setting)]:
        raise UserError("\n".join(mistakes))
    for layout in CASES.values():
        assert not layout.violations(setting.model, Cluster(), setting.training), layout


def _below_one(setting: Setting) -> Iterator[str]:
    for name, value in vars(setting).items():
        if name != "precision" and value < 1:
            yield f"--{name.replace('_', '-')} = {value} is not a whole number above 0"
    if setting.precision not in get_args(Precision):
        yield f'--precision = "{setting.precision}" is not one of {", ".join(get_args(Precision))}'


def _indivisible(setting: Setting) -> Iterator[str]:
    seq, heads, kv_heads = setting.seq, setting.heads, setting.kv_heads
    parts = math.lcm(*(layout.sequence_parts for layout in CASES.values()))
    degree = max(layout.ulysses for layout in CASES.values())
    if seq % parts:
        yield (
            f"--seq = {seq} is not divisible by {parts} (2 chunks for each of 4 ring ranks, 2 × 2 for ring × ulysses): "
            f"use {listed(near_multiples(parts, seq))}"
        )
    if heads % degree:
        yield (
            f"--heads = {heads} is not divisible by {degree} (each of {degree} Ulysses ranks attends with as many "
            f"query heads): use {listed(near_multiples(degree, heads))}"
        )
    if heads % kv_heads:
        yield (
            f"--kv-heads = {kv_heads} does not divide --heads = {heads} (each KV head serves as many query heads): "
            f"use {listed(divisors(heads)[-4:])}"
        )
    elif kv_heads % degree and degree % kv_heads:
        yield (
            f"--kv-heads = {kv_heads} neither divides {degree} nor is a multiple of it (each of {degree} Ulysses ranks "
            f"gets as many KV heads, or a copy of one): use "
            f"{listed([n for n in divisors(heads) if n % degree == 0 or degree % n == 0][-4:])}"
        )


def needed_memory(setting: Setting) -> int:
    """Bytes of all pools of ranks, which stay, and of the largest case; twice its peak, as new inputs are drawn."""
    ranks = sum({layout.world for layout in CASES.values()})
    peaks = (sum(account.peak_bytes for account in formula(setting, layout)) for layout in CASES.values())
    return ranks * BYTES_OF_A_RANK + 2 * max(peaks)


def check_memory(setting: Setting, available: int) -> None:
    """Raise UserError if the largest case would not fit into so many bytes."""
    needed = needed_memory(setting)
    if needed > available:
        raise UserError(
            f"bench ring needs about {format_bytes(needed)} ({needed} bytes) and {format_bytes(available)} "
            f"({available} bytes) are free (all ranks live on this machine): use a smaller --seq {setting.seq} or "
            f"--batch {setting.batch}"
        )


# --- rows -------------------------------------------------------------------------------------------------------------


class _Pools:
    """Ranks by their number; a pool that a failure closed is replaced."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._pools: dict[int, Ranks] = {}

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if world not in self._pools or not self._pools[world].alive:
            self._pools[world] = self._stack.enter_context(Ranks(world, timeout_seconds=TIMEOUT_SECONDS))
        return self._pools[world].run(function, *arguments)


class _Run:
    """What was measured so far. A case whose ranks fail is not run again."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.accounts: dict[str, list[Account]] = {}
        self.seconds: dict[str, list[float]] = {name: [] for name in CASES}
        self.failed: dict[str, str] = {}

    def account(self, pools: _Pools, name: str) -> None:
        """Run a case under the recorder; it is its warm-up, too."""
        if accounts := self._run(pools, name, account_rank):
            self.accounts[name] = accounts
            if differences := difference(formula(self.setting, CASES[name]), accounts):
                self.failed[name] = differences

    def time(self, pools: _Pools, name: str) -> None:
        """Take a sample of a case: the slowest rank's."""
        if name in self.accounts and (seconds := self._run(pools, name, time_rank)):
            self.seconds[name].append(max(seconds))

    def _run(self, pools: _Pools, name: str, function: Callable[..., Any]) -> list[Any]:
        try:
            return pools.run(CASES[name].world, function, self.setting, CASES[name])
        except RankError as error:
            self.failed[name] = f"rank {error.rank}: {error.reason.strip().splitlines()[-1]}"
            self.accounts.pop(name, None)
            return []

    def row(self, name: str) -> dict[str, Any]:
        """The row of a case; lists have an entry a rank."""
        found, by_formula = self.accounts.get(name, []), formula(self.setting, CASES[name])
        settings: dict[str, Any] = {key: value for key, value in vars(self.setting).items() if key != "samples"}
        settings |= {field: [getattr(account, field) for account in found] for field in Account._fields}
        return record.row(
            layout=name,
            ranks=CASES[name].world,
            **settings,
            formula_peak_bytes=[account.peak_bytes for account in by_formula],
            note=NOTE,
            samples=self.seconds[name],
            unit="s",
            failed=self.failed.get(name, ""),
        )


def difference(expected: Sequence[Account], found: Sequence[Account]) -> str:
    """Where ranks differ from the formula; empty if nowhere."""
    return "; ".join(
        f"rank {rank}: {field} {getattr(theirs, field)} where the formula has {getattr(ours, field)}"
        for rank, (ours, theirs) in enumerate(zip(expected, found, strict=True))
        for field in Account._fields
        if getattr(ours, field) != getattr(theirs, field)
    )


def comparisons(seconds: dict[str, list[float]], failed: dict[str, str], cores: int) -> list[dict[str, Any]]:
    """Paired ratios of seconds: above 1, the second case is the faster one."""
    return [
        ratio_row(first, second, seconds, failed, note=NOTE, **_expected(first, second, cores))
        for first, second in COMPARED
    ]


def _expected(first: str, second: str, cores: int) -> dict[str, Any]:
    """The most that a ratio can be, where that is known.

    Balance is worth the work of the last contiguous rank over that of any zigzag rank, if each has a core of its own.
    In FLOPs as they are counted, the masked half of a block included, these compute P blocks and (P + 1)/2. A kernel
    that skips all that is masked would compute half a block less in either.
    """
    ranks = CASES[second].world
    if first == ONE_DEVICE:
        return {"limit": min(ranks, cores)} if ranks > 1 else {}
    ideal = 2 * ranks / (ranks + 1)
    given: dict[str, Any] = {"ideal_by_flops": ideal, "ideal_by_unmasked_pairs": (2 * ranks - 1) / ranks}
    return given | ({"limit": ideal} if cores >= ranks else {})
